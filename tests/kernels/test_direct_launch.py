"""``kdfast._C``'s launch runs the kernel with the arguments it is told of, or does nothing and says so."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

_C = pytest.importorskip("kdfast._C")


class Chain:
    """Of hooks, as Triton keeps them."""

    def __init__(self) -> None:
        self.calls: list[Callable[[Any], None]] = []


class Given(SimpleNamespace):
    """What a launch is told, and the calls that it makes."""

    def __init__(self, device: int = -1) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []
        self.current = device
        self.active = SimpleNamespace(
            get_current_device=lambda: self.current, get_current_stream=lambda index: ("stream", index)
        )
        self.driver = SimpleNamespace(active=self.active)
        self.runtime = SimpleNamespace(
            debug=False, add_stages_inspection_hook=None, launch_enter_hook=Chain(), launch_exit_hook=Chain()
        )
        self.compilation = SimpleNamespace(instrumentation_mode="")
        self.kernel = SimpleNamespace(pre_run_hooks=[])
        self.launch = _C.direct_launch(self.told(device))

    def told(self, device: int, **others: Any) -> dict[str, Any]:
        same = {"driver": self.driver, "active": self.active, "runtime": self.runtime}
        same |= {"compilation": self.compilation, "kernel": self.kernel, "chain": Chain, "device": device}
        same |= {"run": lambda *arguments: self.calls.append(arguments), "state": (False, "", None)}
        same |= {"programs": (7, 2, 1), "compiled": ("function", "metadata")}
        return same | {"tail": ("fixed", 3), "rest": (None, "last")} | others


@pytest.mark.parametrize(("device", "stream"), [(-1, 0), (0, 0), (3, 3)])
def test_a_launch_has_all_arguments_in_their_order(device: int, stream: int) -> None:
    given = Given(device)
    assert given.launch(("x", 1.5), ("more",)) is True
    assert given.launch((), ()) is True
    begin = (7, 2, 1, ("stream", stream), "function", "metadata", None, None, None)
    assert given.calls[0] == (*begin, "x", 1.5, "fixed", 3, "more", None, "last")
    assert given.calls[1] == (*begin, "fixed", 3, None, "last")


def _another_driver(given: Given) -> None:
    given.driver.active = SimpleNamespace(**vars(given.active))


CHANGES: dict[str, Callable[[Given], object]] = {
    "driver": _another_driver,
    "device": lambda given: setattr(given, "current", 1),
    "debug": lambda given: setattr(given.runtime, "debug", True),
    "instrumentation": lambda given: setattr(given.compilation, "instrumentation_mode", "fpsan"),
    "stages": lambda given: setattr(given.runtime, "add_stages_inspection_hook", print),
    "kernel's hook": lambda given: given.kernel.pre_run_hooks.append(print),
    "enter hook": lambda given: given.runtime.launch_enter_hook.calls.append(print),
    "exit hook": lambda given: given.runtime.launch_exit_hook.calls.append(print),
    "plain hook": lambda given: setattr(given.runtime, "launch_enter_hook", print),
}


@pytest.mark.parametrize("change", CHANGES)
def test_where_anything_has_changed_nothing_is_launched(change: str) -> None:
    given = Given(0)
    assert given.launch((), ()) is True
    CHANGES[change](given)
    assert given.launch((), ()) is False
    assert len(given.calls) == 1


def test_the_driver_may_be_found_under_another_name() -> None:
    given = Given()
    given.driver = SimpleNamespace(_active=given.active)
    launch = _C.direct_launch(given.told(-1, slot="_active"))
    assert launch((), ()) is True
    given.driver._active = None  # as before Triton has looked for one
    assert launch((), ()) is False
    assert len(given.calls) == 1


def test_hooks_that_are_none_are_silent() -> None:
    given = Given()
    given.runtime.launch_enter_hook = given.runtime.launch_exit_hook = None
    assert given.launch((), ()) is True


@pytest.mark.parametrize("where", ["run", "driver", "stream", "knob"])
def test_what_is_raised_on_the_way_is_raised(where: str) -> None:
    given = Given(0)

    def fails(*_: Any) -> None:
        raise RuntimeError("as the driver says")

    if where == "run":
        launch = _C.direct_launch(given.told(0, run=fails))
    else:
        launch = given.launch
    if where == "driver":
        given.active.get_current_device = fails
    elif where == "stream":
        given.active.get_current_stream = fails
    elif where == "knob":
        del given.runtime.debug
    with pytest.raises(
        AttributeError if where == "knob" else RuntimeError, match=r"as the driver says|debug"
    ):
        launch((), ())


def test_wrong_arguments_are_refused() -> None:
    given = Given()
    for wrong in (((),), ([], ()), ((), None), ((), (), ())):
        with pytest.raises(TypeError, match="two tuples are needed"):
            given.launch(*wrong)
    with pytest.raises(KeyError, match="driver"):
        _C.direct_launch({})
    with pytest.raises(ValueError, match="state: three values are needed"):
        _C.direct_launch(given.told(0, state=(1, 2)))

"""``kdfast._C`` launches a kept row loss as Python does: the same arguments, and nothing where Python has to decide."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.conftest import INTERPRETING

pytest.importorskip("triton")
if INTERPRETING:
    pytest.skip("nothing is kept in the interpreter", allow_module_level=True)
pytest.importorskip("kdfast._C")

from triton import knobs

from bench.hostbench import Silent, pretended
from kdfast import functional as F
from kdfast.kernels import kl, pair, topk
from kdfast.kernels import launch as launching
from kdfast.kernels.common.launch_rows import Wanted
from kdfast.kernels.keys import extension

FAMILIES = kl.PLAIN, kl.LABELS, kl.STATISTICS, pair.PAIR, topk.TOPK
Heard = list[tuple[Any, ...]]


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> Iterator[Heard]:
    """Every launch inside, of tensors their shape, dtype and place in 16 bytes."""
    found: Heard = []

    def said(launched: tuple[str, tuple[Any, ...]]) -> None:
        name, args = launched
        kinds = [
            (x.shape, x.dtype, x.data_ptr() & 15) if isinstance(x, torch.Tensor) else x for x in args[10:]
        ]
        found.append((name, *args[:3], *kinds))

    monkeypatch.setattr(Silent, "told", said)
    with pretended():
        yield found


def _rows() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(4, 6, requires_grad=True), torch.randn(4, 6, requires_grad=True)


def _backward(loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], scale: float = 1.0) -> None:
    student, teacher = _rows()
    (loss(student, teacher) * scale).sum().backward()


def _scattered(x: torch.Tensor) -> torch.Tensor:
    """A view whose strides fall into three groups, so that a launch copies it."""
    return x.view(4, 2, 3, 1).expand(4, 2, 3, 5).permute(3, 1, 0, 2)


LABELS = torch.zeros(4, dtype=torch.int64)
LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "kl": lambda s, t: F.kd_kl_div(s, t, 4.0),
    "kl of the student": lambda s, t: F.kd_kl_div(s, t.detach(), 4.0),
    "kl of the teacher": lambda s, t: F.kd_kl_div(s.detach(), t, 4.0),
    "weight and mask": lambda s, t: F.kd_kl_div(
        s, t, 2.0, row_weight=torch.ones(4), mask=torch.ones(4, dtype=torch.bool)
    ),
    "rows": lambda s, t: F.kd_kl_div(s, t, 4.0, reduction="none"),
    "first dimension": lambda s, t: F.jsd_loss(s, t, dim=0),
    "temperature in memory": lambda s, t: F.kd_kl_div(s, t, torch.tensor(4.0).expand(1)[0], divisor=torch.ones(())),
    "dkd": lambda s, t: F.dkd_loss(s, t, LABELS),
    "labels": lambda s, t: F.distillation_loss(s, t, LABELS, temperature=2.0, ce_weight=0.5),
    "alpha": lambda s, t: F.divergence_loss(s, t, kind="alpha", alpha=0.5),
    "half": lambda s, t: F.jsd_loss(s.half(), t.bfloat16()),
    "topk": lambda s, t: F.topk_kd_loss(s, LABELS[:, None], t.detach()[:, :1]),
    "no rows": lambda s, t: F.kd_kl_div(s[:0], t[:0]),
    "no gradient": lambda s, t: F.kd_kl_div(s.detach(), t.detach()) + 0 * s.sum(),
    "statistics": lambda s, t: F.kd_statistics(s, t).kl.sum() + 0 * s.sum(),
    "long rows": lambda s, t: F.kd_kl_div(s[:2].repeat(1, 22000), t[:2].repeat(1, 22000)),
    "copied": lambda s, t: F.kd_kl_div(_scattered(s), _scattered(t).contiguous()),
}  # fmt: skip


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_what_is_kept_is_launched_as_python_would(
    loss: str, scale: float, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    with launching.count_launches() as counts:
        for _ in range(3):
            _backward(LOSSES[loss], scale)
    mine, counted = heard[:], sum(counts.values())
    assert counted == len(mine)
    launching.forget()
    heard.clear()
    for family in FAMILIES:
        monkeypatch.setattr(family, "_run", None)
    for _ in range(3):
        _backward(LOSSES[loss], scale)
    assert mine == heard


def _found(**others: Any) -> Any:
    """A launch that is kept, by itself."""
    student, teacher = (x.detach() for x in _rows())
    given = [(student, teacher), (None, None), 1, (4.0, 4.0, None, None), Wanted(False, True), None, (), ()]
    for at, value in others.items():
        given[int(at[1:])] = value
    assert kl.PLAIN._run is not None
    return kl.PLAIN._run(*given)


@pytest.mark.usefixtures("heard")
def test_nothing_is_done_where_python_decides(heard: Heard) -> None:
    assert _found() is None  # nothing is kept yet
    for _ in range(2):
        F.kd_kl_div(torch.randn(4, 6), torch.randn(4, 6), 4.0)
    heard.clear()
    assert isinstance(_found(), torch.Tensor)
    assert len(heard) == 1
    in_memory = torch.ones(())
    for scale in ((in_memory, 4.0, None, None), (4.0, in_memory, None, None), (4, 4.0, None, None)):
        assert _found(_3=scale) is None
    assert _found(_0=(torch.randn(4, 7), torch.randn(4, 7))) is None
    assert len(heard) == 1


@pytest.mark.usefixtures("heard")
def test_whoever_listens_to_launches_hears_them() -> None:
    said: list[Any] = []
    for _ in range(2):
        _backward(LOSSES["kl"])
    knobs.runtime.launch_enter_hook.add(said.append)
    try:
        assert _found() is None
        with launching.count_launches() as counts:
            _backward(LOSSES["kl"])
        assert sum(counts.values()) == 2
    finally:
        knobs.runtime.launch_enter_hook.calls.clear()


@pytest.mark.usefixtures("heard")
def test_what_a_launch_raises_is_raised_and_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        _backward(LOSSES["kl"])

    def fails(*_: Any) -> None:
        raise RuntimeError("as the driver says")

    monkeypatch.setattr(Silent, "told", fails)
    with launching.count_launches() as counts, pytest.raises(RuntimeError, match="as the driver says"):
        _backward(LOSSES["kl"])
    assert not sum(counts.values())


@pytest.mark.usefixtures("heard")
def test_wrong_arguments_are_refused() -> None:
    run = kl.PLAIN._run
    assert run is not None
    with pytest.raises(TypeError, match="eight arguments are needed"):
        run()
    for at in ("_0", "_1", "_3", "_6"):
        with pytest.raises(TypeError, match="a tuple is needed"):
            _found(**{at: None})
    for at in ("_0", "_3"):
        with pytest.raises(TypeError, match="logits and four factors"):
            _found(**{at: ()})
    with pytest.raises(TypeError, match="unhashable"):
        _found(_7=[])
    with pytest.raises(KeyError, match="type"):
        extension.kept_rows({})


@pytest.mark.usefixtures("heard")
def test_nothing_is_held_after_a_call() -> None:
    for _ in range(3):
        _backward(LOSSES["weight and mask"])
    student, teacher = _rows()
    loss = F.kd_kl_div(student, teacher, 4.0)
    held = [weakref.ref(x) for x in (student, teacher, loss, loss.grad_fn)]
    loss.backward()
    held += [weakref.ref(student.grad), weakref.ref(teacher.grad)]  # type: ignore[arg-type]
    gc.disable()
    try:
        del student, teacher, loss
        assert [x() for x in held] == [None] * 6  # and no circle for the collector
    finally:
        gc.enable()


@pytest.mark.usefixtures("heard")
def test_threads_launch_side_by_side(heard: Heard) -> None:
    def many() -> None:
        for _ in range(50):
            _backward(LOSSES["kl"])

    with launching.count_launches():
        threads = [threading.Thread(target=many) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(heard) == 300

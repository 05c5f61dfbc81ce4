"""What a call costs on the host: everything but the kernel, in microseconds and beside ``torch.add``.

    python -m bench.hostbench [--repeat N] [--only NAME]

No GPU takes part. Tensors lie on the CPU and pass for a GPU's, Triton compiles and dispatches as it always does (for
sm_90), and the launcher at the very end does nothing. A GPU adds what the driver takes: 2 to 4 µs a launch. The machine
may be busy: the least of many short runs counts, and the ratio to ``torch.add`` in the same minute is what to compare.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, ClassVar, NamedTuple

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import kdfast
from kdfast import backend
from kdfast.functional import _checks
from kdfast.kernels import launch as launching
from kdfast.kernels import scratch


class _Utils:
    """What a compiled kernel asks of the driver when it is loaded."""

    @staticmethod
    def load_binary(*_: Any) -> tuple[int, int, int, int, int]:
        return 1, 2, 64, 0, 1024

    @staticmethod
    def unload_module(_: int) -> None:
        return None

    @staticmethod
    def get_device_properties(_: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}


class Silent:
    """Launchers that keep the last launch, and launch nothing."""

    _last: ClassVar[deque[tuple[str, tuple[Any, ...]]]] = deque([("", ())], maxlen=1)
    #: Is given (name of the kernel, the launcher's arguments) of each launch.
    told: ClassVar[Callable[[tuple[str, tuple[Any, ...]]], None]] = _last.append

    @staticmethod
    def made(src: Any, metadata: Any) -> Callable[..., None]:
        """One for a compiled kernel: a function, since what an object takes longer would be counted."""
        name = metadata.name

        def silent(*arguments: Any) -> None:
            Silent.told((name, arguments))

        return silent

    @classmethod
    def last(cls) -> tuple[Any, ...]:
        """(Name of the kernel, what its launcher was given…)."""
        ((name, arguments),) = cls._last
        return (name, *arguments)


class _Driver:
    """An H100 that is not there."""

    utils = _Utils()
    launcher_cls = staticmethod(Silent.made)
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_active_torch_device = staticmethod(lambda: torch.device("cpu"))
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))


@contextlib.contextmanager
def pretended() -> Iterator[None]:
    """CPU tensors pass for a GPU's inside the block; nothing is computed there."""
    replaced: list[tuple[Any, str, Any]] = [
        (driver, "_active", _Driver()),
        (torch.cuda, "is_current_stream_capturing", lambda: False),
        (launching, "_counters", {}),
        (launching, "_reductions", {}),
        (scratch, "_kept", {}),
        (backend, "interpreting", lambda: True),
    ]
    # Families import these by name: replaced wherever they went.
    answers = ((launching, "keeps", True), (launching, "_stream", 0), (_checks, "on_host", False))
    for home, name, answer in answers:
        original = getattr(home, name)
        for holder in [module for key, module in sys.modules.items() if key.startswith("kdfast")]:
            if getattr(holder, name, None) is original:
                replaced.append((holder, name, lambda *_, answer=answer: answer))
    before = [(holder, name, getattr(holder, name)) for holder, name, _ in replaced]
    for holder, name, value in replaced:
        setattr(holder, name, value)
    launching.forget()
    try:
        with kdfast.use_backend("triton"):
            yield
    finally:
        for holder, name, value in before:
            setattr(holder, name, value)
        launching.forget()


class Case(NamedTuple):
    """A row of the table.

    Attributes:
        name: What is called.
        target: Microseconds that it may take on a machine whose ``torch.add`` takes 0.9; None where none is set.
        launches: At most so many.
        make: The call, its tensors made.
    """

    name: str
    target: float | None
    launches: int
    make: Callable[[], Callable[[], object]]


def least(call: Callable[[], object], repeat: int) -> float:
    """The least time of a call in microseconds, over ``repeat`` short runs."""
    for _ in range(3):
        call()
    begin = time.perf_counter()
    call()
    runs = max(3, min(1000, int(0.003 / max(time.perf_counter() - begin, 1e-6))))
    best = float("inf")
    for _ in range(repeat):
        begin = time.perf_counter()
        for _ in range(runs):
            call()
        best = min(best, (time.perf_counter() - begin) / runs)
    return best * 1e6


def python_calls(call: Callable[[], object]) -> int:
    """How many functions of kdfast's a call enters: the part of its cost that no machine changes."""
    call()
    call()
    count = 0

    def entered(frame: FrameType, event: str, _: Any) -> None:
        nonlocal count
        if event == "call" and frame.f_globals.get("__name__", "").startswith("kdfast"):
            count += 1

    sys.setprofile(entered)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count


def main() -> None:
    """Print the table."""
    from bench.hostcases import CASES

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=60, help="short runs a case; the least counts")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    x = torch.empty(4)

    def add() -> torch.Tensor:
        return torch.add(x, x)

    print(f"{'call':40} {'µs':>7} {'target':>7} {'× torch.add':>12} {'launches':>9} {'calls':>6}")
    for case in CASES:
        if options.only not in case.name:
            continue
        with pretended():
            call = case.make()
            call()
            with launching.count_launches() as counts:
                call()
            mine, unit = least(call, options.repeat), least(add, options.repeat)
            calls, launches = python_calls(call), sum(counts.values())
        target = "–" if case.target is None else f"{case.target:.0f}"
        print(
            f"{case.name:40} {mine:7.1f} {target:>7} {mine / unit:12.1f} {launches:9} {calls:6}", flush=True
        )


if __name__ == "__main__":
    main()

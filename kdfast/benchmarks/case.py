"""What is measured: a case, its providers, and who could not take part."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

#: Takes a turn (which of the rotating inputs) and does the work once.
Work = Callable[[int], Any]


class Absent(Exception):
    """A provider cannot run here; the message says why."""


@dataclass(frozen=True)
class Traffic:
    """What a provider moves between memory and the device, by a formula that a reader can check.

    Attributes:
        formula: In N (elements of one operand) or S (bytes of one), as the kernel files count.
        num_bytes: The formula's value for this case.
    """

    formula: str
    num_bytes: float


@dataclass(frozen=True)
class Provider:
    """One implementation of a case.

    Attributes:
        name: In the table.
        build: Makes the work, its inputs included; raises :class:`Absent` where it cannot run.
        traffic: Bytes it moves, None where nobody counted.
        graph: Whether one call may be captured in a CUDA graph.
        config: How it was configured, where that matters for fairness (threads, options).
        against: Which of kdfast's own providers it is compared with: the one that is configured like it. Empty for a
            floor or a context, which does less than kdfast does and is no rival.
    """

    name: str
    build: Callable[[], Work]
    traffic: Traffic | None = None
    graph: bool = True
    config: str = ""
    against: str = "kdfast"


@dataclass(frozen=True)
class Case:
    """One row of work, done by several providers on the same inputs.

    Attributes:
        suite: One of :data:`kdfast.benchmarks.SUITES`.
        name: What is done.
        params: Sizes, for people and for matching rows of two runs.
        turns: Rotating inputs: turn ``i`` of every provider has the same input.
        providers: Who does it.
        check: Raises AssertionError if what turn 0 of a provider returned is wrong.
        items: What one call handles, e.g. 256 rows.
        unit: Of those items.
        working_set: Bytes that one turn touches.
        family: The family of kernels that it measures, a key of :data:`kdfast.benchmarks.FAMILIES`; empty for whole
            steps, epochs and data paths, which are of no single one.
    """

    suite: str
    name: str
    params: Mapping[str, Any]
    turns: int
    providers: tuple[Provider, ...]
    check: Callable[[str, Any], None]
    items: int = 1
    unit: str = "call"
    working_set: int = 0
    family: str = ""

    @property
    def key(self) -> str:
        """Names this case in results, across runs."""
        sizes = ", ".join(f"{name}={value}" for name, value in self.params.items())
        return f"{self.suite}/{self.name}[{sizes}]"


@dataclass(frozen=True)
class Settings:
    """How a run measures.

    Attributes:
        device: ``"cpu"`` or ``"cuda"``.
        quick: Fewer and smaller cases.
        samples: Timed samples of each provider.
        sample_seconds: A sample repeats the work until it takes at least this long.
        tiny: The smallest sizes, to see that everything runs; timings of such a run mean nothing.
    """

    device: str
    quick: bool = True
    samples: int = 15
    sample_seconds: float = 0.01
    tiny: bool = False

    def pick(self, tiny: Any, quick: Any, full: Any) -> Any:
        """One of three, by the size of the run."""
        return tiny if self.tiny else quick if self.quick else full


def peer(module: str) -> ModuleType:
    """Import a peer library.

    Raises:
        Absent: It is not installed, or is installed and cannot be imported; the reason is in the message.
    """
    name = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = str(error.name or "").partition(".")[0]
        what = (
            "is not installed"
            if missing == name
            else f"cannot be imported: it needs {missing}, which is missing"
        )
        raise Absent(f"{name} {what}") from error
    except Exception as error:  # a broken binary beside this torch raises anything at all
        reason = " ".join(str(error).split())[:160]
        raise Absent(f"{name} cannot be imported: {type(error).__name__}: {reason}") from error


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile`` with shapes of its own, as someone would use it for one shape."""
    import torch

    torch._dynamo.reset()  # an earlier case's shapes must not make this one dynamic
    return torch.compile(function, dynamic=False)

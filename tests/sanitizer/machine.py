"""What ``torch.cuda`` answers while kernels run on the semantics of their IR: one device, of a given capability."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

#: Multiprocessors of the GPUs that launch plans are made for: A100, H100, B200.
MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}


@dataclass(frozen=True)
class Properties:
    """As ``torch.cuda.get_device_properties`` gives them, in what plans and benchmarks read."""

    major: int
    minor: int
    multi_processor_count: int
    name: str = "semantics of the IR"
    total_memory: int = 80 << 30
    L2_cache_size: int = 50 << 20
    warp_size: int = 32
    gcnArchName: str = ""


class Stream:
    """The one stream: everything on it has already happened."""

    cuda_stream = 0
    device = torch.device("cuda", 0)

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def record_event(self, event: Any = None) -> Event:
        return event or Event()


class Event:
    """Already recorded, already over."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


def answers(capability: int) -> dict[str, Any]:
    """Replacements for attributes of ``torch.cuda``, for a device of this compute capability (90 for 9.0)."""
    try:
        count = MULTIPROCESSORS[capability]
    except KeyError:
        raise ValueError(f"capability: got {capability}; accepted: {sorted(MULTIPROCESSORS)}") from None
    properties = Properties(capability // 10, capability % 10, count)
    stream = Stream()
    return {
        "get_device_properties": lambda device=None: properties,
        "is_current_stream_capturing": lambda: False,
        "current_stream": lambda device=None: stream,
        "default_stream": lambda device=None: stream,
        "Stream": lambda *args, **kwargs: stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "Event": Event,
        "is_initialized": lambda: True,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: None,
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "get_sync_debug_mode": lambda: 0,
        "set_sync_debug_mode": lambda mode: None,
    }


def widened(product: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A matrix product that takes ``out_dtype`` as a GPU's does: half-precision operands, a result in float32."""

    def wide(*operands: torch.Tensor, out_dtype: torch.dtype | None = None, **options: Any) -> torch.Tensor:
        if out_dtype is not None:
            operands = tuple(x.to(out_dtype) for x in operands)
        return product(*operands, **options)

    return wide


def pretend(capability: int) -> Callable[[], None]:
    """Give ``torch.cuda`` those answers, and ``torch`` a GPU's products and pinned memory; returns what undoes it."""
    wanted: dict[tuple[Any, str], Any] = {
        (torch.cuda, name): answer for name, answer in answers(capability).items()
    }
    wanted |= {(torch, name): widened(getattr(torch, name)) for name in ("mm", "addmm")}
    # All memory is the host's; what a driver would lock is a copy, so that a write to either is not seen in the other.
    wanted |= {(torch.Tensor, "pin_memory"): lambda tensor, device=None: tensor.clone()}
    missing = object()
    before = {(owner, name): getattr(owner, name, missing) for owner, name in wanted}
    for (owner, name), answer in wanted.items():
        setattr(owner, name, answer)

    def undo() -> None:
        for (owner, name), value in before.items():
            if value is missing:
                delattr(owner, name)
            else:
                setattr(owner, name, value)

    return undo

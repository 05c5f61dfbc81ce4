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


def pretend(capability: int) -> Callable[[], None]:
    """Give ``torch.cuda`` those answers; returns what undoes it."""
    wanted = answers(capability)
    missing = object()
    before = {name: getattr(torch.cuda, name, missing) for name in wanted}
    for name, answer in wanted.items():
        setattr(torch.cuda, name, answer)

    def undo() -> None:
        for name, value in before.items():
            if value is missing:
                delattr(torch.cuda, name)
            else:
                setattr(torch.cuda, name, value)

    return undo

"""The machine that launch plans are made for: what of it decides beside the shape."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
from triton.runtime import driver


def triton_version() -> tuple[int, int]:
    """Triton's (major, minor): tile orders and cluster launches depend on it."""
    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


@dataclass(frozen=True)
class Machine:
    """What a plan depends on beside the shape.

    Attributes:
        capability: CUDA compute capability, 90 for 9.0; 0 for ROCm and for the interpreter.
        multiprocessors: Programs that run side by side at least.
        triton: Triton's (major, minor).
    """

    capability: int
    multiprocessors: int
    triton: tuple[int, int]


def machine_of(device: torch.device) -> Machine:
    """The machine behind ``device``; for ``meta`` tensors the target that is being compiled for."""
    if device.type == "cuda":
        return _cuda_machine(device.index if device.index is not None else torch.cuda.current_device())
    if device.type == "meta":
        arch = driver.active.get_current_target().arch
        return Machine(arch if isinstance(arch, int) else 0, 132, triton_version())
    return Machine(0, 1, triton_version())


@lru_cache(maxsize=64)
def _cuda_machine(index: int) -> Machine:
    properties = torch.cuda.get_device_properties(index)
    capability = 0 if torch.version.hip else properties.major * 10 + properties.minor
    return Machine(capability, properties.multi_processor_count, triton_version())

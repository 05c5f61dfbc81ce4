"""The machine that launch plans are made for: what of it decides beside the shape.

A GPU is what it is. The interpreter has one multiprocessor, so that a plan for few rows on many of them would never
run there: ``KDFAST_MACHINE=90:132`` in the environment, or :func:`use_machine`, plans its launches for another.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
from triton.runtime import driver

from .launch import forget


def triton_version() -> tuple[int, int]:
    """Triton's (major, minor), or the chosen machine's: tile orders and cluster launches depend on it."""
    return _installed_triton() if _chosen is None else _chosen.triton


@lru_cache(maxsize=1)
def _installed_triton() -> tuple[int, int]:
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

    @classmethod
    def parse(cls, text: str) -> Machine:
        """``"90:132"`` (capability, multiprocessors) or ``"90:132:3.6"`` (and Triton).

        Raises:
            ValueError: Any other text.
        """
        found = re.fullmatch(r"(\d+):([1-9]\d*)(?::(\d+)\.(\d+))?", text)
        if found is None:
            raise ValueError(
                f"KDFAST_MACHINE: got {text!r}; accepted: CAPABILITY:MULTIPROCESSORS, with :MAJOR.MINOR of Triton if "
                "it is not the installed one's (90:132, 90:132:3.6)"
            )
        capability, multiprocessors, major, minor = found.groups()
        version = _installed_triton() if major is None else (int(major), int(minor))
        return cls(int(capability), int(multiprocessors), version)


def _from_environment() -> Machine | None:
    text = os.environ.get("KDFAST_MACHINE", "")
    return Machine.parse(text) if text else None


_chosen: Machine | None = _from_environment()


def chosen_machine() -> Machine | None:
    """What the interpreter's launches are planned for, if it was said."""
    return _chosen


@contextlib.contextmanager
def use_machine(machine: Machine | str) -> Iterator[Machine]:
    """Plan the interpreter's launches for ``machine`` (as :meth:`Machine.parse` takes it) inside a block."""
    global _chosen
    wanted = Machine.parse(machine) if isinstance(machine, str) else machine
    before, _chosen = _chosen, wanted
    forget()
    try:
        yield wanted
    finally:
        _chosen = before
        forget()


def machine_of(device: torch.device) -> Machine:
    """The machine behind ``device``; for ``meta`` tensors the target that is being compiled for."""
    if device.type == "cuda":
        return _cuda_machine(device.index if device.index is not None else torch.cuda.current_device())
    if device.type == "meta":
        arch = driver.active.get_current_target().arch
        return Machine(arch if isinstance(arch, int) else 0, 132, triton_version())
    return _chosen or Machine(0, 1, _installed_triton())


@lru_cache(maxsize=64)
def _cuda_machine(index: int) -> Machine:
    properties = torch.cuda.get_device_properties(index)
    capability = 0 if torch.version.hip else properties.major * 10 + properties.minor
    return Machine(capability, properties.multi_processor_count, _installed_triton())

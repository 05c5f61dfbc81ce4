"""What a plan and a compiled kernel depend on of a call's arguments: the key under which a launch is kept.

``kdfast._C`` makes it where it was built, in a tenth of the time.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Hashable
from typing import Any

import torch

__all__ = ["extension", "launch_key"]


def python_key(whole: tuple[torch.Tensor | None, ...], kinds: tuple[Any, ...]) -> Hashable:
    """:data:`launch_key` without the extension."""
    return (
        tuple([None if x is None else (x.device, x.shape, x.stride(), _kind(x)) for x in whole]),
        tuple([_kind(x) for x in kinds]),
    )


def _kind(value: Any) -> Hashable:
    """What Triton compiles for: of an integer its width, whether 16 divides it, whether it is 1."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.dim() == 0, value.data_ptr() & 15
    if type(value) is not int:
        return type(value)
    width = 32 if -(2**31) <= value < 2**31 else 64 if -(2**63) <= value < 2**63 else 65
    return width, value & 15 == 0, value == 1


def _extension() -> Any:
    try:
        return importlib.import_module("kdfast._C")
    except ImportError:
        return None


#: ``kdfast._C``, or None where it was not built.
extension = _extension()
#: ``launch_key(whole, kinds)``: equal where plans and compiled kernels are. ``whole``: tensors (or None) whose device,
#: shape, strides, dtype and place within 16 bytes all count; ``kinds``: further arguments, of which only counts what a
#: kernel is compiled for: of a tensor its dtype, that place and whether it is 0-d, of a number or None its type.
launch_key: Callable[[tuple[Any, ...], tuple[Any, ...]], Hashable] = (
    python_key if extension is None else extension.launch_key_of(torch.Tensor)
)

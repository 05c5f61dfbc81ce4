"""The C++ extension where it was built: the references' fused loops are in it, and there is a way without each."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch

__all__ = ["PLAIN", "address", "extension"]

#: Classes of tensors whose memory is their own: no other (fake, distributed, of a subclass) is read by its address.
PLAIN = (torch.Tensor, torch.nn.Parameter)


@functools.cache
def extension() -> Any:
    """``kdfast._C``, or None where it was not built."""
    try:
        return importlib.import_module("kdfast._C")
    except ImportError:
        return None


def address(tensor: torch.Tensor | None) -> int:
    """Where a tensor's elements begin; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()

"""The logits in whatever a network returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = ["logits_of"]

#: What libraries call them: 🤗 Transformers, torchvision's segmentation networks.
_NAMES = ("logits", "out")


def logits_of(output: Any) -> Tensor:
    """A network's logits.

    Args:
        output: A tensor; a dict with ``logits`` (🤗) or ``out`` (torchvision's segmentation networks), else its first
            value; an object with ``.logits``; a tuple or list that begins with them.

    Raises:
        TypeError: There is no tensor in that place.
    """
    found = output
    if isinstance(found, Mapping):
        name = next((name for name in _NAMES if name in found), None)
        found = found[name] if name is not None else next(iter(found.values()), None)
    elif not isinstance(found, Tensor) and isinstance(getattr(found, "logits", None), Tensor):
        found = found.logits
    while isinstance(found, (tuple, list)) and found:
        found = found[0]
    if not isinstance(found, Tensor):
        raise TypeError(
            f"output: got {type(output).__name__}; a tensor is needed, or a dict, tuple or object with logits"
        )
    return found

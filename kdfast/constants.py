"""A few numbers as a tensor on a device, copied there once.

``torch.tensor([...], device="cuda")`` copies from host memory that is not pinned, and so waits for everything that the
GPU still has to do. What is needed in every step is made once and kept.
"""

from __future__ import annotations

import threading

import torch

__all__ = ["constant"]

#: Kept at most: a caller with new numbers in every step waits in every step, and does not fill memory.
LIMIT = 4096

_kept: dict[tuple[tuple[float, ...], torch.dtype, torch.device], torch.Tensor] = {}
_lock = threading.Lock()


def constant(
    values: tuple[float, ...], device: torch.device | str, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """``values`` as a 1-d tensor; the same one for the same call. Not to be written to.

    Nothing is ever dropped: a captured CUDA graph reads its constants where they lay when it was captured.
    """
    device = torch.device(device)
    if torch.compiler.is_compiling():
        return torch.tensor(values, dtype=dtype, device=device)
    key = (values, dtype, device)
    found = _kept.get(key)
    if found is None:
        with torch.inference_mode(False):  # what is kept must serve calls that record gradients, too
            found = torch.tensor(values, dtype=dtype, device=device)
        if len(_kept) < LIMIT:
            with _lock:
                found = _kept.setdefault(key, found)
    return found

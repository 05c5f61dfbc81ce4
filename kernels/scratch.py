"""Memory that one launch leaves to the next."""

from __future__ import annotations

import torch

from .launch import MAX_PARTIALS, _lasting, _stream

_kept: dict[tuple[int | None, int], torch.Tensor] = {}


def scratch(device: torch.device, count: int) -> torch.Tensor:
    """float32 memory, at least ``count``, for what a launch leaves to the next one on its stream.

    It is kept for the stream's later launches, which begin after that one: to make memory takes as long as to launch.
    Nothing that a backward needs may lie in it.
    """
    if count > MAX_PARTIALS or not _lasting(device):
        return torch.empty(count, dtype=torch.float32, device=device)
    key = (device.index, _stream(device))
    found = _kept.get(key)
    if found is None or found.numel() < count:
        size = 1 << (count - 1).bit_length()
        found = _kept[key] = torch.empty(size, dtype=torch.float32, device=device)
    return found

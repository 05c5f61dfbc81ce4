"""What the loop asks of a batch and of the thing that yields batches; loss and speed between two log lines."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch


class Window:
    """Loss and speed since the last line of the log; the loss stays on the device until then."""

    def __init__(self, device: torch.device) -> None:
        self.note = ""
        self._loss = torch.zeros((), device=device)
        self._steps, self._images, self._since = 0, 0, time.monotonic()

    def add(self, loss: torch.Tensor, images: int) -> None:
        """Count one optimiser step and its loss, without waiting for the device."""
        self._loss += loss
        self._steps += 1
        self._images += images

    def close(self) -> tuple[float, float]:
        """Mean loss and images a second since the last call."""
        loss = float(self._loss) / self._steps
        speed = self._images / max(time.monotonic() - self._since, 1e-9)
        self._loss.zero_()
        self._steps, self._images, self._since = 0, 0, time.monotonic()
        return loss, speed


def resumable(batches: Any) -> bool:
    """Whether it can say, and be told, which batch comes next."""
    return hasattr(batches, "state_dict") and hasattr(batches, "load_state_dict")


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch's tensors on the device, whatever they are nested in."""
    from accelerate.utils import send_to_device

    return send_to_device(batch, device, non_blocking=True)


def count_images(batch: Any) -> int:
    """Rows of the first tensor in a batch."""
    if isinstance(batch, torch.Tensor):
        return len(batch) if batch.dim() else 0
    entries = batch.values() if isinstance(batch, Mapping) else batch
    return count_images(next(iter(entries))) if isinstance(batch, (Mapping, list, tuple)) else 0

"""What the loop asks of a batch and of the thing that yields batches; means and speed between two log lines."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch

Loss = torch.Tensor | tuple[torch.Tensor, Mapping[str, torch.Tensor]]


class Window:
    """Mean loss, its parts, and speed since the last line of the log; they stay on the device until then."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._restart()

    def _restart(self) -> None:
        self._sums: dict[str, torch.Tensor] = {"loss": torch.zeros((), device=self._device)}
        self._counts = {"loss": 0}
        self._images, self._since = 0, time.monotonic()

    def add(self, loss: torch.Tensor, images: int, parts: Mapping[str, torch.Tensor] | None = None) -> None:
        """Count one optimiser step, its loss and its parts, without waiting for the device."""
        for name, value in {"loss": loss, **(parts or {})}.items():
            self._sums[name] = self._sums.get(name, 0) + value
            self._counts[name] = self._counts.get(name, 0) + 1
        self._images += images

    def finite(self) -> bool:
        """Whether the losses since the last call of :meth:`close` are all numbers."""
        return bool(torch.isfinite(self._sums["loss"]))

    def close(self) -> tuple[float, float, dict[str, float]]:
        """Mean loss, images a second, and the mean of each part, since the last call."""
        # One wait for the device, however many parts there are.
        sums = torch.stack([value.double() for value in self._sums.values()]).tolist()
        means = {name: total / self._counts[name] for name, total in zip(self._sums, sums)}
        speed = self._images / max(time.monotonic() - self._since, 1e-9)
        self._restart()
        return means.pop("loss"), speed, means


def split_loss(result: Loss) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A step's result as the loss to minimise, and its parts, detached, to log."""
    if isinstance(result, torch.Tensor):
        return result, {}
    loss, parts = result
    return loss, {name: value.detach().float() for name, value in parts.items()}


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

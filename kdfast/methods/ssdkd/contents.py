"""What the buffer holds, by class and by difficulty; for segmentation by pixel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdfast.functional import KDStatistics
from kdfast.methods.ssdkd.config import SSDKDConfig
from kdfast.replay import modulation

#: Bins of the teacher's probability of its prediction, over [0, 1] (Fig. 2a).
BINS = 20


class Contents:
    """Histograms of each row's predictions, added up when they are asked for.

    A row of a classifier's counts once, a row of a segmentation network's once a pixel.

    Args:
        capacity: Rows.
        num_classes: Classes.
        device: Where it lives.
    """

    def __init__(self, capacity: int, num_classes: int, device: torch.device) -> None:
        self._classes = torch.zeros(capacity, num_classes, dtype=torch.int32, device=device)
        self._bins = torch.zeros(capacity, BINS, dtype=torch.int32, device=device)

    def insert(self, index: Tensor, predicted: Tensor, probability: Tensor) -> None:
        """Set rows.

        Args:
            index: int64 ``[n]``, the rows; what they held before is gone.
            predicted: int64 ``[n, …]``, the teacher's classes.
            probability: float, of the same shape.
        """
        rows = len(index)
        bins = (probability.reshape(rows, -1) * BINS).long().clamp(0, BINS - 1)
        for table, values in ((self._classes, predicted.reshape(rows, -1)), (self._bins, bins)):
            counted = torch.zeros(rows, table.shape[1], dtype=torch.int32, device=table.device)
            counted.scatter_add_(1, values, torch.ones_like(values, dtype=torch.int32))
            table[index] = counted

    def class_counts(self) -> Tensor:
        """int64 ``[num_classes]``."""
        return self._classes.sum(0)

    def difficulty_counts(self) -> Tensor:
        """int64 ``[BINS]``, from what the teacher is unsure of to what it is sure of."""
        return self._bins.sum(0)

    def phi(self, scores: KDStatistics, config: SSDKDConfig) -> Tensor:
        """φ of samples (or pixels) by what the buffer holds now, of the shape of their scores (Eq. 3)."""
        counts = (
            self.class_counts() if config.diversity else torch.zeros_like(self._classes[0], dtype=torch.int64)
        )
        gamma = config.gamma if config.difficulty else 0.0
        return modulation(scores.teacher_prob, scores.teacher_class, counts, counts.sum(), gamma)

    def state_dict(self) -> dict[str, Any]:
        """Copies of both tables."""
        return {"classes": self._classes.clone(), "bins": self._bins.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put them back."""
        self._classes.copy_(state["classes"])
        self._bins.copy_(state["bins"])


def per_image(values: Tensor) -> Tensor:
    """One value an image: of pixels their mean."""
    return values.flatten(1).mean(1) if values.dim() > 1 else values

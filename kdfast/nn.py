"""Losses as modules: a few lines over :mod:`kdfast.functional`."""

from __future__ import annotations

import torch
from torch import nn

from kdfast.functional import kd_kl_div
from kdfast.functional.losses import Reduction

__all__ = ["KDLoss"]


class KDLoss(nn.Module):
    """:func:`kdfast.functional.kd_kl_div` with its options fixed.

    Args:
        temperature: T > 0.
        dim: The class dimension.
        reduction: As in :func:`~kdfast.functional.kd_kl_div`.

    Shape:
        Two tensors of logits of one shape → a 0-d tensor (for ``reduction="none"``, one value a row).
    """

    def __init__(
        self, temperature: float = 1.0, *, dim: int = -1, reduction: Reduction = "batchmean"
    ) -> None:
        super().__init__()
        self.temperature, self.dim, self.reduction = temperature, dim, reduction

    def forward(
        self,
        student: torch.Tensor,
        teacher: torch.Tensor,
        row_weight: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The loss of these logits; see :func:`~kdfast.functional.kd_kl_div`."""
        return kd_kl_div(
            student,
            teacher,
            self.temperature,
            dim=self.dim,
            reduction=self.reduction,
            row_weight=row_weight,
            mask=mask,
        )

    def extra_repr(self) -> str:
        """The options."""
        return f"temperature={self.temperature}, dim={self.dim}, reduction={self.reduction!r}"

"""Losses as modules: a few lines over :mod:`kdfast.functional`."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
from torch import nn

from kdfast.functional import distillation_loss, kd_kl_div
from kdfast.functional.losses import Reduction, reduction_divisor

__all__ = ["DistillationLoss", "KDLoss"]


class KDLoss(nn.Module):
    """:func:`kdfast.functional.kd_kl_div` with its options fixed.

    Args:
        temperature: T > 0.
        dim: The class dimension.
        reduction: As in :func:`~kdfast.functional.kd_kl_div`.
        process_group: Ranks whose batches count as one: the divisor becomes the mean of the ranks' divisors, so
            that DistributedDataParallel, which averages gradients over ranks, yields the gradient of the whole
            batch even where ranks hold different numbers of rows. ``torch.distributed.group.WORLD`` for all ranks;
            None (the default) for each rank on its own. Costs one all-reduce of a number.

    Shape:
        Two tensors of logits of one shape → a 0-d tensor (for ``reduction="none"``, one value a row).
    """

    def __init__(
        self,
        temperature: float = 1.0,
        *,
        dim: int = -1,
        reduction: Reduction = "batchmean",
        process_group: Any = None,
    ) -> None:
        super().__init__()
        self.temperature, self.dim, self.reduction = temperature, dim, reduction
        self.process_group = process_group

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
            divisor=self._mean_divisor(student, mask),
        )

    def _mean_divisor(self, student: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor | None:
        if self.process_group is None or self.reduction in ("sum", "none"):
            return None
        own = reduction_divisor(self.reduction, student, self.dim % student.dim(), mask)
        total = torch.zeros((), dtype=torch.float32, device=student.device) + own
        torch.distributed.all_reduce(total, group=self.process_group)
        # Nothing unmasked on any rank: a loss of 0, not 0/0.
        return total.clamp_(min=1.0) / torch.distributed.get_world_size(self.process_group)

    def extra_repr(self) -> str:
        """The options."""
        return f"temperature={self.temperature}, dim={self.dim}, reduction={self.reduction!r}"


class DistillationLoss(nn.Module):
    """:func:`kdfast.functional.distillation_loss` with its options fixed.

    Args:
        temperature: T > 0.
        kd_weight: Factor of the distillation term.
        ce_weight: Factor of the cross-entropy.
        label_smoothing: Share of the target spread evenly over the classes.
        ignore_index: Target of rows without cross-entropy.
        dim: The class dimension.
        reduction: As in :func:`~kdfast.functional.distillation_loss`.

    Shape:
        Two tensors of logits of one shape, and classes of that shape without ``dim`` → a 0-d tensor (for
        ``reduction="none"``, one value a row).
    """

    def __init__(
        self,
        temperature: float,
        *,
        kd_weight: float = 1.0,
        ce_weight: float = 1.0,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        dim: int = -1,
        reduction: Reduction = "batchmean",
    ) -> None:
        super().__init__()
        self.temperature, self.kd_weight, self.ce_weight = temperature, kd_weight, ce_weight
        self.label_smoothing, self.ignore_index = label_smoothing, ignore_index
        self.dim, self.reduction = dim, reduction

    def forward(
        self,
        student: torch.Tensor,
        teacher: torch.Tensor,
        target: torch.Tensor | None = None,
        *,
        mixed_target: torch.Tensor | None = None,
        lam: float | torch.Tensor | None = None,
        row_weight: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The loss of these logits; see :func:`~kdfast.functional.distillation_loss`."""
        return distillation_loss(
            student,
            teacher,
            target,
            temperature=self.temperature,
            kd_weight=self.kd_weight,
            ce_weight=self.ce_weight,
            label_smoothing=self.label_smoothing,
            mixed_target=mixed_target,
            lam=lam,
            ignore_index=self.ignore_index,
            dim=self.dim,
            reduction=self.reduction,
            row_weight=row_weight,
            mask=mask,
        )

    def extra_repr(self) -> str:
        """The options."""
        return (
            f"temperature={self.temperature}, kd_weight={self.kd_weight}, ce_weight={self.ce_weight}, "
            f"label_smoothing={self.label_smoothing}, dim={self.dim}, reduction={self.reduction!r}"
        )

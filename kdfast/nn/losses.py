"""Losses of logits as modules."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from kdfast.functional import (
    dist_loss,
    distillation_loss,
    dkd_loss,
    fused_linear_kd_loss,
    kd_kl_div,
    topk_kd_loss,
)
from kdfast.functional._reduction import Reduction, reduction_divisor
from kdfast.functional.divergence import Kind
from kdfast.functional.topk import Tail
from kdfast.nn.fixed import Fixed, Rows

__all__ = [
    "DISTLoss",
    "DKDLoss",
    "DistillationLoss",
    "FusedLinearKDLoss",
    "KDLoss",
    "TopKKDLoss",
]


class KDLoss(Fixed):
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

    apart = ("process_group",)

    def __init__(
        self,
        temperature: float = 1.0,
        *,
        dim: int = -1,
        reduction: Reduction = "batchmean",
        process_group: Any = None,
    ) -> None:
        super().__init__(locals())
        self.process_group = process_group

    def forward(self, student: Tensor, teacher: Tensor, row_weight: Rows = None, mask: Rows = None) -> Tensor:
        """The loss of these logits; see :func:`~kdfast.functional.kd_kl_div`."""
        return kd_kl_div(
            student,
            teacher,
            row_weight=row_weight,
            mask=mask,
            divisor=self._mean_divisor(student, mask),
            **self.options,
        )

    def _mean_divisor(self, student: Tensor, mask: Rows) -> Rows:
        if self.process_group is None or self.reduction in ("sum", "none"):
            return None
        own = reduction_divisor(self.reduction, student, self.dim % student.dim(), mask)
        total = torch.zeros((), dtype=torch.float32, device=student.device) + own
        torch.distributed.all_reduce(total, group=self.process_group)
        # Nothing unmasked on any rank: a loss of 0, not 0/0.
        return total.clamp_(min=1.0) / torch.distributed.get_world_size(self.process_group)


class DistillationLoss(Fixed):
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

    hidden = ("ignore_index",)

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
        super().__init__(locals())

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        target: Rows = None,
        *,
        mixed_target: Rows = None,
        lam: float | Rows = None,
        row_weight: Rows = None,
        mask: Rows = None,
    ) -> Tensor:
        """The loss of these logits; see :func:`~kdfast.functional.distillation_loss`."""
        return distillation_loss(
            student,
            teacher,
            target,
            mixed_target=mixed_target,
            lam=lam,
            row_weight=row_weight,
            mask=mask,
            **self.options,
        )


class DKDLoss(Fixed):
    """:func:`kdfast.functional.dkd_loss` with its options fixed.

    Args:
        alpha: Weight of the target-class part.
        beta: Weight of the non-target part.
        temperature: T > 0.
        ignore_index: Rows with this target do not count.
        dim: The class dimension.
        reduction: As in :func:`~kdfast.functional.kd_kl_div`.

    Shape:
        Two tensors of logits of one shape, and int64 targets without the class dimension → a 0-d tensor (for
        ``reduction="none"``, one value a row).
    """

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        *,
        ignore_index: int = -100,
        dim: int = -1,
        reduction: Reduction = "batchmean",
    ) -> None:
        super().__init__(locals())

    def forward(
        self, student: Tensor, teacher: Tensor, target: Tensor, row_weight: Rows = None, mask: Rows = None
    ) -> Tensor:
        """The loss of these logits; see :func:`~kdfast.functional.dkd_loss`."""
        return dkd_loss(student, teacher, target, row_weight=row_weight, mask=mask, **self.options)


class TopKKDLoss(Fixed):
    """:func:`kdfast.functional.topk_kd_loss` with its options fixed.

    Args:
        temperature: T > 0.
        tail: ``"bucket"`` or ``"renormalize"``.
        reduction: As in :func:`~kdfast.functional.kd_kl_div`.

    Shape:
        Student logits ``[..., V]``, class indices and teacher logits ``[..., k]``, and optionally the teacher's
        log-sum-exp ``[...]`` → a 0-d tensor (for ``reduction="none"``, one value a row).
    """

    def __init__(
        self, temperature: float = 1.0, *, tail: Tail = "bucket", reduction: Reduction = "batchmean"
    ) -> None:
        super().__init__(locals())

    def forward(
        self,
        student: Tensor,
        indices: Tensor,
        logits: Tensor,
        log_normalizer: Rows = None,
        row_weight: Rows = None,
        mask: Rows = None,
    ) -> Tensor:
        """The loss of these logits; see :func:`~kdfast.functional.topk_kd_loss`."""
        return topk_kd_loss(
            student,
            indices,
            logits,
            log_normalizer=log_normalizer,
            row_weight=row_weight,
            mask=mask,
            **self.options,
        )


class DISTLoss(Fixed):
    """:func:`kdfast.functional.dist_loss` with its options fixed.

    Args:
        beta: Weight of the inter-class term.
        gamma: Weight of the intra-class term.
        temperature: T > 0.
        dim: The class dimension.

    Shape:
        Two tensors of logits of one shape → a 0-d tensor.
    """

    def __init__(
        self, beta: float = 1.0, gamma: float = 1.0, temperature: float = 1.0, *, dim: int = -1
    ) -> None:
        super().__init__(locals())

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of these logits; see :func:`~kdfast.functional.dist_loss`."""
        return dist_loss(student, teacher, **self.options)


class FusedLinearKDLoss(Fixed):
    """:func:`kdfast.functional.fused_linear_kd_loss` with its options fixed.

    Args:
        temperature: T > 0.
        kind: Which divergence, as in :func:`~kdfast.functional.divergence_loss`.
        teacher_temperature: Of the teacher; None: the same.
        beta: β of ``"jsd"`` and ``"ab"``.
        alpha: α of the skew divergences, of ``"alpha"`` and of ``"ab"``.
        kd_weight: Factor of the divergence.
        ce_weight: Factor of the cross-entropy.
        ignore_index: Rows with this target have no cross-entropy.
        label_smoothing: Share of the target spread evenly over the classes.
        softcap: c of c·tanh(x/c) of the student's logits, or None.
        teacher_softcap: The same of the teacher's.
        chunk_rows: Rows whose logits are alive at a time; None chooses.
        reduction: ``"batchmean"``, ``"mean"``, ``"sum"`` or ``"rowmean"``.

    Shape:
        Hidden states ``[..., H]`` and the head ``nn.Linear(H, V)`` of the student, then of the teacher (None: the
        student's own), and int64 targets ``[...]`` → a 0-d tensor.
    """

    def __init__(
        self,
        temperature: float = 1.0,
        *,
        kind: Kind = "forward_kl",
        teacher_temperature: float | None = None,
        beta: float = 0.5,
        alpha: float = 0.5,
        kd_weight: float = 1.0,
        ce_weight: float = 0.0,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        softcap: float | None = None,
        teacher_softcap: float | None = None,
        chunk_rows: int | None = None,
        reduction: Reduction = "batchmean",
    ) -> None:
        super().__init__(locals())

    def forward(
        self,
        student_hidden: Tensor,
        student_head: nn.Linear,
        teacher_hidden: Tensor,
        teacher_head: nn.Linear | None = None,
        row_weight: Rows = None,
        mask: Rows = None,
        target: Rows = None,
    ) -> Tensor:
        """The loss of these heads; see :func:`~kdfast.functional.fused_linear_kd_loss`. The teacher is detached."""
        weight, bias = (None, None) if teacher_head is None else (teacher_head.weight, teacher_head.bias)
        return fused_linear_kd_loss(
            student_hidden,
            student_head.weight,
            teacher_hidden.detach(),
            None if weight is None else weight.detach(),
            target=target,
            student_bias=student_head.bias,
            teacher_bias=None if bias is None else bias.detach(),
            row_weight=row_weight,
            mask=mask,
            **self.options,
        )

"""Mixed images and the task loss of what they show, for methods that learn from labels too."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kdfast.data.augment import cutmix as cut
from kdfast.data.augment import mixup as blend

__all__ = ["MixedBatch", "mix_batch", "task_loss"]


class MixedBatch(NamedTuple):
    """Images, and whose labels they have.

    Attributes:
        images: ``[B, C, H, W]``.
        partner: int64 ``[B]``, the row each was mixed with; None where nothing was mixed.
        lam: float32 ``[B]``, the share of the row's own image.
    """

    images: Tensor
    partner: Tensor | None = None
    lam: Tensor | None = None


def mix_batch(
    images: Tensor, target: Tensor | None = None, *, mixup: float | None = None, cutmix: float | None = None
) -> MixedBatch:
    """Mix a batch by one λ ~ Beta(α, α); with both kinds given, by one of them at even odds, as timm does.

    Random numbers follow from torch's global CPU generator, so that a resumed run draws the same, and no device is
    waited for.

    Args:
        images: Floating point ``[B, C, H, W]``.
        target: Only looked at: masks cannot be mixed.
        mixup: α of blending, or None for none.
        cutmix: α of boxes, or None for none.

    Raises:
        ValueError: ``target`` are masks, and mixing was asked for.
    """
    if mixup is None and cutmix is None:
        return MixedBatch(images)
    if target is not None and target.dim() > 1:
        raise ValueError(
            f"mixup_alpha, cutmix_alpha: got targets of shape {tuple(target.shape)}; dense targets are not mixed"
        )
    draws = torch.randint(2**62, (2,))
    generator = torch.Generator(images.device).manual_seed(int(draws[0]))
    boxes = cutmix is not None and (mixup is None or bool(draws[1] % 2))
    if boxes and cutmix is not None:
        return MixedBatch(*cut(images, generator, alpha=cutmix, one_box=True))
    if mixup is None:
        return MixedBatch(images)
    return MixedBatch(*blend(images, generator, alpha=mixup, one_share=True))


def task_loss(
    logits: Tensor,
    target: Tensor,
    mixed: MixedBatch | None = None,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = 255,
) -> Tensor:
    """Cross-entropy with the labels, of mixed images with both, by their shares.

    Args:
        logits: ``[B, C]``, or dense ``[B, C, h, w]``, which are resized to the masks (bilinear).
        target: int64 ``[B]``, or masks ``[B, H, W]``.
        mixed: What the images are made of.
        label_smoothing: As in ``F.cross_entropy``.
        ignore_index: Of masks: pixels that do not count.

    Returns:
        A 0-d tensor, at least float32.
    """
    scores = logits if logits.dtype == torch.float64 else logits.float()
    if target.dim() == 3:
        if scores.shape[-2:] != target.shape[-2:]:
            scores = F.interpolate(scores, size=target.shape[-2:], mode="bilinear", align_corners=False)
        return F.cross_entropy(scores, target, ignore_index=ignore_index, label_smoothing=label_smoothing)
    if mixed is None or mixed.partner is None or mixed.lam is None:
        return F.cross_entropy(scores, target, label_smoothing=label_smoothing)
    own = F.cross_entropy(scores, target, reduction="none", label_smoothing=label_smoothing)
    other = F.cross_entropy(scores, target[mixed.partner], reduction="none", label_smoothing=label_smoothing)
    return (mixed.lam * own + (1 - mixed.lam) * other).mean()

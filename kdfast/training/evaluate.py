"""Accuracy of a network: top-1 and top-5 for classification, mean IoU for segmentation (torchmetrics)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from kdfast.errors import DataError, require

Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]


@torch.no_grad()
def evaluate_classification(
    model: nn.Module,
    batches: Batches,
    *,
    num_classes: int,
    device: str | torch.device = "cpu",
    observe: Callable[[torch.Tensor], None] | None = None,
) -> dict[str, float]:
    """Share of images whose label is the highest, or among the five highest, of the network's outputs.

    In a distributed run every rank must call it with its own share of the batches; all get the result over all.

    Args:
        model: Takes float images ``[B, C, H, W]``, returns logits ``[B, num_classes]``. Its mode is restored.
        batches: Pairs of images and int64 labels ``[B]``.
        num_classes: Classes of the network.
        device: Where the network is.
        observe: Sees the logits of each batch.

    Returns:
        ``accuracy`` and, from six classes on, ``top5_accuracy``, as fractions in [0, 1].

    Raises:
        DataError: No batch came, or a label is not in ``[0, num_classes)``.
    """
    metrics = require("torchmetrics.classification", extra="train", feature="evaluation")
    tops = {"accuracy": 1, "top5_accuracy": 5} if num_classes > 5 else {"accuracy": 1}
    counters = {
        name: metrics.MulticlassAccuracy(num_classes, average="micro", top_k=k, validate_args=False).to(
            device
        )
        for name, k in tops.items()
    }

    def update(logits: torch.Tensor, labels: torch.Tensor) -> None:
        for counter in counters.values():
            counter.update(logits.float(), labels)
        if observe is not None:
            observe(logits)

    _run(model, batches, num_classes, device, update, ignore_index=None)
    return {name: float(counter.compute()) for name, counter in counters.items()}


@torch.no_grad()
def class_accuracies(
    model: nn.Module, batches: Batches, *, num_classes: int, device: str | torch.device = "cpu"
) -> list[float]:
    """Share of each class's images that the network gets right; see :func:`evaluate_classification`.

    Returns:
        ``num_classes`` fractions; NaN for a class without images.
    """
    metrics = require("torchmetrics.classification", extra="train", feature="evaluation")
    confusion = metrics.MulticlassConfusionMatrix(num_classes, validate_args=False).to(device)

    def update(logits: torch.Tensor, labels: torch.Tensor) -> None:
        confusion.update(logits.float().argmax(1), labels)

    _run(model, batches, num_classes, device, update, ignore_index=None)
    matrix = confusion.compute().double()
    shares: list[float] = (matrix.diagonal() / matrix.sum(1)).tolist()
    return shares


@torch.no_grad()
def evaluate_segmentation(
    model: nn.Module,
    batches: Batches,
    *,
    num_classes: int,
    ignore_index: int = 255,
    device: str | torch.device = "cpu",
) -> dict[str, float]:
    """Mean over classes of intersection over union, from one confusion matrix over all pixels.

    Args:
        model: Takes float images ``[B, C, H, W]``, returns logits ``[B, num_classes, H', W']``, which are
            resized to the masks. Its mode is restored.
        batches: Pairs of images and int64 masks ``[B, H, W]``.
        num_classes: Classes of the network. Those that neither mask nor prediction hold are left out of the mean.
        ignore_index: Pixels of this label do not count.
        device: Where the network is.

    Returns:
        ``miou`` and ``pixel_accuracy``, as fractions in [0, 1].

    Raises:
        DataError: No batch came, or a label is not in ``[0, num_classes)`` nor ``ignore_index``.
    """
    metrics = require("torchmetrics.classification", extra="train", feature="evaluation")
    confusion = metrics.MulticlassConfusionMatrix(
        num_classes, ignore_index=ignore_index, validate_args=False
    ).to(device)

    def update(logits: torch.Tensor, masks: torch.Tensor) -> None:
        if logits.shape[-2:] != masks.shape[-2:]:
            logits = nn.functional.interpolate(
                logits, size=masks.shape[-2:], mode="bilinear", align_corners=False
            )
        confusion.update(logits.argmax(1), masks)

    _run(model, batches, num_classes, device, update, ignore_index=ignore_index)
    matrix = confusion.compute().double()
    hits = matrix.diagonal()
    union = matrix.sum(0) + matrix.sum(1) - hits
    present = union > 0
    return {
        "miou": float((hits[present] / union[present]).mean()),
        "pixel_accuracy": float(hits.sum() / matrix.sum()),
    }


def _run(
    model: nn.Module,
    batches: Batches,
    num_classes: int,
    device: str | torch.device,
    update: Any,
    *,
    ignore_index: int | None,
) -> None:
    was_training = model.training
    model.eval()
    seen = 0
    try:
        for images, labels in batches:
            labels = labels.to(device)
            counted = labels if ignore_index is None else labels[labels != ignore_index]
            if counted.numel() and (int(counted.min()) < 0 or int(counted.max()) >= num_classes):
                raise DataError(
                    f"labels: got {int(counted.min())}…{int(counted.max())}, accepted: 0…{num_classes - 1} "
                    f"(the network has {num_classes} classes)"
                )
            update(model(images.to(device)), labels)
            seen += len(labels)
    finally:
        model.train(was_training)
    # With more ranks than batches a rank may see none; torchmetrics still sums over all of them.
    if not seen and not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise DataError("evaluation: the data held no images")

"""Networks that compute their task's loss themselves: torchvision's detectors, 🤗 Transformers', MMDetection's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "asked_for_loss",
    "boxes_mask",
    "check_sizes",
    "foreground_of",
    "is_supervised",
    "own_loss",
    "pixels_of",
    "run",
    "transformed",
]

_SIZES = ("min_size", "max_size", "size_divisible", "fixed_size")
#: What of a batch is for the student's loss alone: 🤗's targets, and that MMDetection's networks compute a loss.
_FOR_THE_LOSS = ("labels", "mode")


def is_supervised(images: Any, target: Any) -> bool:
    """Whether a batch goes into a network with its targets: keywords, or a list of dicts (torchvision)."""
    if isinstance(images, Mapping):
        return True
    return isinstance(target, (tuple, list)) and bool(target) and isinstance(target[0], Mapping)


def run(network: nn.Module, images: Any, target: Any = None) -> Any:
    """A pass of a network over images ``[B, C, H, W]``, a list of them, or keywords; with targets if there are any.

    Keywords hold their targets themselves: 🤗's ``labels`` and MMDetection's ``mode`` are left out without ``target``.
    """
    if isinstance(images, Mapping):
        return network(
            **{
                name: value
                for name, value in images.items()
                if name not in _FOR_THE_LOSS or target is not None
            }
        )
    return network(images) if target is None else network(images, target)


def asked_for_loss(images: Any) -> Any:
    """What of keywords makes a student compute its loss, if anything does: 🤗's ``labels``, MMDetection's ``mode``."""
    if not isinstance(images, Mapping):
        return None
    return next((images[name] for name in _FOR_THE_LOSS if images.get(name) is not None), None)


def pixels_of(batch: Mapping[str, Any]) -> Any:
    """The images among keywords, as 🤗 (``pixel_values``) and MMDetection (``inputs``) name them; None without."""
    return batch.get("pixel_values", batch.get("inputs"))


def own_loss(output: Any) -> Tensor:
    """The loss in what a network returned: the sum of a dict of losses, or ``.loss``.

    A dict's values may be lists of losses, a level each (MMDetection), whose entries without "loss" in their name are
    measures where others have it.

    Raises:
        TypeError: There is none.
    """
    found = output
    if isinstance(output, Mapping) and "loss" not in output:
        named = [value for name, value in output.items() if "loss" in str(name)]
        values: list[Any] = []
        for value in named or output.values():
            values += value if isinstance(value, (list, tuple)) else [value]
        if values and all(isinstance(value, Tensor) and (value.dim() == 0 or named) for value in values):
            return torch.stack([value.mean() for value in values]).sum()
        found = None
    elif isinstance(output, Mapping):
        found = output["loss"]
    else:
        found = getattr(output, "loss", None)
    if isinstance(found, Tensor):
        return found
    raise TypeError(
        f"student: returned a {type(output).__name__} without a loss; torchvision's detectors compute one in training "
        "mode, 🤗 models where the batch has labels, MMDetection's where it has mode='loss'"
    )


def check_sizes(student: nn.Module, teacher: nn.Module) -> None:
    """Refuse torchvision detectors that would see a batch in two sizes.

    Raises:
        ValueError: They resize to different sizes, or the student draws one of several.
    """
    own, other = (getattr(network, "transform", None) for network in (student, teacher))
    if not all(hasattr(transform, "min_size") for transform in (own, other)):
        return
    sizes = [{name: getattr(transform, name, None) for name in _SIZES} for transform in (own, other)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"student: its transform resizes by {sizes[0]}, the teacher's by {sizes[1]}; maps of one place in the "
            "picture are compared, so give both the same min_size and max_size"
        )
    draws = sizes[0]["min_size"]
    if sizes[0]["fixed_size"] is None and isinstance(draws, (tuple, list)) and len(draws) > 1:
        raise ValueError(
            f"student: its transform draws one min_size of {tuple(draws)}, the teacher's takes the last; give both "
            "one, and vary sizes before"
        )


@contextmanager
def transformed(network: nn.Module) -> Iterator[list[Any]]:
    """What torchvision's ``transform`` of a detector puts out within the block; empty for other networks."""
    seen: list[Any] = []
    transform = getattr(network, "transform", None)
    if not isinstance(transform, nn.Module):
        yield seen
        return
    handle = transform.register_forward_hook(lambda module, inputs, output: seen.append(output))
    try:
        yield seen
    finally:
        handle.remove()


def foreground_of(images: Any, seen: Sequence[Any]) -> Tensor:
    """Where the objects of a batch are, ``[B, H, W]``, in the picture that the networks saw.

    Args:
        images: The batch; of 🤗's its ``labels`` have boxes (cx, cy, w, h), as shares of their ``size``; of
            MMDetection's its ``data_samples`` have ``gt_instances.bboxes``, corners in pixels.
        seen: Of torchvision's transform: the padded batch and its targets.

    Raises:
        ValueError: The batch has no boxes.
    """
    if seen:
        batch, targets = seen[-1]
        if targets is not None:
            return boxes_mask([target["boxes"] for target in targets], tuple(batch.tensors.shape[-2:]))
    labels = images.get("labels") if isinstance(images, Mapping) else None
    if isinstance(labels, (tuple, list)) and labels and all("boxes" in label for label in labels):
        pixels = images["pixel_values"]
        size = (pixels.shape[-2], pixels.shape[-1])
        corners = []
        for label in labels:
            boxes = label["boxes"]
            height, width = label.get("size", boxes.new_tensor(size)).to(boxes).unbind()
            scale = torch.stack((width, height))
            centre, half = boxes[:, :2] * scale, boxes[:, 2:] * scale / 2
            corners.append(torch.cat((centre - half, centre + half), 1))
        return boxes_mask(corners, size)
    samples = images.get("data_samples") if isinstance(images, Mapping) else None
    if samples and all(hasattr(sample, "gt_instances") for sample in samples):
        found = [sample.gt_instances.bboxes for sample in samples]
        corners = [
            getattr(boxes, "tensor", boxes) for boxes in found
        ]  # theirs may be a class around a tensor
        return boxes_mask(corners, tuple(images["inputs"].shape[-2:]))
    raise ValueError(
        "foreground: a pair has a background_weight, and the batch has no boxes; pass a mask to loss(foreground=…)"
    )


def boxes_mask(boxes: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Pixels that lie in a box, bool ``[B, H, W]``; every box has at least the pixel that it begins in.

    Args:
        boxes: A tensor ``[N, 4]`` an image, (x0, y0, x1, y1) in pixels; N may be 0.
        size: (H, W).
    """
    masks = []
    for found in boxes:
        first = found[:, :2].floor()
        last = torch.maximum(found[:, 2:].ceil(), first + 1)
        rows, columns = (torch.arange(count, device=found.device) for count in size)
        inside_x = (columns >= first[:, :1]) & (columns < last[:, :1])
        inside_y = (rows >= first[:, 1:]) & (rows < last[:, 1:])
        # A product instead of N masks: N·(H + W) values, and nothing waits for the device.
        masks.append(inside_y.float().T @ inside_x.float() > 0)
    return torch.stack(masks)

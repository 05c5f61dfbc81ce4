"""Pairs of images on either side of a teacher's decision boundary.

Source: "What Makes a Good Dataset for Knowledge Distillation?", the teacher-exploiting attack of Fig. 3 and Table 6,
with the Bold Driver step size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

Model = nn.Module | Callable[[torch.Tensor], torch.Tensor]

# Bold Driver: a little faster after each step that goes well, half as fast after one that does not.
_FASTER, _SLOWER = 1.1, 0.5


class BoundaryPairs(NamedTuple):
    """What an attack found, S successes of N images.

    Attributes:
        pre: ``[S, C, H, W]``, the last image before the boundary: not of the target class.
        post: ``[S, C, H, W]``, the first one behind it: of the target class.
        deeper: ``[2S, C, H, W]``, ``post`` and then ``pre``, each one step further into its own class.
        success: bool ``[N]``, which images it worked for; rows of ``pre`` and ``post`` are in their order.
    """

    pre: torch.Tensor
    post: torch.Tensor
    deeper: torch.Tensor
    success: torch.Tensor


def random_targets(predictions: torch.Tensor, num_classes: int, generator: torch.Generator) -> torch.Tensor:
    """A class for each image, uniform over all but the one it is predicted as now: int64 ``[N]``.

    Raises:
        ValueError: There is no other class.
    """
    if num_classes < 2:
        raise ValueError(f"num_classes: got {num_classes}; must be at least 2 for another class to exist")
    offset = torch.randint(1, num_classes, predictions.shape, generator=generator, device=predictions.device)
    return (predictions + offset) % num_classes


def decision_boundary_pairs(
    model: Model,
    images: torch.Tensor,
    targets: torch.Tensor,
    *,
    epsilon: float = 8 / 255,
    alpha: float = 1 / 255,
    steps: int = 20,
    threshold: float = 0.9,
) -> BoundaryPairs:
    """Walk each image towards its target class until it crosses the boundary while the teacher is unsure on both sides.

    A targeted sign-gradient walk inside the ε-ball. While the target is not reached, the step grows by a tenth. A step
    that crosses, but from or to an image that the teacher is sure of, is taken back and the step size halved. One
    forward and backward pass a step serves for the gradient, the prediction and the confidence; nothing waits for the
    device until the end.

    Args:
        model: From images in [0, 1] to logits, normalisation inside. It is put in evaluation mode meanwhile; its
            parameters get no gradients.
        images: Floating point ``[N, C, H, W]`` in [0, 1], after augmentation and mixup.
        targets: int64 ``[N]``. An image already predicted as its target never succeeds.
        epsilon: Largest change of a pixel. ε, α and the number of steps are not published; these are our defaults.
        alpha: First step size.
        steps: Of the walk.
        threshold: Both images' highest softmax value stays below this.

    Returns:
        The pairs; empty where nothing succeeded.

    Raises:
        TypeError: ``images`` are not floating point, or ``targets`` not int64.
        ValueError: A shape does not fit, or a number is out of range.
    """
    _validate(images, targets, epsilon, alpha, steps, threshold)
    with _evaluating(model), torch.inference_mode(False), torch.enable_grad():
        # Copies, to leave inference mode's tensors behind.
        start, targets = images.detach().clone(), targets.clone()
        low, high = (start - epsilon).clamp(min=0), (start + epsilon).clamp(max=1)
        walk = _walk(model, start, targets, low, high, alpha, steps, threshold)
        # The one wait for the device: how many there are.
        rows = walk.success.nonzero().squeeze(1)
        pre, post = walk.pre[rows], walk.post[rows]
        if not len(rows):
            return BoundaryPairs(pre, post, start[rows], walk.success)
        pair = torch.cat([post, pre])
        own = torch.cat([targets[rows], walk.pre_class[rows]])
        look = _look(model, pair, own)
        step = pair - alpha * look.direction
        deeper = step.clamp(torch.cat([low[rows]] * 2), torch.cat([high[rows]] * 2))
    return BoundaryPairs(pre, post, deeper, walk.success)


class _Look(NamedTuple):
    direction: torch.Tensor
    prediction: torch.Tensor
    confidence: torch.Tensor


def _look(model: Model, images: torch.Tensor, targets: torch.Tensor) -> _Look:
    """One pass: the sign of the gradient of CE towards ``targets``, the predicted class, and how sure it is."""
    images = images.detach().requires_grad_()
    logits = model(images)
    # The sum, so that each image's gradient is its own.
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, targets, reduction="sum"), images)
    confidence, prediction = logits.detach().float().softmax(1).max(1)
    return _Look(gradient.sign(), prediction, confidence)


@dataclass
class _Walk:
    pre: torch.Tensor
    post: torch.Tensor
    pre_class: torch.Tensor
    success: torch.Tensor


def _walk(
    model: Model,
    start: torch.Tensor,
    targets: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    alpha: float,
    steps: int,
    threshold: float,
) -> _Walk:
    here, look = start, _look(model, start, targets)
    outside = look.prediction != targets
    walk = _Walk(start, start, look.prediction, torch.zeros_like(outside))
    size = torch.full(targets.shape, alpha, dtype=start.dtype, device=start.device)
    for _ in range(steps):
        there = (here - _per_image(size) * look.direction).clamp(low, high)
        next_look = _look(model, there, targets)
        crossed = next_look.prediction == targets
        unsure = (look.confidence < threshold) & (next_look.confidence < threshold)
        found = outside & crossed & unsure & ~walk.success
        walk.pre = torch.where(_per_image(found), here, walk.pre)
        walk.post = torch.where(_per_image(found), there, walk.post)
        walk.pre_class = torch.where(found, look.prediction, walk.pre_class)
        walk.success = walk.success | found
        # Whoever crossed stays where it was, found or not: the found are frozen, the others try a smaller step.
        size = torch.where(crossed, size * _SLOWER, size * _FASTER)
        here = torch.where(_per_image(crossed), here, there)
        look = _Look(
            torch.where(_per_image(crossed), look.direction, next_look.direction),
            torch.where(crossed, look.prediction, next_look.prediction),
            torch.where(crossed, look.confidence, next_look.confidence),
        )
    return walk


def _per_image(values: torch.Tensor) -> torch.Tensor:
    return values[:, None, None, None]


@contextlib.contextmanager
def _evaluating(model: Model) -> Iterator[None]:
    """Evaluation mode for each module that is not in it, and back: an attack must not move BN statistics."""
    training = [m for m in model.modules() if m.training] if isinstance(model, nn.Module) else []
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _validate(
    images: torch.Tensor, targets: torch.Tensor, epsilon: float, alpha: float, steps: int, threshold: float
) -> None:
    if images.ndim != 4:
        raise ValueError(f"images: got shape {list(images.shape)}; must be [N, C, H, W]")
    if not images.is_floating_point():
        raise TypeError(f"images: got {images.dtype}; must be floating point")
    if targets.shape != images.shape[:1]:
        raise ValueError(f"targets: got shape {list(targets.shape)} for {len(images)} images; must be [N]")
    if targets.dtype != torch.int64:
        raise TypeError(f"targets: got {targets.dtype}; must be int64")
    for name, value in (("epsilon", epsilon), ("alpha", alpha)):
        if not 0 < value <= 1:
            raise ValueError(f"{name}: got {value}; must be in (0, 1], in units of pixels in [0, 1]")
    if steps < 1:
        raise ValueError(f"steps: got {steps}; must be at least 1")
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold: got {threshold}; must be in (0, 1]")

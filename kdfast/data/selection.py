"""Choosing the images of a surrogate set so that a teacher's predictions cover its classes evenly.

Source: "What Makes a Good Dataset for Knowledge Distillation?", sections on the synthetic set and Table 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


def select_balanced(
    predictions: torch.Tensor | NDArray[np.integer[Any]] | Sequence[int],
    budget: int,
    num_classes: int,
    *,
    seed: int,
) -> torch.Tensor:
    """Pick ``budget`` images with equally many for each class that the teacher predicts at all.

    Of a class predicted often enough, images are drawn without replacement; one predicted less often is replicated,
    each of its images as often as the others give or take one. A class that is never predicted is skipped and its
    share goes to the others. What does not divide evenly goes to the classes with most images.

    Args:
        predictions: Predicted class of each image, integers ``[N]``; made before augmentation, in evaluation mode.
        budget: Images to pick.
        num_classes: Predictions are in ``[0, num_classes)``.
        seed: Of the draw.

    Returns:
        Indices into ``predictions``, int64 ``[budget]``, in random order; replicated images appear repeatedly.

    Raises:
        TypeError: ``predictions`` are not integers.
        ValueError: A prediction is out of range, there are none, or the budget is below one image for each predicted
            class.
    """
    predicted, present = _present(predictions, num_classes)
    if budget < len(present):
        raise ValueError(
            f"budget: got {budget} for {len(present)} predicted classes; must be at least one image each"
        )
    share, left_over = divmod(budget, len(present))
    shares = [share + (rank < left_over) for rank in range(len(present))]
    return _draw(predicted, present, shares, seed)


def select_long_tail(
    predictions: torch.Tensor | NDArray[np.integer[Any]] | Sequence[int],
    budget: int,
    num_classes: int,
    *,
    ratio: float,
    seed: int,
) -> torch.Tensor:
    """Pick ``budget`` images so that the classes' shares fall off exponentially, as in Table 4's long-tail subsets.

    The k-th most predicted class gets a share in proportion to ``ratio`` ** (−k / (K − 1)), K classes being predicted
    at all, and at least one image. Within a class as in :func:`select_balanced`.

    Args:
        predictions: Predicted class of each image, integers ``[N]``.
        budget: Images to pick.
        num_classes: Predictions are in ``[0, num_classes)``.
        ratio: Largest share over smallest, at least 1; the paper does not say its own, 100 is usual.
        seed: Of the draw.

    Returns:
        As :func:`select_balanced`.

    Raises:
        TypeError: ``predictions`` are not integers.
        ValueError: As :func:`select_balanced`, or ``ratio`` is below 1.
    """
    if not ratio >= 1:
        raise ValueError(f"ratio: got {ratio}; must be at least 1, the largest class over the smallest")
    predicted, present = _present(predictions, num_classes)
    if budget < len(present):
        raise ValueError(
            f"budget: got {budget} for {len(present)} predicted classes; must be at least one image each"
        )
    weights = ratio ** (-np.arange(len(present)) / max(len(present) - 1, 1))
    # Everyone's first image, and the rest by weight; what rounding leaves goes to the largest.
    shares = 1 + np.floor((budget - len(present)) * weights / weights.sum()).astype(int)
    shares[0] += budget - shares.sum()
    return _draw(predicted, present, shares.tolist(), seed)


def _present(predictions: Any, num_classes: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The predictions, checked, and the classes that occur, most frequent first."""
    predicted = _integers("predictions", predictions)
    if predicted.ndim != 1 or not len(predicted):
        raise ValueError(f"predictions: got shape {list(predicted.shape)}; must be [N] with N > 0")
    outside = np.flatnonzero((predicted < 0) | (predicted >= num_classes))
    if outside.size:
        row = outside[0]
        raise ValueError(f"predictions: class {predicted[row]} at row {row} is outside [0, {num_classes})")
    counts = np.bincount(predicted, minlength=num_classes)
    # Most images first: they can best give one more. Stable, so that the seed alone decides.
    return predicted, np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]


def _draw(
    predicted: NDArray[np.int64], classes: NDArray[np.int64], shares: Sequence[int], seed: int
) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    chosen = []
    for label, share in zip(classes, shares):
        images = rng.permutation(np.flatnonzero(predicted == label))
        # resize repeats from the start: without replacement where there are enough, replicated where not.
        chosen.append(np.resize(images, share))
    return torch.from_numpy(rng.permutation(np.concatenate(chosen)))


def relative_entropy(counts: torch.Tensor | NDArray[np.number[Any]] | Sequence[float]) -> float:
    """How evenly a set covers a teacher's classes: H(p) / log C of the histogram of its predictions.

    Args:
        counts: Images predicted as each class, ``[C]``, zeros included (``bincount(predictions, minlength=C)``).

    Returns:
        1 for equal counts, 0 when all images fall into one class, or when there is only one; computed in float64.

    Raises:
        ValueError: Counts are negative, not finite, or all zero.
    """
    values = counts.detach().cpu().numpy() if isinstance(counts, torch.Tensor) else np.asarray(counts)
    histogram = values.astype(np.float64)
    if histogram.ndim != 1 or not len(histogram):
        raise ValueError(f"counts: got shape {list(histogram.shape)}; must be [C] with C > 0")
    if not np.isfinite(histogram).all() or histogram.min() < 0 or histogram.sum() == 0:
        raise ValueError("counts: must be finite, not negative, and not all zero")
    if len(histogram) == 1:
        return 0.0
    present, total, classes = histogram[histogram > 0], histogram.sum(), len(histogram)
    # 1 - KL(p || uniform) / log C, the same number: exactly 1 for equal counts, exactly 0 for a single class.
    divergence = (present / total * np.log(present * classes / total)).sum()
    return float(min(max(1 - divergence / np.log(classes), 0.0), 1.0))


def _integers(name: str, values: Any) -> NDArray[np.int64]:
    array = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"{name}: got {array.dtype}; must be integers")
    return array.astype(np.int64)

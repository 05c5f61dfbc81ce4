"""What the paper's figures show of a feature."""

from __future__ import annotations

from torch import Tensor

from kdfast.errors import is_positive

__all__ = ["saliency"]


def saliency(feature: Tensor, temperature: float = 0.5) -> Tensor:
    """H·W·softmax(mean_c(f)/τ), the maps of Figs. 2 and 5 (Eq. 10).

    Args:
        feature: ``[B, C, H, W]``.
        temperature: τ, above 0.

    Returns:
        float32 (float64 of doubles) ``[B, H, W]``, whose mean over each map is 1.

    Raises:
        ValueError: Another shape, or a temperature that is not positive.
    """
    if feature.dim() != 4:
        raise ValueError(f"feature: got shape {tuple(feature.shape)}; [B, C, H, W] is needed")
    if not is_positive(temperature):
        raise ValueError(f"temperature: got {temperature!r}; a number above 0 is needed")
    height, width = feature.shape[2:]
    mean = feature.mean(1) if feature.element_size() == 8 else feature.float().mean(1)
    return (mean.flatten(1) / temperature).softmax(1).view(-1, height, width) * (height * width)

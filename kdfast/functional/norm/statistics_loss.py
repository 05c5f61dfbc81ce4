"""How far a batch's statistics are from those that a batch norm remembers."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdfast.functional._checks import check_bool, check_channels, check_floating, check_real
from kdfast.functional._rows import agree
from kdfast.ops.norm import statistics_loss as ops
from kdfast.profiling import annotate

__all__ = ["BNStatistics", "bn_statistics_loss"]


class BNStatistics(NamedTuple):
    """What :func:`bn_statistics_loss` returns.

    Attributes:
        loss: 0-d, float32 (float64 for float64 inputs); differentiable in the input.
        mean: ``[C]`` of the batch, without gradient, in the loss's dtype.
        var: ``[C]``, biased, likewise.
    """

    loss: Tensor
    mean: Tensor
    var: Tensor


_CHANNELS = ("running_mean", "running_var", "average_mean", "average_var")


@annotate("bn_statistics_loss")
def bn_statistics_loss(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    average_mean: Tensor | None = None,
    average_var: Tensor | None = None,
    average_share: float | Tensor = 0.9,
    squared: bool = False,
) -> BNStatistics:
    r"""Distance of a batch's channel statistics to a layer's running ones, in one pass over the batch.

    .. math:: L = \lVert \sigma^2 - v \rVert_2 + \lVert \mu - m \rVert_2

    with m and v the mean and biased variance over all dimensions but the second (DeepInversion, Yin et al. 2020,
    Eq. 4; SSD-KD, Liu et al., Eq. 1). With an average of earlier batches, m and v are (1 − k)·(the batch's) +
    k·(the average's). The gradient is a second pass; where a norm is 0, its gradient is 0.

    Args:
        x: ``[N, C, …]`` with elements; float32, bfloat16, float16 or float64. Dense with channels second or last
            is read where it lies; anything else is copied first.
        running_mean: μ ``[C]``, floating-point, on x's device. Gets no gradient.
        running_var: σ² likewise.
        average_mean: Of earlier batches, ``[C]``, together with ``average_var``, or None.
        average_var: Likewise.
        average_share: k, from 0 to 1: a number, or a 0-d tensor on x's device, so that a captured graph sees its
            current value (which is not checked then).
        squared: Squared norms instead.

    Returns:
        Loss, mean and variance; sums are float32 (float64 for float64) and in a fixed order.

    Raises:
        TypeError: Tensors that are not floating-point.
        ValueError: A shape, device or value other than those named.
    """
    held = running_mean, running_var, average_mean, average_var
    given = running_mean is not None and running_var is not None and not torch.compiler.is_compiling()
    agreed = given and agree((x,), held)
    if not agreed:
        check_floating("x", x)
    if x.dim() < 2 or x.numel() == 0:
        raise ValueError(f"x: got shape {tuple(x.shape)}; [N, C, …] with elements is needed")
    target = _target(agreed, x, running_mean, running_var, average_mean, average_var, average_share, squared)
    return BNStatistics(*ops.bn_statistics(x, target))


def _target(
    agreed: bool,
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    average_mean: Tensor | None,
    average_var: Tensor | None,
    average_share: float | Tensor,
    squared: bool,
) -> ops.Target:
    if (average_mean is None) != (average_var is None):
        missing = "average_mean" if average_mean is None else "average_var"
        raise ValueError(
            f"{missing}: got None; average_mean and average_var are given together or not at all"
        )
    held: tuple[Any, ...] = running_mean, running_var, average_mean, average_var
    for name, value in zip(_CHANNELS, held):
        if value is None and name.startswith("average"):
            continue
        if not agreed:
            check_channels(name, value, x)
        if value.requires_grad:
            raise ValueError(f"{name}: requires grad; kdfast gives it no gradient, pass {name}.detach()")
    check_bool("squared", squared)
    if average_mean is None:
        _check_share(average_share, x)
        return ops.Target(running_mean, running_var, None, None, None, squared)
    return ops.Target(running_mean, running_var, average_mean, average_var, _share(average_share, x), squared)


def _check_share(share: float | Tensor, x: Tensor) -> None:
    if not isinstance(share, Tensor):
        check_real("average_share", share, 0, 1)
        return
    check_floating("average_share", share)
    if share.numel() != 1 or share.device != x.device or share.requires_grad:
        raise ValueError(
            f"average_share: got shape {tuple(share.shape)} on {share.device}, requires_grad="
            f"{share.requires_grad}; a number, or a 0-d tensor on {x.device} without gradient, is needed"
        )


def _share(share: float | Tensor, x: Tensor) -> Tensor:
    _check_share(share, x)
    if isinstance(share, Tensor):
        return share.reshape(())
    return torch.full((), float(share), dtype=torch.float32, device=x.device)

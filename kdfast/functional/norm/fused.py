"""Batch norm together with what follows it: ReLU and a residual, a denoising step, a mean squared error."""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast.documents import shown
from kdfast.functional._checks import (
    check_bool,
    check_channels,
    check_floating,
    check_real,
    check_tensor,
    elsewhere,
)
from kdfast.functional._rows import agree
from kdfast.ops.norm import eager as ops
from kdfast.profiling import annotate
from kdfast.reference.norm.fused import BatchNorm

__all__ = ["bn_ddim_step", "bn_mse", "bn_relu"]


@annotate("bn_relu")
def bn_relu(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    num_batches_tracked: Tensor | None = None,
    residual: Tensor | None = None,
    relu: bool = True,
) -> Tensor:
    r"""Batch norm, a residual if there is one, and ReLU, without an intermediate tensor.

    .. math:: y = \mathrm{relu}\big(\mathrm{BN}(x) + r\big)

    The arguments are those of ``F.batch_norm`` in its order. In training the running statistics are updated in place
    exactly as ``nn.BatchNorm2d`` updates them. Statistics are summed in float32 in a fixed order: the same bits each
    time.

    Args:
        x: ``[B, C, …]`` or ``[B, C]``; float32, bfloat16, float16 or float64. Contiguous and channels_last are read as
            they lie, other layouts are copied first.
        running_mean: ``[C]`` on x's device, or None.
        running_var: ``[C]``, or None; both or neither.
        weight: γ ``[C]``, or None for 1.
        bias: β ``[C]``, or None for 0.
        training: Use the batch's statistics. Without running statistics it must be True.
        momentum: From 0 to 1; None: the cumulative average, which needs ``num_batches_tracked``.
        eps: Above 0.
        num_batches_tracked: int64 of one element on x's device, counted up in training.
        residual: Of x's shape and device, added before the activation; its dtype may differ.
        relu: Whether to apply it. The bottleneck of DiffKD's denoiser (Huang et al. 2023) ends in an addition without
            one.

    Returns:
        y, of x's shape, in the residual's dtype (x's without one). x, weight, bias and residual get gradients.

    Raises:
        TypeError: A tensor that is not floating-point, a count that is not int64.
        ValueError: Shapes or devices that do not fit, one value a channel in training, a statistic that is missing.
    """
    norm = BatchNorm(weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps)
    norm = _norm(x, norm) if residual is None else _norm(x, norm, "residual", residual)
    return ops.bn_act(x, residual, norm, relu=bool(relu))


@annotate("bn_ddim_step")
def bn_ddim_step(
    sample: Tensor,
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    c1: float,
    c2: float,
    num_batches_tracked: Tensor | None = None,
) -> Tensor:
    r"""The last batch norm of a denoiser and the DDIM step that takes its output, in one pass.

    .. math:: x_{t-1} = c_1\,x_t + c_2\,\hat\varepsilon,\quad \hat\varepsilon = \mathrm{BN}(x)

    (DDIM, Song et al. 2021, Eq. 12 at η = 0, with c₁ = √(ᾱ'/ᾱ) and c₂ = √(1 − ᾱ') − c₁·√(1 − ᾱ); DiffKD, Huang et al.
    2023.) ε̂ is never stored.

    Args:
        sample: x_t, of x's shape and device; its dtype may differ (float32 keeps the latent exact).
        x: What the batch norm reads ``[B, C, …]``; this and the following are as for :func:`bn_relu`.
        running_mean: As there.
        running_var: As there.
        weight: As there.
        bias: As there.
        training: As there.
        momentum: As there.
        eps: As there.
        c1: Factor of the sample, finite.
        c2: Factor of ε̂, finite.
        num_batches_tracked: As there.

    Returns:
        x_{t−1}, of the sample's shape and dtype. sample, x, weight and bias get gradients.

    Raises:
        TypeError: As for :func:`bn_relu`, or a coefficient that is no number.
        ValueError: As for :func:`bn_relu`, or a coefficient that is not finite.
    """
    norm = BatchNorm(weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps)
    norm = _norm(x, norm, "sample", sample)
    for name, value in (("c1", c1), ("c2", c2)):
        check_real(name, value)
    return ops.bn_act(x, sample, norm, relu=False, scale=float(c2), carry=float(c1))


@annotate("bn_mse")
def bn_mse(
    x: Tensor,
    target: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    num_batches_tracked: Tensor | None = None,
) -> Tensor:
    r"""Mean squared error of a batch norm's output, with the gradients made in the forward pass.

    .. math:: L = \mathrm{mean}\big((\mathrm{BN}(x) - t)^2\big)

    (DiffKD's distance of features after its projection, Huang et al. 2023, Sec. 3.) The sums that the gradient needs
    are closed forms of what the statistics' pass reads, so that nothing is read a third time.

    Args:
        x: ``[B, C, …]``; this and the following are as for :func:`bn_relu`.
        target: Of x's shape and device; gets no gradient.
        running_mean: As there.
        running_var: As there.
        weight: As there.
        bias: As there.
        training: As there.
        momentum: As there.
        eps: As there.
        num_batches_tracked: As there.

    Returns:
        The loss, a 0-d float32 tensor (float64 when an input is). x, weight and bias get gradients.

    Raises:
        TypeError: As for :func:`bn_relu`.
        ValueError: As for :func:`bn_relu`; an empty x; a target that requires grad.
    """
    norm = BatchNorm(weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps)
    norm = _norm(x, norm, "target", target)
    if target.requires_grad:
        raise ValueError("target: requires grad; kdfast gives it no gradient, pass target.detach()")
    if x.numel() == 0:
        raise ValueError(f"x: got shape {tuple(x.shape)}; the mean of no elements is not defined")
    return ops.bn_mse(x, target, norm)


def _like(name: str, value: Tensor, x: Tensor) -> None:
    check_floating(name, value)
    if value.shape != x.shape:
        raise ValueError(
            f"{name}: got shape {tuple(value.shape)}; x has {tuple(x.shape)}, and they must match"
        )
    if value.device != x.device:
        raise elsewhere(name, value, "x", x.device)


#: What a norm holds a value a channel of.
_CHANNELS = ("weight", "bias", "running_mean", "running_var")


def _norm(x: Tensor, norm: BatchNorm, beside: str = "", *others: Tensor) -> BatchNorm:
    """The batch norm's arguments, and what stands ``beside`` x and is like it, checked."""
    check_bool("training", norm.training)
    held = norm.weight, norm.bias, norm.running_mean, norm.running_var
    agreed = not torch.compiler.is_compiling() and agree((x, *others), held)
    if not agreed:
        check_floating("x", x)
    if x.dim() < 2 or x.shape[1] == 0:
        raise ValueError(f"x: got shape {tuple(x.shape)}; [B, C, …] with at least one channel is needed")
    if not agreed:
        for name, value in zip(_CHANNELS, held):
            if value is not None:
                check_channels(name, value, x)
    mean, var = norm.running_mean, norm.running_var
    for name, value in (("running_mean", mean), ("running_var", var)):
        if value is not None and value.requires_grad:
            raise ValueError(f"{name}: requires grad; statistics are buffers")
    if (mean is None) != (var is None):
        raise ValueError("running_mean, running_var: got one of them; both or neither are needed")
    if not norm.training and mean is None:
        raise ValueError("training: got False without running statistics; pass both or training=True")
    if not (isinstance(norm.eps, float) and check_real("eps", norm.eps) > 0):
        raise ValueError(f"eps: got {shown(norm.eps)}; a finite float above 0 is needed")
    _count(x, norm)
    if norm.training and x.numel() <= x.shape[1]:
        raise ValueError(
            f"x: got shape {tuple(x.shape)}, {x.numel() // x.shape[1]} values a channel; batch norm in training "
            "needs at least 2"
        )
    if not agreed:
        for other in others:
            _like(beside, other, x)
    return norm


def _count(x: Tensor, norm: BatchNorm) -> None:
    """``num_batches_tracked`` and ``momentum``."""
    count, momentum = norm.num_batches_tracked, norm.momentum
    if count is not None:
        check_tensor("num_batches_tracked", count)
        if count.dtype != torch.int64:
            raise TypeError(f"num_batches_tracked: got {count.dtype}; int64 is needed")
        if count.numel() != 1 or count.device != x.device:
            raise ValueError(
                f"num_batches_tracked: got shape {tuple(count.shape)} on {count.device}; one element on {x.device} is "
                "needed"
            )
    if momentum is None:
        if norm.training and norm.running_mean is not None and count is None:
            raise ValueError(
                "momentum: got None without num_batches_tracked; the cumulative average needs it"
            )
    elif not isinstance(momentum, (int, float)) or isinstance(momentum, bool) or not 0 <= momentum <= 1:
        raise ValueError(
            f"momentum: got {shown(momentum)}; 0 to 1, or None for the cumulative average, is needed"
        )

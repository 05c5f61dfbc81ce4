"""Branch recursion, γ-mix and noising in plain PyTorch: the oracle of the tests and the path for CPU and float64."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kdfast.reference.common import compute_dtype
from kdfast.reference.philox import noise, noised

__all__ = ["add_noise_embed", "noise_error", "noise_mix", "noise_mse", "reparam_middle"]


def reparam_middle(
    branches: Tensor,
    target: Tensor,
    u: Tensor,
    v: Tensor,
    permutation: Tensor,
    noise_scale: Tensor | None = None,
    seed: int | Tensor = 0,
    carry: bool = True,
) -> tuple[Tensor, Tensor]:
    """``(Σ_k mean((T_k − P_k)²), mean S)``; the recursion and the arguments are those of kernels/feature.

    Returns:
        The loss in float32 (float64 when an input is), the mean in the branches' dtype.
    """
    dtype = compute_dtype(branches, target)
    x0, u, v = target.to(dtype), u.to(dtype), v.to(dtype)
    ordered = branches.index_select(0, permutation).to(dtype)
    loss = ordered.new_zeros(())
    behind = torch.zeros_like(x0)  # P_{k−1} − X_{k−1}
    for k in range(branches.shape[0]):
        residual = u[k] * behind + v[k] * (ordered[k] - x0)
        loss = loss + residual.square().mean()
        behind = residual if carry else residual.detach()
        if noise_scale is not None and k < branches.shape[0] - 1:
            z = noise(seed, k, tuple(x0.shape), x0.device, dtype)
            behind = behind - noise_scale[k].to(dtype) * z
    return loss, ordered.mean(0).to(branches.dtype)


def noise_mix(x: Tensor, gamma: Tensor, seed: int | Tensor) -> Tensor:
    """``γ·x + (1 − γ)·ε`` with γ ``[B]``; in x's dtype."""
    dtype = compute_dtype(x, gamma)
    factor = gamma.to(dtype).view(-1, *[1] * (x.dim() - 1))
    return torch.lerp(noise(seed, 0, tuple(x.shape), x.device, dtype), x.to(dtype), factor).to(x.dtype)


def noise_error(prediction: Tensor, seed: int | Tensor) -> Tensor:
    """``ε̂ − ε`` in float32 (float64)."""
    dtype = compute_dtype(prediction)
    return prediction.to(dtype) - noise(seed, 0, tuple(prediction.shape), prediction.device, dtype)


def noise_mse(prediction: Tensor, seed: int | Tensor) -> Tensor:
    """``mean((ε̂ − ε)²)`` in float32 (float64)."""
    dtype = compute_dtype(prediction)
    drawn = noise(seed, 0, tuple(prediction.shape), prediction.device, dtype)
    return F.mse_loss(
        prediction.to(dtype), drawn
    )  # one pass each way, where a difference and a square are two


def add_noise_embed(
    x: Tensor, timesteps: Tensor, alphas_cumprod: Tensor, embedding: Tensor | None, seed: int | Tensor
) -> Tensor:
    """``√ᾱ_t·x + √(1 − ᾱ_t)·ε + E[t]`` of x ``[B, C, …]``; in x's dtype."""
    dtype = compute_dtype(x)
    bar = alphas_cumprod.to(dtype)[timesteps]
    out = noised(x.to(dtype), bar.sqrt(), (1 - bar).sqrt(), seed)
    if embedding is not None:
        added = F.embedding(timesteps, embedding).to(dtype).view(*x.shape[:2], *[1] * (x.dim() - 2))
        # In place, since fresh memory costs a CPU more than the sum; but one of the two may have a dimension more.
        out = out + added if torch._C._are_functorch_transforms_active() else out.add_(added)
    return out.to(x.dtype)

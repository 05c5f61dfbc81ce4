"""The fused pieces that the method is made of, taking the modules whose names its state dict has."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["add_noise_embed", "bn", "bn_mse", "bn_relu", "bn_step", "noise_mse"]


def bn(x: Tensor, norm: nn.BatchNorm2d, residual: Tensor | None = None) -> Tensor:
    """Batch norm, plus ``residual``."""
    out: Tensor = norm(x)
    return out if residual is None else out + residual


def bn_relu(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """Batch norm and ReLU."""
    return F.relu(norm(x))


def bn_step(pred: Tensor, norm: nn.BatchNorm2d | None, z: Tensor, c1: float, c2: float) -> Tensor:
    """c1·z + c2·ε̂, with ε̂ = norm(pred)."""
    return c1 * z + c2 * (pred if norm is None else norm(pred))


def bn_mse(x: Tensor, norm: nn.BatchNorm2d, target: Tensor) -> Tensor:
    """mean((norm(x) − target)²), at least float32."""
    return F.mse_loss(_wide(norm(x)), _wide(target))


def add_noise_embed(z: Tensor, times: Tensor, bars: Tensor, embedding: Tensor, seed: Tensor) -> Tensor:
    """√ᾱ_t·z + √(1 − ᾱ_t)·ε + E[t]."""
    shape = (-1, 1, 1, 1)
    bar = bars[times].view(shape)
    noisy = bar.sqrt() * z + (1 - bar).sqrt() * _noise(z, seed)
    return (noisy + embedding[times].view(*embedding[times].shape, 1, 1)).to(z.dtype)


def noise_mse(pred: Tensor, seed: Tensor) -> Tensor:
    """mean((pred − ε)²) with the ε that ``seed`` stands for."""
    return F.mse_loss(_wide(pred), _wide(_noise(pred, seed)))


def _noise(like: Tensor, seed: Tensor) -> Tensor:
    from kdfast.functional import noise_mix

    # γ = 0 leaves noise alone.
    zero = torch.zeros(like.shape[0], device=like.device)
    return noise_mix(torch.zeros_like(like).float(), zero, seed=seed)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()

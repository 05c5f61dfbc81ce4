"""Launches of feature distillation for bench/audit_table.py, on the latents of DiffKD: 256 x 1024 x 7 x 7."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.static_audit import meta
from kdfast.kernels.feature import noise as feature_noise
from kdfast.kernels.norm import launch as norm
from kdfast.kernels.norm import matrix
from kdfast.reference.norm.fused import BatchNorm


def noised(dtype: torch.dtype, *, channels_last: bool = False) -> Callable[[], object]:
    """DiffKD's latents: noising, the error in ε, the embedding's gradient."""

    def call() -> object:
        x, found = feature_noise.laid_out(_latents(dtype, channels_last))
        timesteps, rows = meta(256, dtype=torch.int64), meta(1280, 1024)
        feature_noise.add_noise_embed(x, found, timesteps, meta(1000), rows, x, 5)
        feature_noise.noise_mse(x, 5, loss=meta(1), grad=x)
        return feature_noise.embedding_gradient(x, found, timesteps, rows)

    return call


def _latents(dtype: torch.dtype, channels_last: bool) -> torch.Tensor:
    x = meta(256, 1024, 7, 7, dtype=dtype)
    return x.to(memory_format=torch.channels_last) if channels_last else x


def batch_norm(what: str, dtype: torch.dtype, *, channels_last: bool = False) -> Callable[[], object]:
    """Training on DiffKD's latents: ``act`` with a residual forward and backward, or the squared error."""

    def call() -> None:
        x = _latents(dtype, channels_last)
        found, c = matrix(x), [meta(1024) for _ in range(8)]
        assert found is not None
        held = BatchNorm(*c[:4], meta(1, dtype=torch.int64), True, 0.1, 1e-5)
        centre, sums = (c[4], c[5]), meta(2048)
        if what == "act":
            kind = {"relu": True, "scale": 1.0, "carry": 1.0}
            grads = {"grad_x": x, "grad_residual": x, "grad_weight": c[6], "grad_bias": c[7]}
            norm.statistics(x, found, held, mean=c[4], rstd=c[5])
            norm.act(x, x, x, found, held, centre, **kind)
            norm.act_backward(x, x, x, found, held, centre, **grads, **kind)
        else:
            norm.statistics(x, found, held, mean=c[4], rstd=c[5], target=x, sums=sums)
            norm.mse(x, x, found, held, centre, (x, c[6], c[7]), sums=sums, loss=meta(1))

    return call

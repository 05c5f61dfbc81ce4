"""Noising with the time embedding, and the error in ε: registration, gradients, choice of backend.

Eager calls on the Triton backend take plain ``autograd.Function`` s, and so does the error of dense float32 predictions
on a CPU, in a loop of C++; torch.compile sees the registered ops. With create_graph=True the gradients come from the
reference, differentiable again.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from torch import Tensor

from kdfast.backend import resolve
from kdfast.ops.common.counters import fresh_counters
from kdfast.ops.common.gradients import apply, differentiable_gradients
from kdfast.ops.common.layouts import laid_out_as
from kdfast.ops.common.registered import registered_op
from kdfast.ops.feature import native
from kdfast.reference import feature as reference
from kdfast.reference.common import compute_dtype

__all__ = ["add_noise_embed", "noise_mse"]


@functools.cache
def _kernels() -> Any:
    from kdfast.kernels.feature import noise

    return noise


def noise_mse(prediction: Tensor, seed: int | Tensor) -> Tensor:
    """``mean((ε̂ − ε)²)``; arguments are checked by the caller."""
    wants = torch.is_grad_enabled() and prediction.requires_grad
    if torch.compiler.is_compiling():
        return cast(Tensor, _mse_op(prediction, *_split(seed)))
    by: Any = native
    if resolve(prediction) != "reference":
        by = _kernels()
    elif not native.fits_noise(prediction, seed):
        return reference.noise_mse(prediction, seed)
    if wants:
        return cast(Tensor, apply(_NoiseMSE, prediction, seed, by))
    return _mse(prediction, seed, None, by)


def add_noise_embed(
    x: Tensor, timesteps: Tensor, alphas_cumprod: Tensor, embedding: Tensor | None, seed: int | Tensor
) -> Tensor:
    """``√ᾱ_t·x + √(1 − ᾱ_t)·ε + E[t]``; arguments are checked by the caller."""
    if torch.compiler.is_compiling():
        return cast(Tensor, _noise_op(x, timesteps, alphas_cumprod, embedding, *_split(seed)))
    if resolve(x, embedding) == "reference":
        return reference.add_noise_embed(x, timesteps, alphas_cumprod, embedding, seed)
    if torch.is_grad_enabled() and embedding is not None and embedding.requires_grad:
        out = apply(_AddNoise, x, timesteps, alphas_cumprod, embedding, seed)
        return cast(Tensor, out)
    return _noised(x, timesteps, alphas_cumprod, embedding, seed)


def _split(seed: int | Tensor) -> tuple[int, Tensor | None]:
    return (0, seed) if isinstance(seed, Tensor) else (seed, None)


def _mse(prediction: Tensor, seed: int | Tensor, grad: Tensor | None, by: Any) -> Tensor:
    loss = prediction.new_empty((), dtype=torch.float32)
    by.noise_mse(prediction, seed, loss=loss, grad=grad)
    return loss


def _noised(
    x: Tensor, timesteps: Tensor, alphas_cumprod: Tensor, embedding: Tensor | None, seed: int | Tensor
) -> Tensor:
    kernels = _kernels()
    x, found = kernels.laid_out(x)
    out = torch.empty_like(x)
    table = alphas_cumprod.to(torch.float32).contiguous()
    held = None if embedding is None else embedding.contiguous()
    kernels.add_noise_embed(x, found, timesteps.contiguous(), table, held, out, seed)
    return out


def _embedding_gradient(upstream: Tensor, timesteps: Tensor, embedding: Tensor) -> Tensor:
    kernels = _kernels()
    upstream, found = kernels.laid_out(upstream)
    grad = torch.zeros_like(embedding, memory_format=torch.contiguous_format)
    kernels.embedding_gradient(upstream, found, timesteps.contiguous(), grad)
    return grad


class _NoiseMSE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, prediction: Tensor, seed: int | Tensor, by: Any) -> Tensor:
        ctx.save_for_backward(prediction)
        ctx.seed, ctx.by = seed, by
        ctx.grad = torch.empty_like(prediction)
        return _mse(prediction, seed, ctx.grad, by)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, None, None]:
        (prediction,) = ctx.saved_tensors
        by = ctx.by
        if torch.is_grad_enabled() or (by is native and not native.have_memory(upstream)):
            with torch.enable_grad():
                loss = reference.noise_mse(prediction, ctx.seed)
            return differentiable_gradients(loss, (prediction,), (True,), upstream)[0], None, None
        first, ctx.grad = ctx.grad, None
        grad = torch.empty_like(prediction) if first is None else first
        by.noise_mse(prediction, ctx.seed, grad=grad, upstream=upstream, exit_if_one=first is not None)
        return grad, None, None


class _AddNoise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        timesteps: Tensor,
        alphas_cumprod: Tensor,
        embedding: Tensor,
        seed: int | Tensor,
    ) -> Tensor:
        ctx.save_for_backward(timesteps, embedding)
        return _noised(x, timesteps, alphas_cumprod, embedding, seed)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        timesteps, embedding = ctx.saved_tensors
        if torch.is_grad_enabled():  # linear in the upstream gradient: what index_add does, differentiable
            rows = upstream.to(torch.float32).flatten(2).sum(2) if upstream.dim() > 2 else upstream
            zeros = torch.zeros_like(embedding, dtype=rows.dtype)
            grad = zeros.index_add(0, timesteps, rows).to(embedding.dtype)
            return None, None, None, grad, None
        return None, None, None, _embedding_gradient(upstream, timesteps, embedding), None


# --- the registered form -------------------------------------------------------------------------------------


@registered_op("noise_mse")
def _mse_op(prediction: Tensor, seed: int, seed_tensor: Tensor | None) -> Tensor:
    key = seed if seed_tensor is None else seed_tensor
    if resolve(prediction) == "triton":
        with fresh_counters():
            return _mse(prediction, key, None, _kernels())
    return reference.noise_mse(prediction, key)


@_mse_op.register_fake
def _(prediction: Tensor, *rest: Any) -> Tensor:
    return prediction.new_empty((), dtype=compute_dtype(prediction))


@registered_op("noise_mse_backward")
def _mse_backward_op(upstream: Tensor, prediction: Tensor, seed: int, seed_tensor: Tensor | None) -> Tensor:
    """Computed afresh: what a forward wrote in half precision would be rounded before a loss's scale multiplies it."""
    key = seed if seed_tensor is None else seed_tensor
    grad = torch.empty_like(prediction)
    if resolve(prediction) == "triton":
        kernels = _kernels()
        kernels.noise_mse(prediction, key, grad=grad, upstream=upstream)
        return grad
    error = reference.noise_error(prediction, key)
    return grad.copy_(error * (upstream * (2 / error.numel())))


@_mse_backward_op.register_fake
def _(upstream: Tensor, prediction: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(prediction)


def _mse_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    prediction, ctx.seed, seed_tensor = inputs
    ctx.save_for_backward(prediction, seed_tensor)


def _mse_autograd(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    prediction, seed_tensor = ctx.saved_tensors
    return _mse_backward_op(upstream, prediction, ctx.seed, seed_tensor), None, None


_mse_op.register_autograd(_mse_autograd, setup_context=_mse_context)


@registered_op("add_noise_embed")
def _noise_op(
    x: Tensor,
    timesteps: Tensor,
    alphas_cumprod: Tensor,
    embedding: Tensor | None,
    seed: int,
    seed_tensor: Tensor | None,
) -> Tensor:
    key = seed if seed_tensor is None else seed_tensor
    return laid_out_as(x, add_noise_embed(x, timesteps, alphas_cumprod, embedding, key))


@_noise_op.register_fake
def _(x: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(x)


@registered_op("add_noise_embed_backward")
def _noise_backward_op(upstream: Tensor, timesteps: Tensor, embedding: Tensor) -> Tensor:
    if resolve(upstream, embedding) == "triton":
        found = _embedding_gradient(upstream, timesteps, embedding)
    else:
        dtype = compute_dtype(upstream)
        rows = upstream.to(dtype).reshape(*upstream.shape[:2], -1).sum(2)
        found = torch.zeros_like(embedding, dtype=dtype).index_add(0, timesteps, rows)
    return laid_out_as(embedding, found)


@_noise_backward_op.register_fake
def _(upstream: Tensor, timesteps: Tensor, embedding: Tensor) -> Tensor:
    return torch.empty_like(embedding)


def _noise_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1], inputs[3])


def _noise_autograd(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    timesteps, embedding = ctx.saved_tensors
    grad = None if embedding is None else _noise_backward_op(upstream, timesteps, embedding)
    return None, None, None, grad, None, None


_noise_op.register_autograd(_noise_autograd, setup_context=_noise_context)

"""The denoising step as registered ops: what torch.compile, export and fake tensors see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from kdfast.ops.denoise.run import Call, Like, run, run_backward
from kdfast.reference import denoise as reference
from kdfast.reference.denoise import Guidance

_STEP_SCHEMA = (
    "(Tensor sample, Tensor model_output, Tensor table, Tensor? step_tensor, SymInt step, Tensor[] history, "
    "Tensor? noise, Tensor? seed_tensor, int? seed, Tensor? mask, int[]? order, ScalarType dtype, "
    "float? guidance_scale, bool cond_first, int? guided_channels, bool learned_variance, float? clip, "
    "bool want_x0, bool want_mask, ScalarType? x0_dtype) -> (Tensor, Tensor, Tensor)"
)
_BACKWARD_SCHEMA = (
    "(Tensor grad_y, Tensor? grad_m, Tensor table, Tensor? step_tensor, SymInt step, Tensor? mask, "
    "int[] order, float? guidance_scale, bool cond_first, int? guided_channels, SymInt[] sample_shape, "
    "ScalarType sample_dtype, SymInt[] output_shape, ScalarType output_dtype) -> (Tensor, Tensor)"
)


def run_registered(
    call: Call,
    sample: Tensor,
    model_output: Tensor,
    noise: Tensor | None,
    history: Sequence[Tensor],
    graded: bool,
) -> tuple[Tensor, Tensor | None]:
    """The step through the registered op: what torch.compile sees."""
    step_tensor, step = _split(call.step)
    seed_tensor, seed = _split(call.seed)
    y, m, _ = torch.ops.kdfast.denoise_step(
        sample,
        model_output,
        call.table,
        step_tensor,
        step or 0,
        list(history),
        noise,
        seed_tensor,
        seed,
        call.mask,
        call.order,
        call.dtype,
        call.guidance.scale,
        call.guidance.cond_first,
        call.guidance.channels,
        call.learned_variance,
        call.clip,
        call.want_x0,
        graded and call.clip is not None,
        call.x0_dtype,
    )
    return y, m if call.want_x0 else None


def _split(value: int | Tensor | None) -> tuple[Tensor | None, int | None]:
    return (value, None) if isinstance(value, Tensor) else (None, value)


def _step_impl(
    sample: Tensor,
    model_output: Tensor,
    table: Tensor,
    step_tensor: Tensor | None,
    step: int,
    history: list[Tensor],
    noise: Tensor | None,
    seed_tensor: Tensor | None,
    seed: int | None,
    mask: Tensor | None,
    order: list[int] | None,
    dtype: torch.dtype,
    guidance_scale: float | None,
    cond_first: bool,
    guided_channels: int | None,
    learned_variance: bool,
    clip: float | None,
    want_x0: bool,
    want_mask: bool,
    x0_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    call = Call(
        table,
        step if step_tensor is None else step_tensor,
        dtype,
        Guidance(guidance_scale, cond_first, guided_channels),
        seed if seed_tensor is None else seed_tensor,
        learned_variance,
        clip,
        want_x0,
        x0_dtype,
        None if order is None else tuple(order),
        mask,
    )
    y, m, bits, _ = run(call, sample, model_output, noise, history, want_mask=want_mask)
    return y, y.new_empty(0) if m is None else m, _no_bits(y) if bits is None else bits


def _no_bits(like: Tensor) -> Tensor:
    return like.new_empty(0, dtype=torch.uint8)


def _step_fake(
    sample: Tensor, model_output: Tensor, table: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    order, dtype, want_x0, want_mask = rest[7], rest[8], rest[14], rest[15]
    x0_dtype = rest[16]
    if order is None:
        y = torch.empty_like(sample, dtype=dtype)
    else:
        y = reference.ordered_empty(sample.shape, order, dtype, sample.device)
    bits = y.new_empty((y.numel() + 7) // 8, dtype=torch.uint8) if want_mask else _no_bits(y)
    return y, torch.empty_like(y, dtype=x0_dtype or dtype) if want_x0 else y.new_empty(0), bits


def _backward_impl(
    grad_y: Tensor,
    grad_m: Tensor | None,
    table: Tensor,
    step_tensor: Tensor | None,
    step: int,
    mask: Tensor | None,
    order: list[int],
    guidance_scale: float | None,
    cond_first: bool,
    guided_channels: int | None,
    sample_shape: list[int],
    sample_dtype: torch.dtype,
    output_shape: list[int],
    output_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    guidance = Guidance(guidance_scale, cond_first, guided_channels)
    call = Call(table, step if step_tensor is None else step_tensor, grad_y.dtype, guidance, mask=mask)
    sample = Like(torch.Size(sample_shape), sample_dtype)
    output = Like(torch.Size(output_shape), output_dtype)
    return cast(tuple[Tensor, Tensor], run_backward(call, order, sample, output, grad_y, grad_m))


def _backward_fake(grad_y: Tensor, grad_m: Tensor | None, table: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    order, (sample_shape, sample_dtype, output_shape, output_dtype) = rest[3], rest[7:]
    return (
        reference.ordered_empty(sample_shape, order, sample_dtype, grad_y.device),
        reference.ordered_empty(output_shape, order, output_dtype, grad_y.device),
    )


def _step_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    sample, model_output, table, step_tensor, step, history, noise, *_ = inputs
    mask = inputs[9] if inputs[9] is not None else (output[2] if inputs[18] else None)
    ctx.save_for_backward(table, step_tensor, mask)
    ctx.set_materialize_grads(False)
    ctx.step, ctx.guidance, ctx.want_x0 = step, inputs[12:15], inputs[17]
    ctx.order = (
        inputs[10]
        if inputs[10] is not None
        else reference.iteration_order(output[0].shape, output[0].stride())
    )
    ctx.sample, ctx.output = (sample.shape, sample.dtype), (model_output.shape, model_output.dtype)
    ctx.noise_dtype, ctx.history_dtypes = None if noise is None else noise.dtype, [h.dtype for h in history]


def _step_backward(ctx: Any, grad_y: Tensor | None, grad_m: Tensor | None, _bits: Any) -> tuple[Any, ...]:
    table, step_tensor, mask = ctx.saved_tensors
    if grad_y is None and grad_m is not None:
        grad_y = torch.zeros_like(grad_m)
    nothing: list[Any] = [None] * 20
    if grad_y is None:
        return tuple(nothing)
    gx, go = torch.ops.kdfast.denoise_step_backward(
        grad_y,
        grad_m if ctx.want_x0 else None,
        table,
        step_tensor,
        ctx.step,
        mask,
        list(ctx.order),
        *ctx.guidance,
        *ctx.sample,
        *ctx.output,
    )
    row = table[ctx.step] if step_tensor is None else table.index_select(0, step_tensor.reshape(1)).squeeze(0)
    gh = [(grad_y * row[5 + at]).to(dtype) for at, dtype in enumerate(ctx.history_dtypes)]
    gz = None if ctx.noise_dtype is None else (grad_y * row[8]).to(ctx.noise_dtype)
    return (gx, go, None, None, None, gh, gz, *nothing[7:])


def _backward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    grad_y, grad_m, table, step_tensor, step, mask, order, *guidance = inputs[:10]
    ctx.save_for_backward(table, step_tensor, mask)
    ctx.step, ctx.order, ctx.guidance = step, order, guidance
    ctx.dtype, ctx.m_dtype = grad_y.dtype, None if grad_m is None else grad_m.dtype


def _backward_backward(ctx: Any, ggx: Tensor, ggo: Tensor) -> tuple[Any, ...]:
    table, step_tensor, mask = ctx.saved_tensors
    y, m, _ = torch.ops.kdfast.denoise_step(
        ggx, ggo, table, step_tensor, ctx.step, [], None, None, None, mask, list(ctx.order), ctx.dtype,
        *ctx.guidance, False, None, ctx.m_dtype is not None, False, ctx.m_dtype,
    )  # fmt: skip
    return (y, m if ctx.m_dtype is not None else None, *([None] * 12))


_registered = torch.library.custom_op(
    "kdfast::denoise_step", _step_impl, mutates_args=(), schema=_STEP_SCHEMA
)
_registered.register_fake(_step_fake)
_registered.register_autograd(_step_backward, setup_context=_step_setup)
_registered_backward = torch.library.custom_op(
    "kdfast::denoise_step_backward", _backward_impl, mutates_args=(), schema=_BACKWARD_SCHEMA
)
_registered_backward.register_fake(_backward_fake)
_registered_backward.register_autograd(_backward_backward, setup_context=_backward_setup)

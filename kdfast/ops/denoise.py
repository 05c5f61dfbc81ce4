"""The denoising step as an op: choice of backend, autograd, and registration for torch.compile.

Eager calls go straight to the kernel or the reference (through an ``autograd.Function`` when a gradient is
wanted); traced ones to the registered ops ``kdfast::denoise_step`` and ``kdfast::denoise_step_backward``. The
step is linear but for its clamp, so forward and backward are each other's derivative, to any order.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from kdfast import backend
from kdfast.reference import denoise as reference
from kdfast.reference.denoise import COLUMNS, NO_GUIDANCE, Guidance

__all__ = ["COLUMNS", "NO_GUIDANCE", "Guidance", "StepResult", "denoise_step", "guided_output"]


class StepResult(NamedTuple):
    """What one step gives: the next sample y, the predicted x₀ and the next model input (if asked for)."""

    y: Tensor
    x0: Tensor | None
    model_input: Tensor | None


@dataclass(frozen=True)
class _Call:
    """One step's arguments that no gradient flows to.

    Attributes:
        order: The iteration order of ``mask``; y is laid out in it. None: as the sample.
        mask: Bits of an earlier clamp, applied instead of clamping.
    """

    table: Tensor
    step: int | Tensor
    dtype: torch.dtype
    guidance: Guidance = NO_GUIDANCE
    seed: int | Tensor | None = None
    learned_variance: bool = False
    clip: float | None = None
    want_x0: bool = False
    order: tuple[int, ...] | None = None
    mask: Tensor | None = None


@functools.cache
def _kernels() -> ModuleType:
    import kdfast.kernels.denoise as kernels

    return cast(ModuleType, kernels)


def _implementation(*tensors: Tensor | None) -> Any:
    return _kernels() if backend.resolve(*tensors) == "triton" else reference


def _run(
    call: _Call,
    sample: Tensor,
    model_output: Tensor,
    noise: Tensor | None,
    history: Sequence[Tensor],
    *,
    want_mask: bool = False,
    next_dtype: torch.dtype | None = None,
    next_copies: int = 1,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    return cast(
        tuple[Tensor, Tensor | None, Tensor | None, Tensor | None],
        _implementation(sample, model_output, call.table, noise, *history).denoise_step(
            sample,
            model_output,
            call.table,
            call.step,
            dtype=call.dtype,
            guidance=call.guidance,
            history=history,
            noise=noise,
            seed=call.seed,
            learned_variance=call.learned_variance,
            clip=call.clip,
            mask=call.mask,
            order=call.order,
            want_x0=call.want_x0,
            want_mask=want_mask,
            next_dtype=next_dtype,
            next_copies=next_copies,
        ),
    )


class _Like(NamedTuple):
    """Shape and dtype of a gradient; None where it is not wanted."""

    shape: torch.Size
    dtype: torch.dtype

    def empty(self, order: Sequence[int], device: torch.device, channels: int | None) -> Tensor:
        gradient = reference.ordered_empty(self.shape, order, self.dtype, device)
        if channels is not None and len(self.shape) > 1 and self.shape[1] > channels:
            gradient.narrow(1, channels, self.shape[1] - channels).zero_()  # read by no step
        return gradient


def _run_backward(
    call: _Call,
    order: Sequence[int],
    sample: _Like | None,
    model_output: _Like | None,
    grad_y: Tensor,
    grad_m: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    channels = grad_y.shape[1] if grad_y.dim() > 1 else None
    gx = None if sample is None else sample.empty(order, grad_y.device, None)
    go = None if model_output is None else model_output.empty(order, grad_y.device, channels)
    _implementation(grad_y, grad_m, call.table, gx, go).denoise_step_backward(
        grad_y,
        grad_m,
        call.table,
        call.step,
        grad_sample=gx,
        grad_output=go,
        order=order,
        guidance=call.guidance,
        mask=call.mask,
    )
    return gx, go


class _Step(torch.autograd.Function):
    """y and m of one step; gradients to sample, model output, noise and history."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, sample: Tensor, model_output: Tensor, noise: Tensor | None, call: _Call, *history: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        y, m, bits, _ = _run(call, sample, model_output, noise, history, want_mask=call.clip is not None)
        ctx.set_materialize_grads(False)
        # The step may live on the device and be advanced in place: saving it makes a late change an error.
        ctx.save_for_backward(*(t if isinstance(t, Tensor) else None for t in (bits, call.mask, call.step)))
        ctx.call, ctx.order = call, reference.iteration_order(y)
        ctx.likes = tuple(
            _Like(t.shape, t.dtype) if needed else None
            for t, needed in zip((sample, model_output), ctx.needs_input_grad[:2], strict=True)
        )
        ctx.noise_dtype = None if noise is None else noise.dtype
        ctx.history_dtypes = [h.dtype for h in history]
        return y, m

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, grad_m: Tensor | None) -> Any:  # type: ignore[override]
        bits, mask, step = ctx.saved_tensors
        call: _Call = replace(
            ctx.call,
            mask=bits if bits is not None else mask,
            step=step if step is not None else ctx.call.step,
            clip=None,
            seed=None,
            order=ctx.order,
        )
        if grad_y is None:
            if grad_m is None:
                return (None,) * (4 + len(ctx.history_dtypes))
            grad_y = torch.zeros_like(grad_m)
        gx = go = None
        if any(ctx.likes):
            gx, go = _Backward.apply(grad_y, grad_m, call, *ctx.likes)
        row = reference.coefficients(call.table, call.step)
        need = ctx.needs_input_grad
        gz = (grad_y * row[8]).to(ctx.noise_dtype) if need[2] else None
        gh = [
            (grad_y * factor).to(dtype) if needed else None
            for dtype, factor, needed in zip(ctx.history_dtypes, row[5:8], need[4:], strict=False)
        ]
        return gx, go, gz, None, *gh


class _Backward(torch.autograd.Function):
    """Gradients of one step, themselves differentiable: their derivative is the step without its clamp."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        grad_y: Tensor,
        grad_m: Tensor | None,
        call: _Call,
        sample: _Like | None,
        model_output: _Like | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*(t if isinstance(t, Tensor) else None for t in (call.mask, call.step)))
        ctx.call, ctx.shape, ctx.device = call, grad_y.shape, grad_y.device
        ctx.dtypes = (grad_y.dtype, None if grad_m is None else grad_m.dtype)
        ctx.likes = (sample, model_output)
        return _run_backward(call, cast(tuple[int, ...], call.order), sample, model_output, grad_y, grad_m)

    @staticmethod
    def backward(ctx: Any, ggx: Tensor | None, ggo: Tensor | None) -> Any:  # type: ignore[override]
        if ggx is None and ggo is None:
            return None, None, None, None, None
        mask, step = ctx.saved_tensors
        call: _Call = replace(
            ctx.call,
            mask=mask,
            step=step if step is not None else ctx.call.step,
            dtype=ctx.dtypes[0],
            want_x0=ctx.dtypes[1] is not None,
        )
        sample, output = ctx.likes
        if ggx is None:
            ggx = torch.zeros(ctx.shape, dtype=ctx.dtypes[0], device=ctx.device)
        if ggo is None:
            rows = ctx.shape[0] * (1 if call.guidance.scale is None else 2)
            ggo = torch.zeros((rows, *ctx.shape[1:]), dtype=ctx.dtypes[0], device=ctx.device)
        y, m = _Step.apply(ggx, ggo, None, call)
        return y, m, None, None, None


def guided_output(model_output: Tensor, sample: Tensor, guidance: Guidance) -> Tensor:
    """The output after guidance, with the sample's rows and channels, in float32 at least; differentiable."""
    _check_guided(sample, model_output, guidance, None, ())
    return reference.guide(model_output, sample.shape[0], sample.shape[1], guidance)


def _traced(*tensors: Tensor | None) -> bool:
    """Whether a compiler or a tensor subclass is to see an op, rather than what it does."""
    if torch.compiler.is_compiling():
        return True
    return any(type(t) not in (Tensor, torch.nn.Parameter) for t in tensors if t is not None)


def denoise_step(
    sample: Tensor,
    model_output: Tensor,
    table: Tensor,
    step: int | Tensor,
    *,
    guidance: Guidance = NO_GUIDANCE,
    history: Sequence[Tensor] = (),
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    learned_variance: bool = False,
    clip: float | None = None,
    want_x0: bool = False,
    next_dtype: torch.dtype | None = None,
    next_copies: int = 1,
) -> StepResult:
    """One step of a linear sampler; the equation is in kernels/denoise.py.

    Args:
        sample: x ``[B, C, …]`` (or ``[2B, C, …]`` beside a guided output), any strides.
        model_output: o ``[B, ≥ C, …]``, guided ``[2B, ≥ C, …]``; channels after C are not read (but as v).
        table: Coefficients ``[steps, 10]`` on the sample's device, columns :data:`COLUMNS`; float32, or float64
            when any input is.
        step: Row of the table, an int or an integer tensor of one element (not checked on a GPU: the result of a
            step outside the table is NaN).
        guidance: How the halves of ``model_output`` combine.
        history: Up to three earlier predictions, of the sample's shape.
        noise: z, of the sample's shape.
        seed: Key of noise that the op makes itself, instead of ``noise``.
        learned_variance: Channels C … 2C − 1 of the output hold v, and z is multiplied by exp(c + d3·v).
        clip: Clamp the predicted x₀ to ±clip.
        want_x0: Also return the predicted x₀.
        next_dtype: Also return s·y in this dtype.
        next_copies: Times that s·y is repeated along the batch.

    Returns:
        y and x₀ in the inputs' promoted dtype, with the sample's strides; gradients flow to ``sample``,
        ``model_output``, ``noise`` and ``history``.

    Raises:
        ValueError: Shapes, devices or dtypes that do not fit together.
        TypeError: Inputs that are not floating-point.
    """
    inputs = [sample, model_output, *history] + ([] if noise is None else [noise])
    dtype = _check(inputs, sample, model_output, table, step, guidance, noise, seed, history)
    if guidance.scale is None and any(t.shape != sample.shape for t in inputs) and not learned_variance:
        sample, model_output, noise, history = _broadcast(sample, model_output, noise, history)
    graded = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    if graded:
        if learned_variance and model_output.requires_grad:
            raise ValueError("model_output requires grad, but a learned variance has no gradient; detach it")
        if guidance.scale is not None and sample.shape[0] == model_output.shape[0]:
            # Both halves of the sample read both halves of the output: too rare for a kernel of its own.
            channels = sample.shape[1] if sample.dim() > 1 else None
            model_output = reference.guide(model_output, sample.shape[0], channels, guidance)
            guidance = NO_GUIDANCE
    call = _Call(table, step, dtype, guidance, seed, learned_variance, clip, want_x0)
    if _traced(*inputs):
        y, m = _run_registered(call, sample, model_output, noise, history, graded)
    elif graded:
        y, m = _Step.apply(sample, model_output, noise, call, *history)
    else:
        y, m, _, following = _run(
            call, sample, model_output, noise, history, next_dtype=next_dtype, next_copies=next_copies
        )
        return StepResult(y, m, following)
    following = None
    if next_dtype is not None:
        scaled = (y * reference.coefficients(table, step)[9]).to(next_dtype)
        following = torch.cat([scaled] * next_copies)
    return StepResult(y, m, following)


def _broadcast(
    sample: Tensor, model_output: Tensor, noise: Tensor | None, history: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor | None, Sequence[Tensor]]:
    if (
        sample.dim() > 1
        and model_output.dim() == sample.dim()
        and model_output.shape[1] > sample.shape[1] > 1
    ):
        model_output = model_output.narrow(1, 0, sample.shape[1])
    present = [sample, model_output, *history] + ([] if noise is None else [noise])
    try:
        shape = torch.broadcast_shapes(*(t.shape for t in present))
    except RuntimeError:
        shapes = ", ".join(str(tuple(t.shape)) for t in present)
        raise ValueError(
            f"sample, model_output, history and noise must broadcast to one shape (model_output may have more "
            f"channels), got {shapes}"
        ) from None
    expanded = [t.expand(shape) for t in present]
    noise = expanded.pop() if noise is not None else None
    return expanded[0], expanded[1], noise, expanded[2:]


def _check(
    inputs: Sequence[Tensor],
    sample: Tensor,
    model_output: Tensor,
    table: Tensor,
    step: int | Tensor,
    guidance: Guidance,
    noise: Tensor | None,
    seed: int | Tensor | None,
    history: Sequence[Tensor],
) -> torch.dtype:
    """Refuse what does not fit; the dtype of the result."""
    dtype = sample.dtype
    for tensor in inputs:
        if not tensor.is_floating_point():
            raise TypeError(
                f"sample, model_output, history and noise must be floating-point, got {tensor.dtype}"
            )
        if tensor.device != sample.device:
            raise ValueError(f"all inputs must be on one device, got {sample.device} and {tensor.device}")
        if tensor.dtype != dtype:
            dtype = torch.promote_types(dtype, tensor.dtype)
    if table.dim() != 2 or table.shape[1] != len(COLUMNS) or not table.is_contiguous():
        raise ValueError(
            f"coefficients: must be a contiguous [steps, {len(COLUMNS)}] table with columns "
            f"{', '.join(COLUMNS)}, got shape {tuple(table.shape)}"
        )
    wanted = (torch.float64,) if dtype == torch.float64 else (torch.float32, torch.float64)
    if table.dtype not in wanted or (table.dtype == torch.float64 and dtype != torch.float64):
        raise ValueError(
            f"coefficients: must be {'float64' if dtype == torch.float64 else 'float32'} for {dtype} inputs, "
            f"got {table.dtype}"
        )
    if table.requires_grad:
        raise ValueError("coefficients: no gradient flows to them; detach the table")
    if table.device != sample.device:
        raise ValueError(f"coefficients: must be on {sample.device} like the sample, got {table.device}")
    if isinstance(step, Tensor):
        if step.numel() != 1 or step.is_floating_point() or step.device != sample.device:
            raise ValueError(
                f"step: must be an int, or an integer tensor of one element on {sample.device}, "
                f"got {step.dtype} {tuple(step.shape)} on {step.device}"
            )
    elif not 0 <= step < table.shape[0]:
        raise ValueError(f"step: must be in [0, {table.shape[0]}), the rows of the table, got {step}")
    if noise is not None and seed is not None:
        raise ValueError("noise and seed: give one of them, got both")
    if len(history) > 3:
        raise ValueError(f"history: at most 3 tensors, got {len(history)}")
    if guidance.scale is not None:
        _check_guided(sample, model_output, guidance, noise, history)
    return dtype


def _check_guided(
    sample: Tensor, model_output: Tensor, guidance: Guidance, noise: Tensor | None, history: Sequence[Tensor]
) -> None:
    rows, given = model_output.shape[0] if model_output.dim() else 0, tuple(model_output.shape)
    if (
        sample.dim() < 2
        or model_output.dim() != sample.dim()
        or rows % 2
        or sample.shape[0] not in (rows, rows // 2)
        or model_output.shape[1] < sample.shape[1]
        or model_output.shape[2:] != sample.shape[2:]
    ):
        raise ValueError(
            f"guidance takes a model_output with two rows and at least one channel for each of the sample's (whose "
            f"rows may be doubled too): sample {tuple(sample.shape)}, model_output {given}"
        )
    if guidance.channels is not None and not 0 <= guidance.channels <= sample.shape[1]:
        raise ValueError(f"cfg_channels: must be in [0, {sample.shape[1]}], got {guidance.channels}")
    for other in [*history] + ([] if noise is None else [noise]):
        if other.shape != sample.shape:
            raise ValueError(
                f"noise and history must have the sample's shape {tuple(sample.shape)}, got {tuple(other.shape)}"
            )


# --- registered ops, for torch.compile, export and fake tensors -----------------------------------

_STEP_SCHEMA = (
    "(Tensor sample, Tensor model_output, Tensor table, Tensor? step_tensor, SymInt step, Tensor[] history, "
    "Tensor? noise, Tensor? seed_tensor, int? seed, Tensor? mask, int[]? order, ScalarType dtype, "
    "float? guidance_scale, bool cond_first, int? guided_channels, bool learned_variance, float? clip, "
    "bool want_x0, bool want_mask) -> (Tensor, Tensor, Tensor)"
)
_BACKWARD_SCHEMA = (
    "(Tensor grad_y, Tensor? grad_m, Tensor table, Tensor? step_tensor, SymInt step, Tensor? mask, int[] order, "
    "float? guidance_scale, bool cond_first, int? guided_channels, SymInt[] sample_shape, ScalarType sample_dtype, "
    "SymInt[] output_shape, ScalarType output_dtype) -> (Tensor, Tensor)"
)


def _run_registered(
    call: _Call,
    sample: Tensor,
    model_output: Tensor,
    noise: Tensor | None,
    history: Sequence[Tensor],
    graded: bool,
) -> tuple[Tensor, Tensor | None]:
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
) -> tuple[Tensor, Tensor, Tensor]:
    call = _Call(
        table,
        step if step_tensor is None else step_tensor,
        dtype,
        Guidance(guidance_scale, cond_first, guided_channels),
        seed if seed_tensor is None else seed_tensor,
        learned_variance,
        clip,
        want_x0,
        None if order is None else tuple(order),
        mask,
    )
    y, m, bits, _ = _run(call, sample, model_output, noise, history, want_mask=want_mask)
    return y, y.new_empty(0) if m is None else m, _no_bits(y) if bits is None else bits


def _no_bits(like: Tensor) -> Tensor:
    return like.new_empty(0, dtype=torch.uint8)


def _step_fake(
    sample: Tensor, model_output: Tensor, table: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    order, dtype, want_x0, want_mask = rest[7], rest[8], rest[14], rest[15]
    if order is None:
        y = torch.empty_like(sample, dtype=dtype)
    else:
        y = reference.ordered_empty(sample.shape, order, dtype, sample.device)
    bits = y.new_empty((y.numel() + 7) // 8, dtype=torch.uint8) if want_mask else _no_bits(y)
    return y, torch.empty_like(y) if want_x0 else y.new_empty(0), bits


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
    call = _Call(table, step if step_tensor is None else step_tensor, grad_y.dtype, guidance, mask=mask)
    sample = _Like(torch.Size(sample_shape), sample_dtype)
    output = _Like(torch.Size(output_shape), output_dtype)
    return cast(tuple[Tensor, Tensor], _run_backward(call, order, sample, output, grad_y, grad_m))


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
    ctx.order = inputs[10] if inputs[10] is not None else reference.iteration_order(output[0])
    ctx.sample, ctx.output = (sample.shape, sample.dtype), (model_output.shape, model_output.dtype)
    ctx.noise_dtype, ctx.history_dtypes = None if noise is None else noise.dtype, [h.dtype for h in history]


def _step_backward(ctx: Any, grad_y: Tensor | None, grad_m: Tensor | None, _bits: Any) -> tuple[Any, ...]:
    table, step_tensor, mask = ctx.saved_tensors
    if grad_y is None and grad_m is not None:
        grad_y = torch.zeros_like(grad_m)
    nothing: list[Any] = [None] * 19
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
    ctx.dtype, ctx.has_m = grad_y.dtype, grad_m is not None


def _backward_backward(ctx: Any, ggx: Tensor, ggo: Tensor) -> tuple[Any, ...]:
    table, step_tensor, mask = ctx.saved_tensors
    y, m, _ = torch.ops.kdfast.denoise_step(
        ggx, ggo, table, step_tensor, ctx.step, [], None, None, None, mask, list(ctx.order), ctx.dtype,
        *ctx.guidance, False, None, ctx.has_m, False,
    )  # fmt: skip
    return (y, m if ctx.has_m else None, *([None] * 12))


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

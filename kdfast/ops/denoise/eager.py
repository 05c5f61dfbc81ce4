"""The denoising step as an op: choice of backend, autograd, and registration for torch.compile.

Eager calls go straight to the kernel or the reference (through an ``autograd.Function`` when a gradient is
wanted); traced ones to the registered ops ``kdfast::denoise_step`` and ``kdfast::denoise_step_backward``. The
step is linear but for its clamp, so forward and backward are each other's derivative, to any order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from kdfast.ops.denoise import native
from kdfast.ops.denoise.check import broadcast, check, check_guided, check_learned
from kdfast.ops.denoise.registered import run_registered
from kdfast.ops.denoise.run import Call, Like, implementation, run, run_backward
from kdfast.reference import denoise as reference
from kdfast.reference.denoise import NO_GUIDANCE, Guidance

__all__ = ["StepResult", "denoise_step", "guided_output", "predicted_variance"]


class StepResult(NamedTuple):
    """What one step gives: the next sample y, the predicted x₀ and the next model input (if asked for)."""

    y: Tensor
    x0: Tensor | None
    model_input: Tensor | None


def _apply(function: type[torch.autograd.Function], *args: Any) -> tuple[Any, ...]:
    return cast(tuple[Any, ...], function.apply(*args))  # type: ignore[no-untyped-call]


class _Step(torch.autograd.Function):
    """y and m of one step; gradients to sample, model output, noise and history."""

    @staticmethod
    def forward(
        ctx: Any, sample: Tensor, model_output: Tensor, noise: Tensor | None, call: Call, *history: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        y, m, bits, _ = run(call, sample, model_output, noise, history, want_mask=call.clip is not None)
        ctx.set_materialize_grads(False)
        # The step may live on the device and be advanced in place: saving it makes a late change an error.
        ctx.save_for_backward(*(t if isinstance(t, Tensor) else None for t in (bits, call.mask, call.step)))
        ctx.call, ctx.order = call, reference.iteration_order(y.shape, y.stride())
        ctx.likes = tuple(
            Like(t.shape, t.dtype) if needed else None
            for t, needed in zip((sample, model_output), ctx.needs_input_grad[:2], strict=True)
        )
        ctx.noise_dtype = None if noise is None else noise.dtype
        ctx.history_dtypes = [h.dtype for h in history]
        return y, m

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, grad_m: Tensor | None) -> Any:
        bits, mask, step = ctx.saved_tensors
        call: Call = replace(
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
            gx, go = _apply(_Backward, grad_y, grad_m, call, *ctx.likes)
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
    def forward(
        ctx: Any,
        grad_y: Tensor,
        grad_m: Tensor | None,
        call: Call,
        sample: Like | None,
        model_output: Like | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*(t if isinstance(t, Tensor) else None for t in (call.mask, call.step)))
        ctx.call, ctx.shape, ctx.device = call, grad_y.shape, grad_y.device
        ctx.dtypes = (grad_y.dtype, None if grad_m is None else grad_m.dtype)
        ctx.likes = (sample, model_output)
        return run_backward(call, cast(tuple[int, ...], call.order), sample, model_output, grad_y, grad_m)

    @staticmethod
    def backward(ctx: Any, ggx: Tensor | None, ggo: Tensor | None) -> Any:
        if ggx is None and ggo is None:
            return None, None, None, None, None
        mask, step = ctx.saved_tensors
        call: Call = replace(
            ctx.call,
            mask=mask,
            step=step if step is not None else ctx.call.step,
            dtype=ctx.dtypes[0],
            want_x0=ctx.dtypes[1] is not None,
            x0_dtype=ctx.dtypes[1],
        )
        if ggx is None:
            ggx = torch.zeros(ctx.shape, dtype=ctx.dtypes[0], device=ctx.device)
        if ggo is None:
            rows = ctx.shape[0] * (1 if call.guidance.scale is None else 2)
            ggo = torch.zeros((rows, *ctx.shape[1:]), dtype=ctx.dtypes[0], device=ctx.device)
        y, m = _apply(_Step, ggx, ggo, None, call)
        return y, m, None, None, None


def guided_output(model_output: Tensor, sample: Tensor, guidance: Guidance) -> Tensor:
    """The output after guidance, with the sample's rows and channels, in float32 at least; differentiable."""
    check_guided(sample, model_output, guidance, None, ())
    return reference.guide(model_output, sample.shape[0], sample.shape[1], guidance)


def predicted_variance(model_output: Tensor, sample: Tensor, guidance: Guidance) -> Tensor:
    """What the model says of the variance, for each of the sample's elements; never guided."""
    check_learned(sample, model_output, ())
    return reference.variance(model_output, sample, guidance)


def _traced(*tensors: Tensor | None) -> bool:
    """Whether a compiler or a tensor subclass is to see an op, rather than what it does."""
    if torch.compiler.is_compiling():
        return True
    for tensor in tensors:  # a loop: a generator costs more than what it looks at
        if tensor is not None and type(tensor) is not Tensor and type(tensor) is not torch.nn.Parameter:
            return True
    return False


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
    dtype: torch.dtype | None = None,
    x0_dtype: torch.dtype | None = None,
    next_dtype: torch.dtype | None = None,
    next_copies: int = 1,
) -> StepResult:
    """One step of a linear sampler; the equation is in kernels/denoise/.

    Args:
        sample: x ``[B, C, …]`` (or ``[2B, C, …]`` beside a guided output), any strides.
        model_output: o ``[B, ≥ C, …]``, guided ``[2B, ≥ C, …]``; channels after C are not read (but as v).
        table: Coefficients ``[steps, 10]`` on the sample's device, columns
            :data:`~kdfast.reference.denoise.COLUMNS`; float32, or float64 when any input is.
        step: Row of the table, an int or an integer tensor of one element (not checked on a GPU: the result
            of a step outside the table is NaN).
        guidance: How the halves of ``model_output`` combine.
        history: Up to three earlier predictions, of the sample's shape.
        noise: z, of the sample's shape.
        seed: Key of noise that the op makes itself, instead of ``noise``.
        learned_variance: Channels C … 2C − 1 of the output hold v, and z is multiplied by exp(c + d3·v).
        clip: Clamp the predicted x₀ to ±clip.
        want_x0: Also return the predicted x₀.
        dtype: Of y, if not the promoted dtype of the inputs.
        x0_dtype: Of x₀, if not y's.
        next_dtype: Also return s·y in this dtype.
        next_copies: Times that s·y is repeated along the batch.

    Returns:
        y and x₀ with the sample's strides; gradients flow to ``sample``,
        ``model_output``, ``noise`` and ``history``.

    Raises:
        ValueError: Shapes, devices or dtypes that do not fit together.
        TypeError: Inputs that are not floating-point.
    """
    inputs = [sample, model_output, *history] + ([] if noise is None else [noise])
    promoted = check(inputs, sample, model_output, table, step, guidance, noise, seed, history)
    if learned_variance:
        check_learned(sample, model_output, [*history] + ([] if noise is None else [noise]))
    if guidance.scale is None and any(t.shape != sample.shape for t in inputs) and not learned_variance:
        sample, model_output, noise, history = broadcast(sample, model_output, noise, history)
        inputs = [sample, model_output, *history] + ([] if noise is None else [noise])
    graded = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    if graded:
        if learned_variance and model_output.requires_grad:
            raise ValueError("model_output requires grad, but a learned variance has no gradient; detach it")
        if guidance.scale is not None and sample.shape[0] == model_output.shape[0]:
            # Both halves of the sample read both halves of the output: too rare for a kernel of its own.
            channels = sample.shape[1] if sample.dim() > 1 else None
            model_output = reference.guide(model_output, sample.shape[0], channels, guidance)
            guidance = NO_GUIDANCE
    traced = _traced(*inputs)
    if not traced and not graded:
        by = implementation(*inputs, table)
        options = {
            "dtype": dtype or promoted,
            "seed": seed,
            "learned_variance": learned_variance,
            "x0_dtype": x0_dtype,
            "next_dtype": next_dtype,
        }
        common: dict[str, Any] = {
            "guidance": guidance,
            "history": history,
            "noise": noise,
            "clip": clip,
            "want_x0": want_x0,
        }
        if by is reference and native.fits(inputs, table, step, guidance, options):
            return StepResult(
                *native.denoise_step(sample, model_output, table, cast(int, step), **common), None
            )
        y, m, _, following = by.denoise_step(
            sample, model_output, table, step, **common, **options, next_copies=next_copies
        )
        return StepResult(y, m, following)
    call = Call(table, step, dtype or promoted, guidance, seed, learned_variance, clip, want_x0, x0_dtype)
    if traced:
        y, m = run_registered(call, sample, model_output, noise, history, graded)
    else:
        y, m = _apply(_Step, sample, model_output, noise, call, *history)
    following = None
    if next_dtype is not None:
        scaled = (y * reference.coefficients(table, step)[9]).to(next_dtype)
        following = torch.cat([scaled] * next_copies)
    return StepResult(y, m, following)

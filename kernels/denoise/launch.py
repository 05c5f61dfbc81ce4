"""Launch of the denoising step and its gradient; the equation is in the package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..common.strided import Strides, Walk, contiguous, iteration_order, walk, walk_blocks
from ..launch import Launches, Planned
from .bodies import denoise_step_backward_kernel, denoise_step_kernel
from .plan import step_plan

#: How both halves of a batched model output are read: the scale g, or None for one output a sample; whether the first
#: half is the conditional one; how many channels are guided, or None for all (kdfast.reference.denoise.Guidance).
Guidance = tuple[float | None, bool, int | None]
NO_GUIDANCE: Guidance = (None, True, None)


class _Frame(NamedTuple):
    """The common shape of all operands; the halves of a doubled sample are a dimension of their own."""

    shape: tuple[int, ...]
    output: Strides  # of the model output, 0 along the halves
    own: Strides  # of the model output, each half its own rows
    cond: int  # offset of the conditional half
    uncond: int
    pinned: int  # the channel dimension, if it has to stay apart
    doubled: bool

    def spread(self, strides: Strides) -> Strides:
        """Strides in this frame of a tensor of the sample's shape."""
        return (strides[0] * self.shape[1], *strides) if self.doubled else strides


def _frame(shape: tuple[int, ...], rows: int, strides: Strides, guidance: Guidance) -> _Frame:
    """The frame of a sample of ``shape`` beside a model output of ``rows`` and ``strides``."""
    scale, cond_first, channels = guidance
    if scale is None:
        return _Frame(shape, strides, strides, 0, 0, -1, False)
    batch = rows // 2
    doubled = shape[0] == 2 * batch and batch > 0
    first, second = 0, batch * strides[0]
    cond, uncond = (first, second) if cond_first else (second, first)
    partial = channels is not None and channels < shape[1]
    if not doubled:
        return _Frame(shape, strides, strides, cond, uncond, 1 if partial else -1, False)
    frame = (2, batch, *shape[1:])
    return _Frame(frame, (0, *strides), (second, *strides), cond, uncond, 2 if partial else -1, True)


def _launch_constants(plan: Walk) -> tuple[tuple[int], dict[str, Any]]:
    """The grid, and the compile-time constants that both kernels share."""
    programs, constants = walk_blocks(plan, step_plan(plan.numel))
    return (programs,), constants | {"PINNED": plan.pinned}


def _planned(
    shape: tuple[int, ...],
    output: tuple[int, Strides],
    strides: tuple[Strides | None, ...],
    guidance: Guidance,
    seed_rows: int,
    steps: int,
    flags: tuple[tuple[str, Any], ...],
) -> Planned:
    """Plan the step of a sample of ``shape``; ``strides`` in the order of :data:`_OPERANDS`, Y first.

    Only what is read takes part: each further tensor may keep dimensions from merging. ``seed_rows``: 0 without a seed.
    """
    rows, output_strides = output
    (scale, _, channels), told = guidance, dict(flags)
    frame = _frame(shape, rows, output_strides, guidance)
    walked = {
        name: frame.spread(own) for name, own in zip(_OPERANDS, strides, strict=True) if own is not None
    }
    walked["OUT"] = frame.output
    if frame.doubled:
        walked["OWN"] = frame.own
    if seed_rows:
        walked["E"] = contiguous(frame.shape)
    order = iteration_order(frame.shape, walked["Y"])
    plan = walk(frame.shape, order, tuple(walked.values()), pinned=frame.pinned, aligned=8)
    grid, constants = _launch_constants(plan)
    found = dict(zip(walked, plan.strides, strict=True))
    element = found.get("E")
    # One seed for the batch, or one for each of its rows, in elements a row.
    seed_row = plan.numel // seed_rows if seed_rows > 1 else 0
    constants |= {name: found.get(name) for name in (*_OPERANDS, "OUT", "OWN", "E")} | told
    constants.update(
        GUIDED=scale is not None,
        OWN_ROWS=frame.doubled,
        HAS_SEED=seed_rows > 0,
        SEED_ROW=seed_row,
        # Four neighbours share a Philox counter where a block holds whole groups of them.
        SEED_RUN=plan.rows
        and element is not None
        and element[0] == 1
        and not any(s % 4 for s in (*element[1:], seed_row)),
    )
    variance = 0
    if told["LEARNED"]:
        # v is never guided: it comes from the conditional half, or from each half's own rows.
        variance = (0 if frame.doubled else frame.cond) + shape[1] * output_strides[1]
    following = strides[_OPERANDS.index("NEXT")]
    copy = 0 if following is None else shape[0] * following[0]
    fixed = (steps, plan.numel, plan.inner, frame.cond, frame.uncond, variance, copy)
    return grid, fixed, constants | {"guided_channels": channels or 0}


_OPERANDS = ("Y", "X", "H1", "H2", "H3", "Z", "M", "NEXT")


def ordered_empty(
    shape: Sequence[int], order: Sequence[int], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """An empty tensor, dense, with its dimensions from the outermost to the innermost as in ``order``."""
    strides, step = [0] * len(shape), 1
    for dim in reversed(order):
        strides[dim] = step
        step *= max(1, shape[dim])
    return torch.empty_strided(tuple(shape), strides, dtype=dtype, device=device)


def mask_bytes(numel: int) -> int:
    """Size of a clip mask: one bit an element, in the iteration order of y."""
    return (numel + 7) // 8


def denoise_step(
    sample: torch.Tensor,
    model_output: torch.Tensor,
    table: torch.Tensor,
    step: int | torch.Tensor,
    *,
    dtype: torch.dtype,
    guidance: Guidance = NO_GUIDANCE,
    history: Sequence[torch.Tensor] = (),
    noise: torch.Tensor | None = None,
    seed: int | torch.Tensor | None = None,
    learned_variance: bool = False,
    clip: float | None = None,
    mask: torch.Tensor | None = None,
    order: Sequence[int] | None = None,
    want_x0: bool = False,
    x0_dtype: torch.dtype | None = None,
    want_mask: bool = False,
    next_dtype: torch.dtype | None = None,
    next_copies: int = 1,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Launch the step kernel once.

    Args:
        sample: x, any strides.
        model_output: o: the sample's rows (with ``guidance``: both halves), and at least its channels.
        table: float32 ``[steps, 10]``, contiguous, on the sample's device.
        step: Row of the table; an integer tensor of one element is read by the kernel.
        dtype: Of y.
        guidance: How both halves combine.
        history: Up to three tensors h_j of the sample's shape.
        noise: z, of the sample's shape.
        seed: Key of in-kernel noise, instead of ``noise``: one, or a tensor with one for each row of the sample.
        learned_variance: Whether the channels after the sample's hold v.
        clip: Clamp m to ±clip.
        mask: Instead of clamping, zero m where this mask (of an earlier step) has no bit.
        order: Lay y out in this order of dimensions (the mask's), rather than the sample's.
        want_x0: Store m.
        x0_dtype: Of m, if not y's.
        want_mask: Store where the clamp let m through.
        next_dtype: Store n in this dtype.
        next_copies: Times that n is repeated along the batch.

    Returns:
        y, m, mask and n, the latter three None unless asked for.
    """
    y = (
        torch.empty_like(sample, dtype=dtype)
        if order is None
        else ordered_empty(sample.shape, order, dtype, sample.device)
    )
    m = torch.empty_like(y, dtype=x0_dtype or dtype) if want_x0 else None
    bits = torch.empty(mask_bytes(y.numel()), dtype=torch.uint8, device=y.device) if want_mask else None
    following = None
    if next_dtype is not None:
        shape = (next_copies * y.shape[0], *y.shape[1:])
        following = ordered_empty(shape, iteration_order(y.shape, y.stride()), next_dtype, y.device)
    if y.numel() == 0:
        return y, m, bits, following

    hidden = (*history, None, None, None)[:3]
    operands = (y, sample, *hidden, noise, m, following)
    seeds = 0 if seed is None else seed.numel() if isinstance(seed, torch.Tensor) else 1
    scale, cond_first, channels = guidance
    flags = (
        ("STEP_ON_DEVICE", isinstance(step, torch.Tensor)),
        ("SEED_ON_DEVICE", isinstance(seed, torch.Tensor)),
        ("CLIP", clip is not None),
        ("LEARNED", learned_variance),
        ("NEXT_COPIES", next_copies),
    )
    geometry = (
        sample.shape,
        (model_output.shape[0] if model_output.dim() else 1, model_output.stride()),
        tuple([None if x is None else x.stride() for x in operands]),
        # Another scale is the same geometry.
        (None if scale is None else 1.0, cond_first, channels),
        seeds,
        table.shape[0],
        flags,
    )
    _STEP(
        sample.device,
        geometry,
        (
            sample, model_output, *hidden, noise, mask, y, m, following, bits, table,
            step, 0 if seed is None else seed,
        ),
        (1.0 if scale is None else float(scale), 0.0 if clip is None else float(clip)),
    )  # fmt: skip
    return y, m, bits, following


_STEP = Launches(denoise_step_kernel, _planned, ("guidance", "clip"))


def denoise_step_backward(
    grad_y: torch.Tensor,
    grad_m: torch.Tensor | None,
    table: torch.Tensor,
    step: int | torch.Tensor,
    *,
    grad_sample: torch.Tensor | None,
    grad_output: torch.Tensor | None,
    order: Sequence[int],
    guidance: Guidance = NO_GUIDANCE,
    mask: torch.Tensor | None = None,
) -> None:
    """Launch the backward kernel once, into ``grad_sample`` and ``grad_output`` (either may be None).

    Args:
        grad_y: Gradient of y, any strides.
        grad_m: Gradient of m, or None.
        table: As in :func:`denoise_step`.
        step: As in :func:`denoise_step`.
        grad_sample: Written; of the sample's shape.
        grad_output: Written in the sample's channels; of the model output's shape.
        order: The iteration order of y, in which the mask is stored.
        guidance: As in :func:`denoise_step`; the sample must not be doubled.
        mask: The clip mask that :func:`denoise_step` stored.
    """
    if grad_y.numel() == 0:
        return
    scale, cond_first, channels = guidance
    tensors = (grad_y, grad_m, grad_sample)
    geometry = (
        grad_y.shape,
        None if grad_output is None else (grad_output.shape[0], grad_output.stride()),
        tuple(None if x is None else x.stride() for x in tensors),
        tuple(order),
        (None if scale is None else 1.0, cond_first, channels),
        isinstance(step, torch.Tensor),
        table.shape[0],
    )
    varying = (grad_y, grad_m, mask, grad_sample, grad_output, table, step)
    _BACKWARD(grad_y.device, geometry, varying, (1.0 if scale is None else float(scale),))


def _planned_backward(
    shape: tuple[int, ...],
    output: tuple[int, Strides] | None,
    strides: tuple[Strides | None, ...],
    order: tuple[int, ...],
    guidance: Guidance,
    step_on_device: bool,
    steps: int,
) -> Planned:
    """Plan the gradient; ``strides`` of those of y and m, and of the sample's."""
    scale, _, channels = guidance
    frame = None if output is None else _frame(shape, *output, guidance)
    walked = [own for own in strides if own is not None] + ([] if frame is None else [frame.output])
    pinned = -1 if frame is None else frame.pinned
    plan = walk(shape, order, tuple(walked), pinned=pinned, aligned=8)
    grid, constants = _launch_constants(plan)
    found = iter(plan.strides)
    for name, own in zip(("GY", "GM", "GX", "GO"), (*strides, output), strict=True):
        constants[name] = None if own is None else next(found)
    offsets = (0, 0) if frame is None else (frame.cond, frame.uncond)
    constants |= {"STEP_ON_DEVICE": step_on_device, "GUIDED": scale is not None}
    return (
        grid,
        (steps, plan.numel, plan.inner, *offsets),
        constants | {"guided_channels": channels or 0},
    )


_BACKWARD = Launches(denoise_step_backward_kernel, _planned_backward, ("guidance",))

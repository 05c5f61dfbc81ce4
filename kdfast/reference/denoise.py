"""One denoising step in plain PyTorch: the CPU path, and the oracle of kernels/denoise/ (see there)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kdfast.reference.philox import noise, normal_rows

#: Columns of a coefficient table.
COLUMNS = ("px", "po", "a", "b", "d", "d1", "d2", "d3", "c", "s")

Scalar = float | Tensor


class Guidance(NamedTuple):
    """How a batched model output is read.

    Attributes:
        scale: g of classifier-free guidance u + g·(c − u), or None: one output a sample.
        cond_first: Whether the first half of the batch is the conditional one.
        channels: Channels (dimension 1) that are guided; the rest is taken from the conditional half, or,
            when the sample has a row for each half, from its own. None: all.
    """

    scale: float | None = None
    cond_first: bool = True
    channels: int | None = None


NO_GUIDANCE = Guidance()


def iteration_order(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...]:
    """Dimensions from the outermost to the innermost in memory; ties keep their place."""
    return tuple(sorted(range(len(shape)), key=lambda dim: (-strides[dim], -shape[dim], dim)))


def ordered_empty(
    shape: Sequence[int], order: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """An empty tensor, dense, with its dimensions from the outermost to the innermost as in ``order``."""
    strides, step = [0] * len(shape), 1
    for dim in reversed(order):
        strides[dim] = step
        step *= max(1, shape[dim])
    return torch.empty_strided(tuple(shape), strides, dtype=dtype, device=device)


def pack_bits(mask: Tensor, order: Sequence[int]) -> Tensor:
    """One bit an element, lowest first, in ``order``: uint8 ``[⌈numel/8⌉]``."""
    flat = mask.permute(*order).reshape(-1).to(torch.uint8)
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    return (flat << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, shape: Sequence[int], order: Sequence[int]) -> Tensor:
    """The bool tensor of ``shape`` that :func:`pack_bits` packed."""
    bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    permuted = [shape[dim] for dim in order]
    flat = bits.view(-1)[: torch.Size(shape).numel()].view(permuted)
    inverse = [0] * len(permuted)
    for at, dim in enumerate(order):
        inverse[dim] = at
    return flat.permute(*inverse).bool()


def coefficients(table: Tensor, step: int | Tensor) -> list[Scalar]:
    """One row of a table: floats from a CPU table, else 0-d tensors, so that no device is waited for."""
    if isinstance(step, Tensor):
        if table.device.type != "cpu":
            return list(table.index_select(0, step.reshape(1).to(table.device)).squeeze(0).unbind(0))
        step = int(step)
    row = table[step]
    return row.tolist() if table.device.type == "cpu" else list(row.unbind(0))


_WIDE = (torch.float32, torch.float64)


def guide(model_output: Tensor, rows: int, channels: int | None, guidance: Guidance) -> Tensor:
    """Classifier-free guidance: the output that a step of ``rows`` samples with ``channels`` uses.

    Differentiable. Computed in float32 (float64 for float64).
    """
    wide = model_output if model_output.dtype in _WIDE else model_output.float()
    if channels is not None and wide.dim() > 1 and wide.shape[1] != channels:
        wide = wide.narrow(1, 0, channels)
    if guidance.scale is None:
        return wide
    batch = wide.shape[0] // 2
    halves = wide[:batch], wide[batch:]
    cond, uncond = halves if guidance.cond_first else halves[::-1]
    doubled = rows == 2 * batch
    guided = torch.lerp(uncond, cond, guidance.scale)
    if guidance.channels is not None and guidance.channels < guided.shape[1]:
        kept = guidance.channels
        rests = halves if doubled else (cond,)
        return torch.cat([torch.cat([guided[:, :kept], rest[:, kept:]], 1) for rest in rests])
    return torch.cat([guided, guided]) if doubled else guided


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _sum(terms: Sequence[tuple[Tensor, Scalar]]) -> Tensor:
    """Σ factor·tensor, without the terms whose factor is known to be 0; each but the first is one operator."""
    total: Tensor | None = None
    for tensor, factor in terms:
        if isinstance(factor, float):
            if factor == 0.0:
                continue
            total = tensor * factor if total is None else total.add_(tensor, alpha=factor)
        else:
            total = tensor * factor if total is None else total.addcmul_(tensor, factor)
    return torch.zeros_like(terms[0][0]) if total is None else total


def _noise(seed: int | Tensor, step: int | Tensor, like: Tensor) -> Tensor:
    if isinstance(seed, Tensor) and seed.numel() > 1:
        return normal_rows(seed, int(step), tuple(like.shape[1:])).to(like.dtype)
    return noise(seed, int(step), tuple(like.shape), like.device, like.dtype)


def denoise_step(
    sample: Tensor,
    model_output: Tensor,
    table: Tensor,
    step: int | Tensor,
    *,
    dtype: torch.dtype,
    guidance: Guidance = NO_GUIDANCE,
    history: Sequence[Tensor] = (),
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    learned_variance: bool = False,
    clip: float | None = None,
    mask: Tensor | None = None,
    order: Sequence[int] | None = None,
    want_x0: bool = False,
    x0_dtype: torch.dtype | None = None,
    want_mask: bool = False,
    next_dtype: torch.dtype | None = None,
    next_copies: int = 1,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """y, m, clip mask and next input of one step; arguments as those of the kernel's ``denoise_step``."""
    compute = _compute_dtype(table.dtype)
    px, po, a, b, d, *rest, c, s = coefficients(table, step)
    x = sample if sample.dtype == compute else sample.to(compute)
    o = guide(model_output, sample.shape[0], sample.shape[1] if sample.dim() > 1 else None, guidance)
    o = o if o.dtype == compute else o.to(compute)
    if order is None:
        strides = (sample if sample.is_contiguous() else torch.empty_like(sample, dtype=dtype)).stride()
    else:
        strides = ordered_empty(sample.shape, order, dtype, sample.device).stride()

    def output(value: Tensor, dtype: torch.dtype) -> Tensor:
        if value.dtype == dtype and value.stride() == strides:
            return value
        return torch.empty_strided(value.shape, strides, dtype=dtype, device=value.device).copy_(value)

    drawn = noise is not None or seed is not None
    bits = None
    if clip is None and mask is None and not want_x0 and isinstance(b, float):
        # Nobody sees m: its terms go into those of x and o, whose factors are numbers.
        m, terms = None, [(x, a + b * px), (o, d + b * po)]
    else:
        m = _sum([(x, px), (o, po)])
        terms = [(x, a), (m, b), (o, d)]
    if m is not None and clip is not None:
        if want_mask:
            bits = pack_bits((m >= -clip) & (m <= clip), iteration_order(m.shape, strides))
        m = m.clamp_(-clip, clip)
    if m is not None and mask is not None:
        m.mul_(unpack_bits(mask, m.shape, iteration_order(m.shape, strides)))
    terms += [(h.to(compute), factor) for h, factor in zip(history, rest, strict=False)]
    if drawn:
        z = noise.to(compute) if noise is not None else _noise(seed if seed is not None else 0, step, x)
        if learned_variance:
            v = variance(model_output, sample, guidance).to(compute)
            z = z * (v * rest[2] + c).exp()
            c = 1.0
        terms.append((z, c))
    y = output(_sum(terms), dtype)
    following = None
    if next_dtype is not None:
        shape = (next_copies * y.shape[0], *y.shape[1:])
        following = ordered_empty(shape, iteration_order(y.shape, strides), next_dtype, y.device)
        following.copy_(torch.cat([y.to(compute) * s] * next_copies))
    return y, output(m, x0_dtype or dtype) if m is not None and want_x0 else None, bits, following


def variance(model_output: Tensor, sample: Tensor, guidance: Guidance) -> Tensor:
    """What the model says of the variance: the channels after the sample's, never guided."""
    channels, rows = sample.shape[1], sample.shape[0]
    v = model_output.narrow(1, channels, channels)
    if guidance.scale is None or v.shape[0] == rows:
        return v
    return v[:rows] if guidance.cond_first else v[rows:]


def denoise_step_backward(
    grad_y: Tensor,
    grad_m: Tensor | None,
    table: Tensor,
    step: int | Tensor,
    *,
    grad_sample: Tensor | None,
    grad_output: Tensor | None,
    order: Sequence[int],
    guidance: Guidance = NO_GUIDANCE,
    mask: Tensor | None = None,
) -> None:
    """Write the gradients of one step; arguments as those of the kernel's ``denoise_step_backward``."""
    compute = _compute_dtype(grad_y.dtype)
    px, po, a, b, d, *_ = coefficients(table, step)
    gy = grad_y.to(compute)
    gm = gy * b
    if grad_m is not None:
        gm = gm + grad_m.to(compute)
    if mask is not None:
        gm = gm * unpack_bits(mask, gm.shape, order)
    if grad_sample is not None:
        grad_sample.copy_(_sum([(gy, a), (gm, px)]))
    if grad_output is None:
        return
    go = _sum([(gy, d), (gm, po)])
    target = grad_output.narrow(1, 0, gy.shape[1]) if gy.dim() > 1 else grad_output
    if guidance.scale is None:
        target.copy_(go)
        return
    batch = gy.shape[0]
    halves = (target[:batch], target[batch:])
    cond, uncond = halves if guidance.cond_first else halves[::-1]
    cond.copy_(go * guidance.scale)
    uncond.copy_(go * (1.0 - guidance.scale))
    if guidance.channels is not None:
        cond[:, guidance.channels :].copy_(go[:, guidance.channels :])
        uncond[:, guidance.channels :].zero_()

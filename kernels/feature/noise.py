"""The diffusion loss of DiffKD (Huang et al. 2023, Eq. 5): noising beside the time embedding, and the error in ε.

    x_t  = √ᾱ_t·x + √(1-ᾱ_t)·ε + E[t]         DDPM, Ho et al. 2020, Eq. 4; E the learned embedding, one row a t
    L    = Σ(ε̂ - ε)²/N,  dε̂ = 2·(ε̂ - ε)/N      Eq. 14 there, the simple loss
    dE[t] = Σ of the upstream gradient over the samples that have t, and over their positions

ε are Philox normals keyed by (seed, element), elements numbered row-major whatever the layout: both launches
draw the same, and nothing of it is ever stored.

Bytes moved, X = bytes of x: x_t 2X; L 2X with its gradient, in one launch, and then nothing in a backward
whose upstream gradient is 1; dE X and E, which begins at zero.

Launch plan: x_t as blocks of a sample, contiguous or channels_last, which read 16 bytes a thread. L walks over any
strides (common/strided.py). Channels_last, where neighbours in memory are not neighbours in the numbering, noise is
drawn in tiles of [channel, position] (common/across.py). dE: the first sample of a timestep sums for all that share
it, in the batch's order, so that results repeat bit by bit; a program finds them in one load of up to 1024 timesteps.
Bodies: noise_bodies.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..common.strided import Strides
from ..launch import MAX_GRID_Y, Launches, Planned, reduction
from .noise_bodies import add_noise_embed_kernel, embedding_gradient_kernel, noise_mse_kernel
from .plan import across_plan, mix_plan, noisy_blocks, tile_of, tile_programs, walked


def noise_mse(
    prediction: torch.Tensor,
    seed: int | torch.Tensor,
    *,
    loss: torch.Tensor | None = None,
    grad: torch.Tensor | None = None,
    upstream: torch.Tensor | None = None,
    exit_if_one: bool = False,
) -> None:
    """Launch the error in ε once; ``loss`` and ``grad`` are written where given.

    Args:
        prediction: ε̂, any strides; float32, bfloat16 or float16.
        seed: Of the noise; an int, or an int64 tensor of one element on the device.
        loss: 0-d float32.
        grad: Of ε̂'s shape.
        upstream: Gradient of the loss, 0-d; None: 1.
        exit_if_one: Do nothing if ``upstream`` is 1: the gradient is there already.
    """
    strides = (prediction.stride(), None if grad is None else grad.stride())
    geometry = (prediction.shape, strides, isinstance(seed, torch.Tensor), exit_if_one)
    found = _MSE.find(prediction.device, geometry, (prediction, grad, upstream, loss, seed))
    memory = (None, None) if loss is None else reduction(prediction.device, found.grid[0])[:2]
    found((prediction, grad, upstream, loss, *memory, seed))


def _planned_mse(
    shape: tuple[int, ...], strides: tuple[Strides | None, ...], seed_on_device: bool, exit_if_one: bool
) -> Planned:
    plan, found, element, run = walked(tuple(shape), strides, True)
    blocks = mix_plan(plan.numel)
    programs, constants = noisy_blocks(plan, element, run, blocks, across_plan(blocks, plan.numel))
    constants |= dict(zip(("P", "GRAD"), found, strict=True))
    constants |= {"SEED_ON_DEVICE": seed_on_device, "EARLY_EXIT": exit_if_one}
    return (programs,), (plan.numel, plan.inner, 1.0 / plan.numel), constants


_MSE = Launches(noise_mse_kernel, _planned_mse)


@dataclass(frozen=True)
class Layout:
    """A dense ``[B, C, …]`` tensor: values of a channel in a sample, and whether channels come last in memory."""

    channels: int
    span: int
    last: bool


def laid_out(x: torch.Tensor) -> tuple[torch.Tensor, Layout]:
    """``x``, or a copy where it lies in no way that is read, and how that lies."""
    last = not x.is_contiguous() and x.movedim(1, -1).is_contiguous()
    return x if last else x.contiguous(), Layout(x.shape[1], math.prod(x.shape[2:]), last)


def add_noise_embed(
    x: torch.Tensor,
    found: Layout,
    timesteps: torch.Tensor,
    table: torch.Tensor,
    embedding: torch.Tensor | None,
    out: torch.Tensor,
    seed: int | torch.Tensor,
) -> None:
    """Launch the noising once, into ``out``.

    Args:
        x: ``[B, C, …]`` as ``found`` says; float32, bfloat16 or float16.
        found: Its layout.
        timesteps: Integers ``[B]``, contiguous.
        table: ᾱ, float32 ``[T]``, contiguous.
        embedding: E ``[rows, C]``, contiguous, or None.
        out: Laid out as x.
        seed: Of the noise; an int, or an int64 tensor of one element on the device.
    """
    if x.numel() == 0:
        return
    sizes = (x.shape[0], table.shape[0], 0 if embedding is None else embedding.shape[0])
    geometry = (found, sizes, isinstance(seed, torch.Tensor))
    _ADD_NOISE(x.device, geometry, (x, timesteps, table, embedding, out, seed))


def _planned_add(found: Layout, sizes: tuple[int, int, int], seed_on_device: bool) -> Planned:
    width = found.channels * found.span
    plan = mix_plan(width)
    tile, programs = None, -(-width // plan.block)
    if found.last:
        plan = across_plan(plan, width)
        tile = tile_of(found.channels, found.span, width % 4 == 0, plan.block)
        assert tile is not None, plan  # blocks of 256 hold sixteen channels of some positions
        programs = tile_programs(tile)
    constants = {
        "C": found.channels,
        "SPAN": found.span,
        "TILE": tile,
        # Four neighbours share a Philox counter where a block begins a whole group of them.
        "NOISE_RUN": not found.last and width % 4 == 0,
        "SEED_ON_DEVICE": seed_on_device,
        "BLOCK": plan.block,
        "num_warps": plan.num_warps,
        "enable_fp_fusion": True,
    }
    return (programs, min(sizes[0], MAX_GRID_Y)), sizes, constants


_ADD_NOISE = Launches(add_noise_embed_kernel, _planned_add)


def embedding_gradient(
    upstream: torch.Tensor, found: Layout, timesteps: torch.Tensor, grad: torch.Tensor
) -> None:
    """Launch the embedding's gradient once: rows of ``grad`` (zeros) whose timestep occurs are written.

    Args:
        upstream: Gradient of x_t ``[B, C, …]`` as ``found`` says.
        found: Its layout.
        timesteps: Integers ``[B]``, contiguous.
        grad: ``[rows, C]``, contiguous, zeros.
    """
    if upstream.numel() == 0:
        return
    sizes = (upstream.shape[0], grad.shape[0])
    _EMBEDDING(upstream.device, (found, sizes), (upstream, timesteps, grad))


def _planned_embedding(found: Layout, sizes: tuple[int, int]) -> Planned:
    # As norm's: channels whose values begin anywhere are read from the 16 bytes before.
    wide = found.span % 8 != 0 and 8 < found.span <= 249 and found.channels * found.span % 8 == 0
    window = not found.last and wide
    positions = min(256, 1 << max(0, found.span - 1 + 7 * window).bit_length())
    # 2048 elements: few programs, whose latencies come after one another, in registers for seven a multiprocessor.
    channels = max(1, min(64, 2048 // positions, 1 << max(0, found.channels - 1).bit_length()))
    constants = {
        "C": found.channels,
        "SPAN": found.span,
        "LAST": found.last,
        "BC": channels,
        "BM": positions,
        "BB": min(1024, 1 << max(0, sizes[0] - 1).bit_length()),
        "WINDOW": window,
        "WIDE": sizes[0] * found.channels * found.span >= 2**31 - 2**16,
        "num_warps": 4,
        "enable_fp_fusion": True,
    }
    return (-(-found.channels // channels) * sizes[0],), sizes, constants


_EMBEDDING = Launches(embedding_gradient_kernel, _planned_embedding)

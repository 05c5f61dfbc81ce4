"""Random shader programs, a batch of images in one launch; each program of the grid interprets an image's program.

A program is a list of instructions; instruction k has an operation o_k and 16 numbers, linear in time:

    n_k(t) = value_k + rate_k·t
    (x, y, v, h, r, g, b) ← f_{o_k}(x, y, v, h, r, g, b; n_k(t))      for k = 0 … L − 1, from the pixel's place and 0
    colour = mean over antialias² samples of clamp(r, g, b)

    x, y: where on the plane; v: a field; h: hash of the cell; r, g, b: what is painted so far. The operations are
    listed in kdfast/reference/procedural/shaders.py (affine maps, the fold p ← |p|/(p·p) − c, mirrors, tilings,
    polar maps, sine and noise warps; waves, noise, Worley cells, shapes' distances, Julia sets; cosine palettes).

Bytes moved: the image alone, 3 bytes a pixel (12 as float32), written once; the programs, 132 bytes an instruction,
stay in cache. Instructions decide: some hundreds a pixel and instruction of the program.

Launch plan: a block of pixels of one image per program, so that each branch on an operation is taken by all threads
alike; state in registers; samples in a loop. Bits are those of the reference on any device: no contraction to fused
multiply-adds, rounded division and roots, no library functions. Bodies: shader_bodies.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..launch import Launches, Planned
from .arithmetic import between
from .shader_bodies import SLOTS, run_program


@dataclass(frozen=True)
class ShaderPlan:
    """Pixels a program, and its warps."""

    block: int
    num_warps: int


def shader_plan(pixels: int) -> ShaderPlan:
    """Four pixels a thread, which a uint8 store takes as one word; small images take small blocks.

    Args:
        pixels: Of one image.
    """
    return ShaderPlan(512, 4) if pixels >= 4096 else ShaderPlan(128, 1)


@triton.jit(do_not_specialize=["length"])
def shaders_kernel(
    codes,
    values,
    rates,
    program,
    time,
    out,
    pixels,
    width,
    half_height,
    half_width,
    scale,
    share,
    length,
    ANTIALIAS: tl.constexpr,
    FLOAT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of pixels of one image: its program run at each sample, the colours averaged."""
    blocks = tl.cdiv(pixels, BLOCK)
    image = tl.program_id(0) // blocks
    offset = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < pixels
    row, column = offset // width, offset % width
    which, t = tl.load(program + image), tl.load(time + image)
    codes += which * length
    values += which * length * SLOTS
    rates += which * length * SLOTS
    red = tl.zeros([BLOCK], tl.float32)
    green, blue = red, red
    for sample in range(ANTIALIAS * ANTIALIAS):
        down = (row * ANTIALIAS + sample // ANTIALIAS).to(tl.float32) + 0.5
        across = (column * ANTIALIAS + sample % ANTIALIAS).to(tl.float32) + 0.5
        y = (half_height - down) * scale
        x = (across - half_width) * scale
        r, g, b = run_program(codes, values, rates, t, x, y, length)
        red += between(r, 0.0, 1.0)
        green += between(g, 0.0, 1.0)
        blue += between(b, 0.0, 1.0)
    plane = tl.cast(pixels, tl.int64)
    to = out + image.to(tl.int64) * (3 * plane) + offset
    for channel in tl.static_range(3):
        colour = (red if channel == 0 else green if channel == 1 else blue) * share
        if FLOAT:
            tl.store(to + channel * plane, colour, mask)
        else:
            tl.store(to + channel * plane, tl.floor(colour * 255.0 + 0.5).to(tl.int32).to(tl.uint8), mask)


def render(
    codes: torch.Tensor,
    values: torch.Tensor,
    rates: torch.Tensor,
    program: torch.Tensor,
    time: torch.Tensor,
    height: int,
    width: int,
    antialias: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Render a batch in one launch: ``[B, 3, H, W]``.

    Args:
        codes: int32 ``[P, L]``, contiguous.
        values: float32 ``[P, L, 16]``, contiguous.
        rates: float32 ``[P, L, 16]``, contiguous.
        program: int64 ``[B]``, contiguous: rows of the table.
        time: float32 ``[B]``, contiguous.
        height: In pixels.
        width: In pixels.
        antialias: Samples a pixel and side.
        dtype: torch.uint8 or torch.float32.
    """
    out = torch.empty((program.shape[0], 3, height, width), dtype=dtype, device=values.device)
    geometry = (program.shape[0], codes.shape[1], height, width, antialias, dtype)
    _SHADERS(codes.device, geometry, (codes, values, rates, program, time, out))
    return out


def _planned(
    images: int, length: int, height: int, width: int, antialias: int, dtype: torch.dtype
) -> Planned:
    plan = shader_plan(height * width)
    grid = (images * -(-height * width // plan.block),)
    fixed = (
        height * width,
        width,
        0.5 * (height * antialias),
        0.5 * (width * antialias),
        2.0 / (min(height, width) * antialias),
        1.0 / antialias**2,
        length,  # at run time: a table's longest program is another one each time
    )
    constants = {
        "ANTIALIAS": antialias,
        "FLOAT": dtype == torch.float32,
        "BLOCK": plan.block,
        "num_warps": plan.num_warps,
        "enable_fp_fusion": False,
    }
    return grid, fixed, constants


_SHADERS = Launches(shaders_kernel, _planned)

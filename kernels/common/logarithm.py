"""The logarithm that the hardware has: one instruction, where libdevice's polynomial is about twenty."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.target_info import is_cuda

_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def approximate_log2(x):
    """log2 of a normal float32 to 2^-22: absolute between 1/2 and 2, relative elsewhere (PTX ISA, lg2.approx)."""
    if not _INTERPRETED and is_cuda():
        out = tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        out = tl.log2(x)
    return out

"""What the PTX that kernels write themselves means, for a checker that executes Triton's IR: it knows no such text."""

from __future__ import annotations

from typing import Any

import numpy as np

#: The bits of the NaN that PTX's arithmetic returns.
NAN = np.uint32(0x7FFF_FFFF)


def lg2_approx_ftz(x: Any) -> list[np.ndarray]:
    """``lg2.approx.ftz.f32``: log2, to 2^-22 on hardware; subnormal inputs are zeros of their sign (PTX ISA)."""
    given = np.asarray(x, dtype=np.float32)
    subnormal = (given.view(np.uint32) & np.uint32(0x7F80_0000)) == 0
    with np.errstate(divide="ignore", invalid="ignore"):
        exact = np.log2(np.where(subnormal, np.float32(0), given).astype(np.float64)).astype(np.float32)
    return [np.where(np.isnan(exact), NAN, exact.view(np.uint32)).astype(np.uint32).view(np.float32)]


#: Text of the assembly -> (what it computes, how exact: one of ttsem's classes of tolerance).
FRAGMENTS = {"lg2.approx.ftz.f32 $0, $1;": (lg2_approx_ftz, "div")}


def register() -> None:
    """Have ttsem execute them."""
    from ttsem import ops

    ops.PTX_FRAGMENTS.update({ops._norm_asm(text): meaning for text, meaning in FRAGMENTS.items()})

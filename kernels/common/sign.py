"""Minus as what it is, a change of sign, which instructions take along for nothing."""

import triton
import triton.language as tl  # noqa: F401 - where a jitted function stands, the interpreter looks for it


@triton.jit
def negative(x):
    """-x of a float.

    Triton 3.6 makes of ``-x`` a subtraction from +0, another number for x = 0: no compiler may take it for a sign.
    """
    return x * -1.0

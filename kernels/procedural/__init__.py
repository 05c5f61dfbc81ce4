"""Images from programs: random shaders and dead leaves. shaders.py and leaves.py have the equations in full.

    shaders   (x, y, v, h, r, g, b) ← f_{o_k}(x, y, v, h, r, g, b; n_k(t)) for k = 0 … L - 1
              colour = mean over antialias² samples of clamp(r, g, b)
    leaves    stop = max over pixels p of (first leaf on p)
              colour(p) = colour of the last leaf on p that is not after stop

Bytes moved: the image alone, 3 bytes a pixel (shaders as float32: 12), written once; programs (132 bytes an
instruction) and leaves (64 bytes a leaf, written once) stay in the cache.

Launch plan: shaders take a block of pixels of one image a program (shader_plan), leaves a warp for a tile of 16 × 16
pixels (leaf_plan). Bits are the reference's on any device.
"""

from . import leaves, shaders

__all__ = ["leaves", "shaders"]

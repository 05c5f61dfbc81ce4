"""A batch's random crops, flips and normalisation in one launch, and their gradient in another.

Zero padding by p, a crop of h × w at (top, left), a flip, and an affine map by channel:

    y(b, c, i, j) = g_c·X(b, c, i + top_b - p, j' + left_b - p) + β_c      j' = w - 1 - j where b is flipped, else j
    X is the image inside its borders and 0 outside; g = scale/std, β = -mean/std (scale 1/255 for uint8)

    gradient: X̄(b, c, r, s) = g_c·ȳ(b, c, i, j) at the i, j that read (r, s); 0 where none did

Both are the same walk over what is written: each element finds the one element that it reads, or none. So one body
serves both, and the gradient's gradient is the forward launch again, without β.

Bytes moved an element: what one read and one write of it take, fp32 8 (forward and backward alike), uint8 to bf16 3.
Eager PyTorch pads (2), gathers (2, and 8 of indices), flips (3), subtracts (2) and divides (2).

Launch plan: programs write dense runs of one sample's elements in the order of their memory (NCHW or NHWC), 16
bytes a thread; reads are shifted, so they are element by element, neighbours from neighbours. Samples lie along the
second grid dimension. Offsets and flips stay on the device; any value of an offset is safe (zeros come in).
"""

from .launch import crop_flip

__all__ = ["crop_flip"]

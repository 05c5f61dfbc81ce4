"""One denoising step of any linear sampler, fused with classifier-free guidance.

With x the sample, o the model output, h_j earlier predictions and z noise, and ten coefficients of the step
(one row px po a b d d1 d2 d3 c s of a table):

    o = u + g·(c − u)                                   guidance (Ho & Salimans 2022, Eq. 6)
    m = clamp(px·x + po·o)                              predicted x₀ (DDIM, Song et al. 2021, Eq. 12)
    y = a·x + b·m + d·o + Σ_{j≤3} d_j·h_j + c·z         next sample
    n = s·y                                             next model input

    backward: gm = [m inside]·(b·gy + gm'),  gx = a·gy + px·gm,  go = d·gy + po·gm
              guidance: gc = g·go, gu = (1 − g)·go

DDIM, DDPM, DPM-Solver++, Euler, flow matching and LCM differ in the table only (kdfast/diffusion). A learned
range of variances (Nichol & Dhariwal 2021) reads v beside o, and multiplies z by exp(c + d3·v).

Bytes moved, S = bytes of one sample: 3S for y from x and o; 4S guided; + S for each of m, history, noise
tensor, v, copy of n. Philox noise moves nothing. Backward: 3S (4S guided); the clip mask adds a bit an
element to each direction.

Launch plan: 8 elements a thread, so that 16-bit tensors move 16 bytes a load. Rows of elements that are dense
in every tensor are blocked from a scalar base; layouts that share no dense row (channels_last against
contiguous) give each element its own coordinates. Strides are compile-time constants: the divisions become
multiplications, and the width of a load is known. The outermost size is not, so that another batch size
compiles nothing. Bodies: bodies.py.
"""

from .launch import NO_GUIDANCE, denoise_step, denoise_step_backward, mask_bytes, ordered_empty

__all__ = ["NO_GUIDANCE", "denoise_step", "denoise_step_backward", "mask_bytes", "ordered_empty"]

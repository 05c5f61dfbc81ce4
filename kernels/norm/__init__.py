"""Batch norm (Ioffe & Szegedy 2015) fused with what follows it.

n = values of a channel, N = all values, μ and σ² the batch's (the running ones in evaluation), r = 1/√(σ² + eps):

    BN(x) = γ·(x - μ)·r + β
    y     = act(scale·BN(x) + carry·residual)      bottlenecks: act = relu or none, scale = carry = 1
                                                   DDIM step (Song et al. 2021, Eq. 12, η = 0): c₂, c₁, no act
    L     = Σ(BN(x) - t)²/N                        with g = 2·(BN(x) - t)/N made in forward

    backward, g the gradient at BN(x):  dβ = Σg,  dγ = r·Σg·(x - μ)
    training:    gx = γ·r·(g - Σg/n - (x - μ)·r²·Σg·(x - μ)/n);  evaluation:  gx = γ·r·g
    of L in closed form, C = Σ(t - t̄)(x - x̄), V = Σ(x - x̄)²:  Σg = 2n/N·(β - t̄),  Σg·(x - μ) = 2/N·(γ·r·V - C)

Bytes moved, X = bytes of x (R of the residual, without one 0):

    y   training  forward 2X + R + Y in two launches; evaluation X + R + Y in one
        backward  2X + 2G + GX (+ GR), G the upstream gradient; with both a ReLU and a residual, y twice more
    L   training  5X in two launches, gradients included: x and t, then x, t and gx; backward 0 while upstream is 1

Launch plan. Two launches, because every value of a channel is needed before the first result. Statistics: a
program takes some channels over some tiles, stores partial sums, and the last to arrive for those channels
combines all of them in a fixed order, so that results repeat bit by bit; sums are taken about the first tile's
mean. While a tile is summed, the next three (or two, each of x and of t) are copied to shared memory. channels_last
takes 16 to 64 channels a program: as many programs as fill a GPU, whose last one still combines them in 40 registers.
Where a channel's span in memory is odd (7×7 = 49), it is read from the 8 elements' boundary before it on,
which keeps 16-byte loads. Apply: x is a matrix [rows, W] with W = C·H·W' (contiguous) or C (channels_last), so
that a program's columns keep their channels over all its rows: channel values are loaded once, everything else
moves 16 bytes a thread. Bodies: bodies.py.
"""

from . import statistics_loss
from .launch import act, act_backward, mse, statistics
from .plan import Matrix, matrix

__all__ = ["Matrix", "act", "act_backward", "matrix", "mse", "statistics", "statistics_loss"]

"""The m steps of Kdiffusion's reverse process (Yao et al., Eqs. 6–10).

Convention: x_t = α_t·x_{t−1} + β_t·ε with α_t² + β_t² = 1 (the paper's √α in Eq. 6 is a slip), α̂_t = Π α_i,
β̂_t² = 1 − α̂_t². Step k goes from t = n·(1 − (k−1)/m) to n·(1 − k/m), each rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["linear_alpha_hat", "reverse_coefficients", "reverse_variances"]


def linear_alpha_hat(steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Tensor:
    """α̂_1 … α̂_n of DDPM's linear schedule: α_t² = 1 − β_t, β_t from ``beta_start`` to ``beta_end``.

    Returns:
        float64 ``[steps]``.

    Raises:
        ValueError: Less than one step, or bounds that are not 0 < beta_start ≤ beta_end < 1.
    """
    if steps < 1:
        raise ValueError(f"steps: got {steps}; at least 1 is needed")
    if not 0 < beta_start <= beta_end < 1:
        raise ValueError(
            f"beta_start, beta_end: got {beta_start}, {beta_end}; 0 < beta_start ≤ beta_end < 1 is needed"
        )
    return (1 - torch.linspace(beta_start, beta_end, steps, dtype=torch.float64)).sqrt().cumprod(0)


def reverse_coefficients(alpha_hat: Tensor, m: int) -> tuple[Tensor, Tensor]:
    r"""The weights of x_hi and x0 in the mean of q(x_lo | x_hi, x0), for each of m steps.

    .. math:: a = \hat\alpha_{hi} / \hat\alpha_{lo},\quad b^2 = 1 - a^2,\quad
              u = a \hat\beta_{lo}^2 / \hat\beta_{hi}^2,\quad v = \hat\alpha_{lo} b^2 / \hat\beta_{hi}^2

    (Eq. 10; its printed v lost the hats.) u·α̂_hi + v = α̂_lo, and the last step has u = 0, v = 1.

    Args:
        alpha_hat: α̂_1 … α̂_n, strictly decreasing within (0, 1); α̂_0 = 1 is implied.
        m: Steps, 1 to n.

    Returns:
        u and v, float64 ``[m]``, on the schedule's device.

    Raises:
        TypeError: A schedule that is not floating-point, or an m that is no int.
        ValueError: A schedule or an m out of what is said above.
    """
    high, low = _ends(alpha_hat, m)
    a = high / low
    left = 1 - high.square()
    return a * (1 - low.square()) / left, low * (1 - a.square()) / left


def reverse_variances(alpha_hat: Tensor, m: int) -> Tensor:
    """The variance of q(x_lo | x_hi, x0) at σ = 1, b²·β̂_lo²/β̂_hi², for each of m steps; the last is 0.

    Arguments, result and errors are as for :func:`reverse_coefficients`.
    """
    high, low = _ends(alpha_hat, m)
    return (1 - (high / low).square()) * (1 - low.square()) / (1 - high.square())


def _ends(alpha_hat: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """α̂ where each step begins, and where it ends."""
    if not isinstance(alpha_hat, Tensor) or not alpha_hat.is_floating_point():
        kind = alpha_hat.dtype if isinstance(alpha_hat, Tensor) else type(alpha_hat).__name__
        raise TypeError(f"alpha_hat: got {kind}; a floating-point tensor is needed")
    if alpha_hat.dim() != 1 or alpha_hat.numel() == 0:
        raise ValueError(f"alpha_hat: got shape {tuple(alpha_hat.shape)}; [n] is needed")
    if not isinstance(m, int) or isinstance(m, bool):
        raise TypeError(f"m: got {type(m).__name__}; an int is needed")
    n = alpha_hat.numel()
    if not 1 <= m <= n:
        raise ValueError(f"m: got {m}; accepted: 1 to {n}, the schedule's length")
    padded = torch.cat([alpha_hat.new_ones(1, dtype=torch.float64), alpha_hat.detach().double()])
    if not bool((padded[1:] < padded[:-1]).all()) or not bool((padded > 0).all()):
        raise ValueError("alpha_hat: is not strictly decreasing within (0, 1)")
    # Integer rounding, half up: floats would depend on how n/m is represented.
    ends = [(2 * n * (m - k) + m) // (2 * m) for k in range(m + 1)]
    points = padded[torch.tensor(ends, device=alpha_hat.device)]
    return points[:-1], points[1:]

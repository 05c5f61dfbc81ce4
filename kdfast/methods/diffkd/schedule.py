"""The noise schedule: ᾱ for training, c1 and c2 for the student's steps."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["Schedule", "Step", "alpha_bars", "student_steps"]

#: t, c1, c2 of z' = c1·z + c2·ε̂(z, t).
Step = tuple[int, float, float]


def alpha_bars(steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Tensor:
    """ᾱ_t = Π (1 − β) of the linear schedule (Ho et al. 2020, Sec. 4), float64 ``[steps]``."""
    return torch.cumprod(1 - torch.linspace(beta_start, beta_end, steps, dtype=torch.float64), 0)


def student_steps(
    steps: int = 5, *, train_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
) -> list[Step]:
    """The steps that clean a student's feature: the second half of a DDIM schedule of twice as many (η = 0).

    With p the next t, and ᾱ_p = 1 after the last::

        c1 = √(ᾱ_p / ᾱ_t)          c2 = √(1 − ᾱ_p) − c1·√(1 − ᾱ_t)

    (Song et al. 2021, Eq. 12, solved for z and ε̂; nothing is clipped.)

    Args:
        steps: Network evaluations; five start at t = 400.
        train_steps: T.
        beta_start: First β.
        beta_end: Last β.

    Returns:
        (t, c1, c2), computed in double precision, in the order in which they are taken. Plain numbers: there is no
        table that a lower precision could round, which makes ᾱ_0 exactly 1 and the second iteration NaN.
    """
    bars = alpha_bars(train_steps, beta_start, beta_end)
    stride = train_steps // (2 * steps)
    taken: list[Step] = []
    for t in range((steps - 1) * stride, -1, -stride):
        bar = float(bars[t])
        before = float(bars[t - stride]) if t >= stride else 1.0
        c1 = math.sqrt(before / bar)
        taken.append((t, c1, math.sqrt(1 - before) - c1 * math.sqrt(1 - bar)))
    return taken


class Schedule(nn.Module):
    """ᾱ on the device, for the training of the diffusion; never below float32, whatever the module is cast to.

    Attributes:
        bars: ᾱ ``[T]``, float32 (float64 in a module of doubles). Not in the state dict.
    """

    bars: Tensor

    def __init__(self, steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> None:
        super().__init__()
        self._exact = alpha_bars(steps, beta_start, beta_end)
        self.register_buffer("bars", self._exact.float(), persistent=False)

    def __len__(self) -> int:
        """T."""
        return len(self._exact)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Schedule:
        # `.half()` and `.bfloat16()` reach every buffer; this one is made anew, where it was sent to.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        dtype = torch.float64 if self.bars.dtype == torch.float64 else torch.float32
        self.bars = self._exact.to(self.bars.device, dtype)
        return self

"""DIST: the oracle of the tests, and the path for CPU and float64."""

from __future__ import annotations

import torch

from kdfast.reference.common import compute_dtype

__all__ = ["DIST_EPS", "dist"]

#: ε of DIST's correlations, as its authors have it.
DIST_EPS = 1e-8


def dist(
    student: torch.Tensor, teacher: torch.Tensor, beta: float, gamma: float, temperature: torch.Tensor | float
) -> torch.Tensor:
    """T²·(β·inter + γ·intra) of logits ``[..., V]`` (Huang et al. 2022, Eq. 9); every leading index is a sample."""
    dtype = compute_dtype(student, teacher)
    q, p = (torch.softmax(x.to(dtype).flatten(0, -2) / temperature, -1) for x in (student, teacher))

    def distance(dim: int) -> torch.Tensor:
        a, b = q - q.mean(dim, keepdim=True), p - p.mean(dim, keepdim=True)
        norms = a.norm(dim=dim) * b.norm(dim=dim)
        similar: torch.Tensor = (a * b).sum(dim) / (norms + DIST_EPS)
        return (1 - similar).mean()

    return (beta * distance(1) + gamma * distance(0)) * (temperature * temperature)

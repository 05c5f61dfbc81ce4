"""Kdiffusion: distil features in the small steps of a reverse diffusion process ("Progressively Knowledge
Distillation via Re-parameterizing Diffusion Reverse Process", Yao et al.).

The last linear layer of a student's stage becomes m re-parameterised branches S_1 … S_m. With x0 the teacher's
feature, π a random permutation an iteration, and u, v from :func:`reverse_coefficients`:

    T_k = u_k·X_{k−1} + v_k·x0,   P_k = u_k·P_{k−1} + v_k·S_π(k)
    L   = L_task + α·Σ_k mean((T_k − P_k)²) + β·mean(((x̂0 − x0)·Wᵀ)²)

The network itself goes on with the branches' mean, and :func:`merge` folds them into one plain layer. The authors
published no code and their appendix is missing: what they leave open is a field of :class:`KdiffusionConfig`.
"""

from __future__ import annotations

from kdfast.methods.kdiffusion.branches import Branches, convert, merge
from kdfast.methods.kdiffusion.config import KdiffusionConfig, Stage
from kdfast.methods.kdiffusion.method import Kdiffusion
from kdfast.methods.kdiffusion.schedule import linear_alpha_hat, reverse_coefficients, reverse_variances

__all__ = [
    "Branches",
    "Kdiffusion",
    "KdiffusionConfig",
    "Stage",
    "convert",
    "linear_alpha_hat",
    "merge",
    "reverse_coefficients",
    "reverse_variances",
]

"""DiffKD: denoise the student's features before they are compared with the teacher's ("Knowledge Diffusion for
Distillation", Huang et al. 2023).

A small diffusion model learns the teacher's features (latents of a linear autoencoder); five DDIM steps with it clean
the student's, started from a learned mix with noise:

    z    = γ·trans(s) + (1 − γ)·ε                          Eq. 8
    z'   = c1·z + c2·ε̂(z, t)                               five steps, t = 400, 300, 200, 100, 0
    L    = L_task + λ1·mean((ε̂ − ε)²) + λ2·mean((dec(enc(f)) − f)²) + λ3·d(proj(ẑ), enc(f))      Eq. 9

Where the paper's text and its authors' code differ (``proj``, the schedule's half, the residual without a ReLU) this
follows the code, by which the reported numbers came about.
"""

from __future__ import annotations

from kdfast.methods.diffkd.config import DiffKDConfig, Pair
from kdfast.methods.diffkd.denoising import Denoising
from kdfast.methods.diffkd.memory import activation_memory
from kdfast.methods.diffkd.method import DiffKD
from kdfast.methods.diffkd.schedule import Schedule, student_steps
from kdfast.methods.diffkd.visual import saliency

__all__ = [
    "Denoising",
    "DiffKD",
    "DiffKDConfig",
    "Pair",
    "Schedule",
    "activation_memory",
    "saliency",
    "student_steps",
]

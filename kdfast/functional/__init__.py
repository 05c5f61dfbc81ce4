"""What users call: each function checks its arguments, documents its equation, and picks the backend.

Every function takes tensors in any layout and returns float32 (float64 for float64 inputs).
"""

from __future__ import annotations

from kdfast.functional.denoise import denoise_step
from kdfast.functional.dist import dist_loss
from kdfast.functional.divergence import divergence_loss
from kdfast.functional.feature import add_noise_embed, noise_mix, noise_mse, reparam_middle_loss
from kdfast.functional.images import crop_flip_normalize, draw_crop_flip
from kdfast.functional.kl import KDStatistics, distillation_loss, kd_kl_div, kd_statistics
from kdfast.functional.linear import fused_linear_kd_loss
from kdfast.functional.norm import BNStatistics, bn_ddim_step, bn_mse, bn_relu, bn_statistics_loss
from kdfast.functional.pair import dkd_loss, jsd_loss
from kdfast.functional.procedural import render_leaves, render_shaders
from kdfast.functional.stored import TopKTeacher
from kdfast.functional.topk import topk_kd_loss

__all__ = [
    "BNStatistics",
    "KDStatistics",
    "TopKTeacher",
    "add_noise_embed",
    "bn_ddim_step",
    "bn_mse",
    "bn_relu",
    "bn_statistics_loss",
    "crop_flip_normalize",
    "denoise_step",
    "dist_loss",
    "distillation_loss",
    "divergence_loss",
    "dkd_loss",
    "draw_crop_flip",
    "fused_linear_kd_loss",
    "jsd_loss",
    "kd_kl_div",
    "kd_statistics",
    "noise_mix",
    "noise_mse",
    "render_leaves",
    "render_shaders",
    "reparam_middle_loss",
    "topk_kd_loss",
]

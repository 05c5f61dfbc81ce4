"""What users call: each function checks its arguments, documents its equation, and picks the backend.

Every function takes tensors in any layout and returns float32 (float64 for float64 inputs).
"""

from __future__ import annotations

from kdfast.functional.denoise import denoise_step
from kdfast.functional.fused_linear import fused_linear_kd_loss
from kdfast.functional.losses import kd_kl_div
from kdfast.functional.losses_more import dist_loss, dkd_loss, jsd_loss, topk_kd_loss

__all__ = [
    "denoise_step",
    "dist_loss",
    "dkd_loss",
    "fused_linear_kd_loss",
    "jsd_loss",
    "kd_kl_div",
    "topk_kd_loss",
]

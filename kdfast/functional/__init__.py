"""What users call: each function checks its arguments, documents its equation, and picks the backend.

Every function takes tensors in any layout and returns float32 (float64 for float64 inputs).
"""

from __future__ import annotations

from kdfast.functional.losses import kd_kl_div
from kdfast.functional.losses_more import dkd_loss, jsd_loss, topk_kd_loss

__all__ = ["dkd_loss", "jsd_loss", "kd_kl_div", "topk_kd_loss"]

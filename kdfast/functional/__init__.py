"""What users call: each function checks its arguments, documents its equation, and picks the backend.

Every function takes tensors in any layout and returns float32 (float64 for float64 inputs).
"""

from __future__ import annotations

from kdfast.functional.losses import KDStatistics, distillation_loss, kd_kl_div, kd_statistics

__all__ = ["KDStatistics", "distillation_loss", "kd_kl_div", "kd_statistics"]

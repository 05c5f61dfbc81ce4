"""Temperature-scaled KL divergence in plain PyTorch: rows.py by its definition, closed.py in fewer passes."""

from kdfast.reference.kl.closed import kd_kl_closed, kd_kl_gradients
from kdfast.reference.kl.rows import (
    Labels,
    cross_entropy_gradient,
    cross_entropy_rows,
    kd_kl,
    kd_kl_rows,
    kd_statistics,
)

__all__ = [
    "Labels",
    "cross_entropy_gradient",
    "cross_entropy_rows",
    "kd_kl",
    "kd_kl_closed",
    "kd_kl_gradients",
    "kd_kl_rows",
    "kd_statistics",
]

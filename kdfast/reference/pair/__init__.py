"""JSD and decoupled KD in plain PyTorch: rows.py by their definition, closed.py in fewer passes."""

from kdfast.reference.pair.closed import LEAST_BETA, dkd_closed, jsd_closed
from kdfast.reference.pair.rows import LOWEST, dkd_rows, jsd_rows

__all__ = ["LEAST_BETA", "LOWEST", "dkd_closed", "dkd_rows", "jsd_closed", "jsd_rows"]

"""JSD, decoupled KD, divergences in plain PyTorch: by definition, and (closed.py) in fewer passes."""

from kdfast.reference.pair.closed import LEAST_BETA, dkd_closed, jsd_closed
from kdfast.reference.pair.divergence import KINDS, Kind, divergence_rows
from kdfast.reference.pair.rows import LOWEST, dkd_rows, jsd_rows

__all__ = [
    "KINDS",
    "LEAST_BETA",
    "LOWEST",
    "Kind",
    "divergence_rows",
    "dkd_closed",
    "dkd_rows",
    "jsd_closed",
    "jsd_rows",
]

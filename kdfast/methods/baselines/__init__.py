"""What the tables compare with: KD, DKD, DIST, FitNet, AT and RKD, behind one interface.

Each adds one term to the task loss, ``task_weight·CE + weight·term``; none changes the student. They are meant for
honest comparisons in one loop, not as replacements of the papers' own repositories.
"""

from __future__ import annotations

from kdfast.methods.baselines.base import Baseline, BaselineConfig
from kdfast.methods.baselines.features import AT, RKD, ATConfig, FitNet, FitNetConfig, RKDConfig
from kdfast.methods.baselines.logits import DIST, DKD, KD, DISTConfig, DKDConfig, KDConfig

__all__ = [
    "AT",
    "DIST",
    "DKD",
    "KD",
    "RKD",
    "ATConfig",
    "Baseline",
    "BaselineConfig",
    "DISTConfig",
    "DKDConfig",
    "FitNet",
    "FitNetConfig",
    "KDConfig",
    "RKDConfig",
]

"""Losses as modules: a few lines over :mod:`kdfast.functional`."""

from __future__ import annotations

from kdfast.nn.divergence import DivergenceLoss, JSDLoss
from kdfast.nn.losses import (
    DistillationLoss,
    DISTLoss,
    DKDLoss,
    FusedLinearKDLoss,
    KDLoss,
    TopKKDLoss,
)
from kdfast.nn.statistics import BNStatisticsLoss

__all__ = [
    "BNStatisticsLoss",
    "DISTLoss",
    "DKDLoss",
    "DistillationLoss",
    "DivergenceLoss",
    "FusedLinearKDLoss",
    "JSDLoss",
    "KDLoss",
    "TopKKDLoss",
]

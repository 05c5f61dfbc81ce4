"""The methods that a recipe can name: a line of :data:`METHODS`, and a module here with its keys and its builder."""

from __future__ import annotations

import importlib
from typing import Any

from kdfast.experiments.distill.plan import Method

METHODS = (
    "at",
    "diffkd",
    "dist",
    "dkd",
    "dmkd",
    "fitnet",
    "kd",
    "kdiffusion",
    "rkd",
    "ssdkd",
    "surrogate",
)

# These are so alike that they share a module.
_BASELINES = ("at", "dist", "dkd", "fitnet", "kd", "rkd")


def get_method(name: str) -> Method:
    """The module of a method in :data:`METHODS`."""
    if name in _BASELINES:
        home: Any = importlib.import_module(f"{__name__}.baselines")
        return home.BASELINES[name]  # type: ignore[no-any-return]
    module: Any = importlib.import_module(f"{__name__}.{name}")
    return module  # type: ignore[no-any-return]

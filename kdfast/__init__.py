"""kdfast: knowledge distillation on synthetic data, at the speed of the hardware.

``import kdfast`` needs torch and numpy only; each part says which extra it needs when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from kdfast.errors import (
    BackendError,
    CheckpointError,
    ConfigError,
    DataError,
    KDFastError,
    MissingExtraError,
    ShardError,
)
from kdfast.version import __version__

if TYPE_CHECKING:
    from kdfast import data as data
    from kdfast import diffusion as diffusion
    from kdfast import functional as functional
    from kdfast import methods as methods
    from kdfast import models as models
    from kdfast import nn as nn
    from kdfast import replay as replay
    from kdfast.backend import get_backend as get_backend
    from kdfast.backend import set_backend as set_backend
    from kdfast.backend import use_backend as use_backend
    from kdfast.commands import data_report as data_report
    from kdfast.commands import demo as demo
    from kdfast.commands import distill as distill
    from kdfast.commands import evaluate as evaluate
    from kdfast.commands import export as export
    from kdfast.commands import label as label
    from kdfast.commands import select as select
    from kdfast.commands import synth as synth
    from kdfast.commands import teach as teach

_LAZY = ("data", "diffusion", "functional", "methods", "models", "nn", "replay")
_BACKEND = ("get_backend", "set_backend", "use_backend")
# What the command line does, without `report`: that name is a room's.
_COMMANDS = ("data_report", "demo", "distill", "evaluate", "export", "label", "select", "synth", "teach")

__all__ = [
    "BackendError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "KDFastError",
    "MissingExtraError",
    "ShardError",
    "__version__",
    *_BACKEND,
    *_COMMANDS,
    *_LAZY,
]


def __getattr__(name: str) -> Any:
    # PEP 562: `kdfast.functional` works after a bare `import kdfast`, and costs nothing until then. Not even torch is
    # imported before it is needed, so that the command line answers at once.
    if name in _LAZY or name == "backend":
        return importlib.import_module(f"kdfast.{name}")
    for home, names in (("backend", _BACKEND), ("commands", _COMMANDS)):
        if name in names:
            return getattr(importlib.import_module(f"kdfast.{home}"), name)
    raise AttributeError(f"module 'kdfast' has no attribute {name!r}")

"""Data: labelled shards, written, checked and decoded onto the device; surrogate images; selection."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from kdfast.errors import ShardError

if TYPE_CHECKING:
    from kdfast.data import augment, surrogate
    from kdfast.data.datasets import load_dataset
    from kdfast.data.loader import ShardLoader
    from kdfast.data.manifest import Manifest, read_manifest
    from kdfast.data.preflight import Fault, check_shards
    from kdfast.data.writer import ShardWriteError, ShardWriter

# Each name is imported when it is first used: none of them costs a user of another one anything.
_HOME = {
    "Fault": "preflight",
    "Manifest": "manifest",
    "ShardLoader": "loader",
    "ShardWriteError": "writer",
    "ShardWriter": "writer",
    "check_shards": "preflight",
    "load_dataset": "datasets",
    "read_manifest": "manifest",
}
_MODULES = ("augment", "surrogate")

__all__ = [
    "Fault",
    "Manifest",
    "ShardError",
    "ShardLoader",
    "ShardWriteError",
    "ShardWriter",
    "augment",
    "check_shards",
    "load_dataset",
    "read_manifest",
    "surrogate",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Data: labelled shards, written, checked and decoded onto the device; surrogate images; selection."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kdfast.errors import ShardError
from kdfast.lazy import attributes

if TYPE_CHECKING:
    from kdfast.data import augment, surrogate
    from kdfast.data.boundary import decision_boundary_pairs, random_targets
    from kdfast.data.datasets import load_dataset
    from kdfast.data.loader import ShardLoader
    from kdfast.data.manifest import Manifest, read_manifest
    from kdfast.data.preflight import Fault, check_shards
    from kdfast.data.segmentation import SegmentationFolder, open_segmentation
    from kdfast.data.writer import ShardWriteError, ShardWriter

# Each name is imported when it is first used: none of them costs a user of another one anything.
_HOME = {
    "Fault": "preflight",
    "Manifest": "manifest",
    "SegmentationFolder": "segmentation",
    "ShardLoader": "loader",
    "ShardWriteError": "writer",
    "ShardWriter": "writer",
    "check_shards": "preflight",
    "decision_boundary_pairs": "boundary",
    "load_dataset": "datasets",
    "open_segmentation": "segmentation",
    "random_targets": "boundary",
    "read_manifest": "manifest",
    "relative_entropy": "selection",
    "select_balanced": "selection",
    "select_long_tail": "selection",
}
_MODULES = ("augment", "surrogate")

__all__ = [
    "Fault",
    "Manifest",
    "SegmentationFolder",
    "ShardError",
    "ShardLoader",
    "ShardWriteError",
    "ShardWriter",
    "augment",
    "check_shards",
    "decision_boundary_pairs",
    "load_dataset",
    "open_segmentation",
    "random_targets",
    "read_manifest",
    "relative_entropy",
    "select_balanced",
    "select_long_tail",
    "surrogate",
]


__getattr__ = attributes(__name__, _HOME, _MODULES)

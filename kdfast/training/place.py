"""Where in a run the loop is, and what of it a checkpoint says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kdfast.documents import Fields, shown
from kdfast.errors import CheckpointError
from kdfast.training.checkpoint import Checkpoint


@dataclass
class Place:
    """Where in the run we are; part of the checkpoint."""

    epoch: int = 0
    batch: int = 0  # batches of this epoch already used
    step: int = 0
    images: int = 0
    seconds: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)


def place_of(state: Any, checkpoint: Checkpoint) -> Place:
    """The place that a checkpoint's state names.

    Raises:
        CheckpointError: A value is not one; the message names it.
    """
    place = Fields(state, f"{checkpoint.path}: place", CheckpointError)
    metrics = Fields(place.mapping("metrics"), f"{checkpoint.path}: metrics", CheckpointError)
    if place.integer("step", 0) != checkpoint.step:
        place.refuse("step", f"{checkpoint.step}, as the checkpoint says")
    return Place(
        place.integer("epoch", 0),
        place.integer("batch", 0),
        checkpoint.step,
        place.integer("images", 0),
        place.number("seconds"),
        {name: metrics.number(name) for name in metrics},
    )


def check_same_run(checkpoint: Checkpoint, fingerprint: Mapping[str, Any], world_size: int) -> None:
    """Refuse a checkpoint of a run with other settings, or of another number of processes.

    Raises:
        CheckpointError: Names every setting that differs, as it was and as it is.
    """
    info = Fields(dict(checkpoint.info), f"{checkpoint.path}: info", CheckpointError)
    if info.integer("world_size", 1) != world_size:
        raise CheckpointError(
            f"{checkpoint.path}: was written by {info.raw('world_size')} processes, this run has "
            f"{world_size}; resume with as many as before"
        )
    before = info.mapping("fingerprint")
    changed = sorted(k for k in before.keys() | fingerprint if before.get(k) != fingerprint.get(k))
    if changed:
        details = "; ".join(
            f"{k}: {shown(before.get(k))} before, {shown(fingerprint.get(k))} now" for k in changed
        )
        raise CheckpointError(f"{checkpoint.path}: belongs to a run with other settings ({details})")

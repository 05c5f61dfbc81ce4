"""State of a replay buffer as a dict and as a file: what is in it, and how it is checked before it is trusted."""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np
import torch

from kdfast.errors import CheckpointError
from kdfast.reference.replay import Meta, ReplayState, extension

_KINDS = (
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
)
#: Dtypes a row may have, by the name that stands in a file.
DTYPES = {str(kind).removeprefix("torch."): kind for kind in _KINDS}

#: Settings that decide what the numbers mean, and so must agree.
FIXED = ("capacity", "sample_shape", "dtype", "num_classes", "alpha", "eps", "scale", "eviction")

_BOOKKEEPING_KINDS = {
    "leaves": torch.int32,
    "sums": torch.int64,
    "delta": torch.float32,
    "generation": torch.int32,
    "labels": torch.int32,
    "meta": torch.int64,
    "class_counts": torch.int64,
}


def tensors_of(state: ReplayState) -> dict[str, torch.Tensor]:
    """Copies of all memory; rows stop at the last slot in use."""
    kept = {name: getattr(state, name).clone() for name in _BOOKKEEPING_KINDS}
    live = state.leaves.nonzero()
    used = int(live[-1]) + 1 if live.numel() else 0
    kept["rows"] = state.rows[:used].clone()
    return kept


def check_config(got: Any, own: dict[str, Any]) -> None:
    """Refuse a state that was made under other settings.

    Raises:
        CheckpointError: It names the setting, its value in the state, and the buffer's.
    """
    if not isinstance(got, dict):
        raise CheckpointError("replay state: has no 'config'")
    for key in FIXED:
        theirs, ours = got.get(key), own[key]
        if theirs != ours:
            raise CheckpointError(f"replay state: {key} is {theirs!r}, this buffer's is {ours!r}")


def check_tensors(state: ReplayState, tensors: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The state's tensors on the CPU, after every check that needs no knowledge of their history.

    Raises:
        CheckpointError: A tensor is missing, has another shape or dtype, or contradicts the others.
    """
    found: dict[str, torch.Tensor] = {}
    for name in (*_BOOKKEEPING_KINDS, "rows"):
        got, own = tensors.get(name), getattr(state, name)
        if not isinstance(got, torch.Tensor):
            raise CheckpointError(f"replay state: {name!r} is missing")
        fits = got.shape == own.shape
        if name == "rows" and got.dim() == own.dim():  # may stop at the last slot in use
            fits = got.shape[1:] == own.shape[1:] and len(got) <= len(own)
        if not fits or got.dtype != own.dtype:
            raise CheckpointError(
                f"replay state: {name!r} is {got.dtype} {list(got.shape)}, "
                f"expected {own.dtype} {list(own.shape)}"
            )
        found[name] = got.detach().cpu().contiguous()
    _check_consistent(state, found)
    return found


def _check_consistent(state: ReplayState, found: dict[str, torch.Tensor]) -> None:
    def expect(holds: bool, otherwise: str) -> None:
        if not holds:
            raise CheckpointError(f"replay state: inconsistent, {otherwise}")

    leaves, labels, meta, counts = (found[name] for name in ("leaves", "labels", "meta", "class_counts"))
    live = leaves != 0
    filled, counted, head = int(live.sum()), int(meta[Meta.LIVE]), int(meta[Meta.HEAD])
    expect(filled == counted, f"{filled} slots are filled, {counted} are counted")
    expect(0 <= head < state.capacity, f"the next slot is {head} of {state.capacity}")
    expect(not live[len(found["rows"]) :].any(), "rows are missing")
    if counts.numel():
        held = labels[live & (labels >= 0)].long()
        in_range = not held.numel() or int(held.max()) < counts.numel()
        expect(in_range, "a row has a class that does not exist")
        recount = torch.bincount(held, minlength=counts.numel())
        expect(torch.equal(recount, counts), "class counts are not those of the rows")
    rule = state.rule
    masses = extension().quantise(found["delta"].numpy(), rule.alpha, rule.eps, rule.scale)
    from_priorities = torch.from_numpy(masses.view(np.int32))
    expect(torch.equal(from_priorities[live], leaves[live]), "leaves are not those of the priorities")
    sums = torch.from_numpy(extension().sums_of(leaves.numpy()))
    expect(torch.equal(sums, found["sums"]), "sums are not those of the leaves")


def write(path: str | os.PathLike[str], config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Write a snapshot file: all of it, or nothing.

    Raises:
        OSError: The disk is full, the folder is missing or not writable.
    """
    sections = [("config", np.frombuffer(json.dumps(config).encode(), np.uint8))]
    for name, tensor in tensors.items():
        sections.append((name, tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
    extension().save_snapshot(os.fspath(path), sections)


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A snapshot file's settings and tensors; the checksums hold, consistency is not checked yet.

    Raises:
        CheckpointError: The file is missing, no snapshot, of another version, truncated or damaged.
    """
    try:
        sections = extension().load_snapshot(os.fspath(path))
    except (OSError, extension().SnapshotError) as error:
        raise CheckpointError(f"{os.fspath(path)}: {error}") from error
    try:
        config = json.loads(bytes(sections["config"]))
        kinds = {**_BOOKKEEPING_KINDS, "rows": DTYPES[config["dtype"]]}
        tensors = {name: torch.from_numpy(sections[name]).view(kind) for name, kind in kinds.items()}
        tensors["rows"] = tensors["rows"].view(config["used_slots"], *config["sample_shape"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{os.fspath(path)}: no snapshot of a replay buffer ({error!r})") from error
    return config, tensors

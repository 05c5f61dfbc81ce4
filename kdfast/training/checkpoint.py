"""Checkpoints: a directory of safetensors and JSON, written whole or not at all, read without pickle.

checkpoints/step-00000300/
    checkpoint.json          format, step, what each file holds: size and SHA-256
    states.json              everything that is not a tensor
    model.safetensors        one file a state that has tensors; the model's is a plain state dict
    optimizer.safetensors    …
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kdfast.errors import CheckpointError, require
from kdfast.training import files
from kdfast.training.state import flatten, unflatten

FORMAT = "kdfast-checkpoint"
VERSION = 1
MANIFEST = "checkpoint.json"
STATES = "states.json"
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """What :func:`load_checkpoint` read.

    Attributes:
        path: The directory it came from.
        step: Optimiser steps taken when it was written.
        states: The states by name, as they were given to :func:`save_checkpoint` (tensors on the CPU).
        info: JSON facts kept with it.
    """

    path: Path
    step: int
    states: Mapping[str, Any]
    info: Mapping[str, Any] = field(default_factory=dict)


def save_checkpoint(
    directory: str | Path,
    states: Mapping[str, Any],
    *,
    step: int,
    info: Mapping[str, Any] | None = None,
    keep: int = 2,
) -> Path:
    """Write ``directory/step-XXXXXXXX`` atomically, then remove all but the last ``keep`` checkpoints.

    Args:
        directory: Where the checkpoints of one run lie; made if missing.
        states: Nested dicts, lists and tuples of tensors, arrays, numbers, strings and ``None`` by name.
        step: Optimiser steps taken so far.
        info: Small JSON facts, readable without loading tensors.
        keep: How many checkpoints stay, at least 1.

    Returns:
        The new checkpoint's directory.

    Raises:
        CheckpointError: The disk is full or failing; earlier checkpoints are intact.
        TypeError: A state holds something that only pickle could write.
    """
    if keep < 1:
        raise ValueError(f"keep: got {keep}, accepted: at least 1")
    save_file = require("safetensors.torch", extra="train", feature="saving a checkpoint").save_file
    target = Path(directory) / f"step-{step:08d}"
    documents: dict[str, Any] = {}
    with files.new_directory(target) as folder:
        for name, state in states.items():
            documents[name], tensors = flatten(state, name)
            if tensors:
                try:
                    save_file(tensors, folder / f"{name}.safetensors")
                except (
                    Exception
                ) as error:  # safetensors hides the errno of a full disk in an error of its own
                    raise _as_os_error(error) from error
        (folder / STATES).write_text(json.dumps(documents))
        listing = {
            file.name: {"bytes": file.stat().st_size, "sha256": files.sha256(file)}
            for file in sorted(folder.iterdir())
        }
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "step": step,
            "info": dict(info or {}),
            "files": listing,
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    for old in _listed(Path(directory))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def latest_checkpoint(directory: str | Path) -> Path | None:
    """The checkpoint with the most steps in ``directory``, or ``None`` if there is none."""
    found = _listed(Path(directory))
    return found[-1] if found else None


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint, checking every file against its checksum.

    Args:
        path: One checkpoint's directory, or a directory of checkpoints (the latest is taken).

    Raises:
        CheckpointError: There is none, or a file is missing, damaged or from a newer version; the message names it.
    """
    path = Path(path)
    if not (path / MANIFEST).exists() and (latest := latest_checkpoint(path)):
        path = latest
    manifest = _read_manifest(path)
    for name, listed in manifest["files"].items():
        _check_file(path / name, listed)
    documents = read_json(path / STATES)
    states = {}
    for name, document in documents.items():
        file = path / f"{name}.safetensors"
        try:
            states[name] = unflatten(document, read_tensors(file) if file.name in manifest["files"] else {})
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path / STATES}: state {name!r} does not fit its tensors: {error}"
            ) from error
    return Checkpoint(path, int(manifest["step"]), states, manifest["info"])


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file onto the CPU.

    Raises:
        CheckpointError: It is missing, cut short, or not safetensors.
    """
    load_file = require("safetensors.torch", extra="train", feature="loading a checkpoint").load_file
    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: does not exist") from None
    except Exception as error:  # safetensors raises an exception class of its own, and OSError
        raise CheckpointError(f"{path}: is not a readable safetensors file: {error}") from error
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: It is missing, unreadable, or not a JSON object.
    """
    try:
        document = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: does not exist") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path}: holds a JSON {type(document).__name__}, expected an object")
    return document


def _listed(directory: Path) -> list[Path]:
    if not directory.is_dir():
        return []
    return sorted(
        (path for path in directory.iterdir() if _NAME.fullmatch(path.name)),
        key=lambda path: int(path.name[5:]),
    )


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise CheckpointError(f"{path}: does not exist")
    if not (path / MANIFEST).exists():
        raise CheckpointError(f"{path}: holds no {MANIFEST} and no step-… directory, so it is no checkpoint")
    manifest = read_json(path / MANIFEST)
    if manifest.get("format") != FORMAT or not {"step", "files", "info"} <= manifest.keys():
        raise CheckpointError(f"{path / MANIFEST}: is not the manifest of a kdfast checkpoint")
    if manifest.get("version") != VERSION:
        raise CheckpointError(
            f"{path / MANIFEST}: has version {manifest.get('version')}; this kdfast reads version {VERSION}"
        )
    return manifest


def _check_file(path: Path, listed: Mapping[str, Any]) -> None:
    if not path.exists():
        raise CheckpointError(f"{path}: is missing from the checkpoint")
    if (size := path.stat().st_size) != listed["bytes"]:
        raise CheckpointError(f"{path}: is damaged: it has {size} bytes, {listed['bytes']} were written")
    if files.sha256(path) != listed["sha256"]:
        raise CheckpointError(f"{path}: is damaged: its checksum is not the one that was written")


def _as_os_error(error: Exception) -> Exception:
    if match := re.search(r"os error (\d+)", str(error)):
        return OSError(int(match[1]), str(error))
    return error

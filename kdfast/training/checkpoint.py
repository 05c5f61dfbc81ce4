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

from kdfast.documents import Fields, parse_json, read_text, shown
from kdfast.errors import CheckpointError, require
from kdfast.training import files
from kdfast.training.state import flatten, unflatten

FORMAT = "kdfast-checkpoint"
VERSION = 1
MANIFEST = "checkpoint.json"
STATES = "states.json"
_NAME = re.compile(r"step-(\d{8,})")
#: What a checkpoint may list: nothing outside of its folder, no pipe and no device.
_FILE = re.compile(r"states\.json|[A-Za-z0-9_]+\.safetensors")
#: What a document raises that says of itself what it is not.
_SENSELESS = (
    KeyError,
    TypeError,
    ValueError,
    IndexError,
    AttributeError,
    SyntaxError,
    OverflowError,
    RuntimeError,
)


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

    def __repr__(self) -> str:
        """Where it is and what it holds, without the tensors."""
        return f"Checkpoint({str(self.path)!r}: step {self.step:,}, states {', '.join(self.states)})"


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
    prune(directory, keep)
    return target


def prune(directory: str | Path, keep: int) -> None:
    """Remove all but the last ``keep`` checkpoints, and unfinished ones: a killed run may not have come to it."""
    files.clear(Path(directory))
    for old in _listed(Path(directory))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


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
    try:
        return _load(path)
    except CheckpointError as error:
        raise CheckpointError(f"{error}{_older(path)}") from error


def _older(path: Path) -> str:
    """What to do about a damaged checkpoint where there is one from before."""
    before = [
        other
        for other in _listed(path.parent)
        if other.name < path.name and len(other.name) <= len(path.name)
    ]
    if not _NAME.fullmatch(path.name) or not before:
        return ""
    try:
        _load(before[-1])
    except CheckpointError:
        return ""
    return f"; {before[-1]} is intact: remove {path} to go on from there with --resume"


def _load(path: Path) -> Checkpoint:
    manifest = _read_manifest(path)
    listed = Fields(manifest.mapping("files"), f"{manifest}: files", CheckpointError)
    if STATES not in listed:
        raise CheckpointError(f"{listed}: lacks {STATES}")
    for name in listed:
        if not _FILE.fullmatch(name):
            raise CheckpointError(f"{listed}: got {shown(name)}, accepted: {STATES} and NAME.safetensors")
        _check_file(path / name, Fields(listed.mapping(name), f"{listed}: {name}", CheckpointError))
    documents = read_json(path / STATES)
    states = {}
    for name, document in documents.items():
        file = path / f"{name}.safetensors"
        try:
            states[name] = unflatten(document, read_tensors(file) if file.name in listed else {})
        except (*_SENSELESS,) as error:
            raise CheckpointError(
                f"{path / STATES}: state {shown(name)} does not fit its tensors: {error}"
            ) from error
    return Checkpoint(path, manifest.integer("step", 0), states, manifest.mapping("info"))


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
        document = parse_json(read_text(path, error=CheckpointError), what=str(path), error=CheckpointError)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: does not exist") from None
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


def _read_manifest(path: Path) -> Fields:
    if not path.exists():
        raise CheckpointError(f"{path}: does not exist")
    if not (path / MANIFEST).exists():
        raise CheckpointError(f"{path}: holds no {MANIFEST} and no step-… directory, so it is no checkpoint")
    manifest = read_json(path / MANIFEST)
    if manifest.get("format") != FORMAT or not {"step", "files", "info"} <= manifest.keys():
        raise CheckpointError(f"{path / MANIFEST}: is not the manifest of a kdfast checkpoint")
    if manifest.get("version") != VERSION:
        raise CheckpointError(
            f"{path / MANIFEST}: has version {shown(manifest.get('version'))}; this kdfast reads version {VERSION}"
        )
    return Fields(manifest, path / MANIFEST, CheckpointError)


def _check_file(path: Path, listed: Fields) -> None:
    if not path.exists():
        raise CheckpointError(f"{path}: is missing from the checkpoint")
    if not path.is_file():
        raise CheckpointError(f"{path}: is damaged: it is no file")
    if (size := path.stat().st_size) != (written := listed.integer("bytes", 0)):
        raise CheckpointError(f"{path}: is damaged: it has {size} bytes, {written} were written")
    if files.sha256(path) != listed.text("sha256"):
        raise CheckpointError(f"{path}: is damaged: its checksum is not the one that was written")


def _as_os_error(error: Exception) -> Exception:
    if match := re.search(r"os error (\d+)", str(error)):
        return OSError(int(match[1]), str(error))
    return error

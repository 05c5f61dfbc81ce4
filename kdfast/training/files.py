"""Files that are on disk whole under their name, or not there under that name at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kdfast.disk import TEMPORARY as _TEMPORARY
from kdfast.disk import sync_directory, sync_file, write_atomic
from kdfast.errors import CheckpointError


def write_file(path: Path, data: str | bytes) -> None:
    """Replace ``path`` atomically: written beside it, flushed to disk, renamed over it.

    Raises:
        CheckpointError: The disk is full or failing. The old file is untouched.
    """
    with reporting_disk(path):
        write_atomic(path, data.encode() if isinstance(data, str) else data)


def write_json(path: Path, document: Any) -> None:
    """Replace ``path`` atomically by indented JSON."""
    write_file(path, json.dumps(document, indent=1, ensure_ascii=False) + "\n")


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Fill a directory under a temporary name, then give it its own. One writer a parent directory at a time.

    On success everything in it is flushed to disk and an older directory of that name is gone; on any error, and
    after a crash at any moment, ``path`` is what it was before.

    Yields:
        The temporary directory to write into.

    Raises:
        CheckpointError: The disk is full or failing.
    """
    with reporting_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        clear(path.parent)
        temporary = path.with_name(f"{_TEMPORARY}{os.getpid()}-{path.name}")
        temporary.mkdir()
        try:
            yield temporary
            for file in temporary.iterdir():
                sync_file(file)
            sync_directory(temporary)
            if path.exists():
                # A directory cannot be renamed over a full one; a crash between these two lines loses only a
                # checkpoint that was being replaced by its equal.
                os.rename(path, path.with_name(f"{_TEMPORARY}old-{path.name}"))
            os.rename(temporary, path)
            sync_directory(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(path.with_name(f"{_TEMPORARY}old-{path.name}"), ignore_errors=True)


def clear(directory: Path) -> None:
    """Remove the unfinished directories that killed writers left; for the only writer there is."""
    for stale in directory.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(stale, ignore_errors=True)


@contextmanager
def reporting_disk(path: Path) -> Iterator[None]:
    """Turn an operating system's refusal to write into a :class:`CheckpointError` that says where and why."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(_existing(path)).free / 2**20
            raise CheckpointError(
                f"{path}: cannot be written, the disk is full ({free:.0f} MiB free); what was there before is "
                "intact. Free some space, then continue with --resume"
            ) from error
        raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}") from error


def sha256(path: Path) -> str:
    """Checksum of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path

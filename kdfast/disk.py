"""Files that are on disk whole or not at all, and folders that one process writes at a time."""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import os
import secrets
import socket
import sys
import warnings
import weakref
from pathlib import Path

from kdfast.closing import Closing
from kdfast.documents import Fields, parse_json, read_text
from kdfast.errors import KDFastError

#: What the name of every unfinished file and folder begins with; whoever holds a folder's lock may remove them.
TEMPORARY = ".tmp-"


def temporary_name(path: Path) -> Path:
    """A name beside ``path`` that no other thread, process or machine uses."""
    return path.with_name(f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}-{path.name}")


def write_atomic(path: Path, *chunks: bytes | memoryview, alone: bool = False) -> None:
    """Write a file so that it is on disk whole under its name, or not there under that name at all.

    Args:
        path: Its name.
        chunks: Its contents.
        alone: The caller holds the folder's lock, so that the unfinished file can have a plain name, ``NAME.tmp``.

    Raises:
        OSError: The disk is full or failing; the temporary file is removed, and an older file is untouched.
    """
    temporary = path.with_name(path.name + ".tmp") if alone else temporary_name(path)
    if alone:
        temporary.unlink(missing_ok=True)
    try:
        # "x" never follows a link that someone has laid there.
        with open(temporary, "xb") as stream:
            for chunk in chunks:
                stream.write(chunk)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Make renames inside ``directory`` durable."""
    _sync(directory, os.O_RDONLY | os.O_DIRECTORY)


def sync_file(path: Path) -> None:
    """Make what a file holds durable."""
    _sync(path, os.O_RDONLY)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep(directory: Path) -> None:
    """Remove the unfinished files that killed writers left; for whoever holds the folder's lock."""
    for path in directory.glob(f"{TEMPORARY}*"):
        with contextlib.suppress(OSError):
            path.unlink()


class Lock(Closing):
    """The right to write into a folder, which ends with the process, however that ends.

    A ``flock`` on a small file that stays behind: the kernel drops the lock when the last descriptor closes, so a crash
    or a ``kill -9`` leaves nothing to clean up. The file says who holds it, for the message of whoever finds it taken.
    Forked children (data loaders' workers) let go of it at once, so that they cannot outlive their parent with it.

    Args:
        path: The lock's file, inside the folder.
        what: The folder as messages call it.
        error: What to raise.
        who: What holds such locks.

    Raises:
        KDFastError: As ``error``: another process, or this one, holds it; the message names it.
        OSError: The file cannot be made.
    """

    def __init__(self, path: Path, *, what: str, error: type[KDFastError], who: str = "another run") -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as problem:
            if problem.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                # A file system without locks: better to work unprotected than not at all, but not silently.
                warnings.warn(f"{what}: cannot be locked ({problem.strerror})", stacklevel=3)
            else:
                self.release()
                raise error(f"{what}: {who} is writing here{_holder(path)}") from None
        with contextlib.suppress(OSError):  # a full disk: the lock itself needs no space
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, _self_description(), 0)
        _held.add(self)

    def release(self) -> None:
        """Let others in; a second call does nothing."""
        if self._descriptor >= 0:
            # Unlocked, not only closed: a child that was just forked may not have closed its copy yet.
            with contextlib.suppress(OSError):
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            self.drop()

    def drop(self) -> None:
        """Close this process's descriptor; the lock stays while another has a copy."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    close = release

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            self.release()


_held: weakref.WeakSet[Lock] = weakref.WeakSet()


def _release_in_child() -> None:
    for lock in list(_held):
        lock.drop()  # closes the child's copy; the parent's keeps the lock


os.register_at_fork(after_in_child=_release_in_child)


def _self_description() -> bytes:
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    facts = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "started": now,
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])[:200] if sys.argv else "",
    }
    return json.dumps(facts).encode()


def _holder(path: Path) -> str:
    """Who holds a lock, as its file says; nothing if it says nothing sensible."""
    try:
        text = read_text(path, error=KDFastError, limit=4096)
        facts = Fields(parse_json(text, what=str(path), error=KDFastError), path, KDFastError)
        who = f": process {facts.integer('pid', 1)} on {facts.text('host')}"
        return f"{who}, started {facts.text('started')} ({facts.text('command')})"
    except (KDFastError, OSError):
        return ""

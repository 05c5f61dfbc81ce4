"""Open files and worker processes: none outlives its loader, none left is no fault of a shard, a dead one is named."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kdfast.data import ShardError, ShardLoader, torch_loader
from kdfast.errors import KDFastError
from tests.support.shards import numbers, write_numbered

KINDS = [("dali", None), ("torch", 0), ("torch", 2)]


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


# Torch's own iterator, of which too little was made to be put away.
HALF_MADE = "ignore::pytest.PytestUnraisableExceptionWarning"


@pytest.fixture
def no_collector() -> Iterator[None]:
    """What is let go of goes at once, or it leaks: a collection may be a long time away."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextlib.contextmanager
def room_for(more: int) -> Iterator[None]:
    """As under ``ulimit -n``, with so many descriptors to spare."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(map(int, os.listdir("/proc/self/fd")))
    held = []
    while (free := os.open("/dev/null", os.O_RDONLY)) < used:  # the gaps below
        held.append(free)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 1 + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in held:
            os.close(descriptor)


@pytest.mark.parametrize("kind, workers", KINDS)
@pytest.mark.parametrize("closed", [False, True])
def test_a_loader_that_is_dropped_in_mid_epoch_keeps_nothing(
    tmp_path: Path, kind: str, workers: int | None, closed: bool, no_collector: None
) -> None:
    write_numbered(tmp_path, 40, per_shard=1)

    def use() -> None:
        loader = ShardLoader(tmp_path, 4, loader=kind, num_workers=workers)
        for images, _ in loader:
            assert len(images) == 4
            break
        if closed:
            loader.close()

    use()  # what the first one of a process opens for good
    before = descriptors(), len(multiprocessing.active_children())
    for _ in range(4):
        use()
    # No more than before, once its workers and their threads are gone, which takes a moment on a busy machine.
    end = time.monotonic() + 30
    while descriptors() > before[0] or len(multiprocessing.active_children()) > before[1]:
        assert time.monotonic() < end, (descriptors(), multiprocessing.active_children(), before)
        time.sleep(0.05)


@pytest.mark.parametrize("kind", ["dali", "torch"])
def test_an_iterator_outlives_the_name_of_its_loader(tmp_path: Path, kind: str) -> None:
    write_numbered(tmp_path, 40)
    seen = [n for images, _ in ShardLoader(tmp_path, 8, loader=kind) for n in numbers(images)]
    assert sorted(seen) == list(range(40))


def test_few_descriptors_are_enough_for_many_shards(tmp_path: Path) -> None:
    write_numbered(tmp_path, 60, per_shard=1)
    loader = ShardLoader(tmp_path, 8, loader="torch", on_error="skip")
    with room_for(5):
        seen = [n for images, _ in loader for n in numbers(images)]
    assert sorted(seen) == list(range(60))
    assert loader.quarantined == []


def test_no_descriptor_at_all_is_no_fault_of_the_shard(tmp_path: Path) -> None:
    write_numbered(tmp_path, 20, per_shard=1)
    loader = ShardLoader(tmp_path, 4, loader="torch", on_error="skip")
    with room_for(0), pytest.raises(ShardError, match=r"shard-\d+\.tar: cannot be opened: .*ulimit -n"):
        next(iter(loader))
    assert loader.quarantined == []
    assert sorted(n for images, _ in loader for n in numbers(images)) == list(range(20))


def test_a_worker_process_that_dies_is_named_and_the_next_epoch_has_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_numbered(tmp_path, 40)
    loader = ShardLoader(tmp_path, 4, loader="torch", num_workers=2, on_error="skip")

    def dies(data: bytes, **options: bool) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    with monkeypatch.context() as patch:
        patch.setattr(torch_loader, "decode", dies)
        with pytest.raises(KDFastError, match=r"num_workers: a decoding process died .*pid.*fewer workers"):
            next(iter(loader))
    loader.set_epoch(1)
    assert sorted(n for images, _ in loader for n in numbers(images)) == list(range(40))
    assert loader.quarantined == []
    loader.close()
    assert multiprocessing.active_children() == []


@pytest.mark.filterwarnings(HALF_MADE)
def test_processes_that_cannot_be_started_are_named(tmp_path: Path) -> None:
    write_numbered(tmp_path, 40)
    loader = ShardLoader(tmp_path, 4, loader="torch", num_workers=2)
    with room_for(2), pytest.raises(KDFastError, match=r"num_workers: .*Too many open files.*ulimit -n"):
        next(iter(loader))


@pytest.mark.parametrize("kind", ["dali", "torch"])
def test_an_epoch_that_the_interpreters_end_cuts_off_is_quiet(tmp_path: Path, kind: str) -> None:
    write_numbered(tmp_path, 40)
    program = (
        "import sys; from kdfast.data import ShardLoader; "
        f"loader = ShardLoader({str(tmp_path)!r}, 4, loader={kind!r}); batches = iter(loader); next(batches)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=root)
    assert (done.returncode, done.stderr) == (0, "")

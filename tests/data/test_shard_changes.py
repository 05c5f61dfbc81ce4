"""Shards that others touch while an epoch runs: what is left is read, what is lost is listed, nothing is mixed up."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kdfast.data import ShardError, ShardLoader
from tests.support.shards import numbers, write_numbered

FOUR = 4


@pytest.fixture(params=["dali", "torch"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def other(folder: Path) -> Path:
    """A set of the same layout, whose second shard holds other numbers."""
    write_numbered(folder / "other", 60)
    return folder / "other" / "shard-000003.tar"


def shrink(path: Path, _: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path, _: Path) -> None:
    os.truncate(path, 0)


def vanish(path: Path, _: Path) -> None:
    path.unlink()


def pipe(path: Path, _: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def swap(path: Path, other: Path) -> None:
    assert other.stat().st_size == path.stat().st_size
    shutil.copy(other, path.parent / "new")
    os.replace(path.parent / "new", path)


def overwrite(path: Path, other: Path) -> None:
    path.write_bytes(other.read_bytes())


CHANGES: list[tuple[Callable[[Path, Path], None], str]] = [
    (shrink, "cut short"),
    (empty, "cut short"),
    (vanish, "cannot be read: No such file"),
    (pipe, "cannot be read"),
    (swap, "changed"),
    (overwrite, "changed"),
]


@pytest.mark.parametrize("change, reason", CHANGES, ids=lambda value: getattr(value, "__name__", ""))
def test_an_epoch_goes_on_without_a_shard_that_changes(
    tmp_path: Path, kind: str, change: Callable[[Path, Path], None], reason: str
) -> None:
    folder = write_numbered(tmp_path / "set", 40)
    with ShardLoader(folder, FOUR, loader=kind, on_error="skip", shuffle=False) as loader:  # type: ignore[arg-type]
        seen = []
        for images, labels in loader:
            if not seen:  # up to three batches, of the first two shards, may be under way
                change(folder / "shard-000002.tar", other(tmp_path))
            found = numbers(images)
            assert labels.tolist() == [number % 10 for number in found]
            seen += found
        assert seen == [*range(20), *range(30, 40)]
        assert all(reason in fault.reason for fault in loader.quarantined)
        assert [fault.key for fault in loader.quarantined] == [f"{number:09d}" for number in range(20, 30)]
        assert [number for images, _ in loader for number in numbers(images)] == seen


@pytest.mark.parametrize("change, reason", CHANGES, ids=lambda value: getattr(value, "__name__", ""))
def test_raise_names_the_shard_that_changes(
    tmp_path: Path, kind: str, change: Callable[[Path, Path], None], reason: str
) -> None:
    folder = write_numbered(tmp_path / "set", 40)
    with ShardLoader(folder, FOUR, loader=kind, shuffle=False) as loader:  # type: ignore[arg-type]
        batches = iter(loader)
        next(batches)
        change(folder / "shard-000002.tar", other(tmp_path))
        with pytest.raises(ShardError, match=rf"shard-000002\.tar, key .*: .*{reason}.*on_error='skip'"):
            list(batches)


def test_a_shard_that_is_open_already_is_looked_at_too(tmp_path: Path, kind: str) -> None:
    folder = write_numbered(tmp_path / "set", 40)
    with ShardLoader(folder, FOUR, loader=kind, shuffle=False, on_error="skip") as loader:  # type: ignore[arg-type]
        assert len(list(loader)) == 10
        overwrite(folder / "shard-000001.tar", other(tmp_path))
        assert sum(len(labels) for _, labels in loader) == 30
        assert len(loader.quarantined) == 10


def test_the_same_bytes_anew_are_the_same_shard(tmp_path: Path, kind: str) -> None:
    folder = write_numbered(tmp_path / "set", 40)
    with ShardLoader(folder, FOUR, loader=kind, shuffle=False) as loader:  # type: ignore[arg-type]
        next(iter(loader))
        shutil.copytree(folder, tmp_path / "copy")
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "copy", folder)
        (folder / "shard-000001.tar").touch()
        assert [number for images, _ in loader for number in numbers(images)] == list(range(40))

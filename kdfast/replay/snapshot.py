"""State of a replay buffer as a dict and as a file: what is in it, and how it is checked before it is trusted."""

from __future__ import annotations

import json
import math
import os
from typing import Any

import numpy as np
import torch

from kdfast.errors import CheckpointError
from kdfast.reference.replay import Meta, ReplayState, SumLayout, extension
from kdfast.replay.checks import check_exponents, check_int, check_real

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


#: Bytes of settings that are read; real ones take some 300.
_CONFIG_LIMIT = 1 << 20


def tensors_of(state: ReplayState) -> dict[str, torch.Tensor]:
    """Copies of all memory, of one moment; rows stop at the last slot in use."""
    return state.copies(*_BOOKKEEPING_KINDS, "rows")


def check_config(state: Any, own: dict[str, Any]) -> dict[str, Any]:
    """The settings of a state; refuse one that was made under others.

    Raises:
        CheckpointError: It names the setting, its value in the state, and the buffer's.
    """
    got = state.get("config") if isinstance(state, dict) else None
    if not isinstance(got, dict):
        raise CheckpointError("replay state: has no 'config'")
    for key in FIXED:
        theirs, ours = got.get(key), own[key]
        if type(theirs) is not type(ours) or theirs != ours:
            raise CheckpointError(f"replay state: {key} is {theirs!r}, this buffer's is {ours!r}")
    try:
        check_real("beta", got.get("beta"))
        check_exponents(own["alpha"], got["beta"])
        check_int("seed", got.get("seed"), 0, (1 << 64) - 1)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"replay state: {error}") from error
    return got


def check_seed(seed: int, meta: torch.Tensor) -> None:
    """Refuse settings whose seed is not the one that the draws come from.

    Raises:
        CheckpointError: It names both.
    """
    used = int(meta[Meta.SEED]) % (1 << 64)
    if used != seed:
        raise CheckpointError(f"replay state: inconsistent, seed is {seed}, the draws' is {used}")


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


_FLOAT_INF_BITS = 0x7F800000


def _check_consistent(state: ReplayState, found: dict[str, torch.Tensor]) -> None:
    def expect(holds: bool, otherwise: str) -> None:
        if not holds:
            raise CheckpointError(f"replay state: inconsistent, {otherwise}")

    leaves, labels, meta, counts = (found[name] for name in ("leaves", "labels", "meta", "class_counts"))
    live = leaves != 0
    filled, counted, head = int(live.sum()), int(meta[Meta.LIVE]), int(meta[Meta.HEAD])
    expect(filled == counted, f"{filled} slots are filled, {counted} are counted")
    expect(0 <= head < state.capacity, f"the next slot is {head} of {state.capacity}")
    words = {word: int(meta[word]) for word in Meta}
    inserted, evicted, highest = (words[word] for word in (Meta.INSERTED, Meta.EVICTED, Meta.MAX_PRIORITY))
    idle = words[Meta.PENDING_MAX] == -1 and words[Meta.TICKET] == 0
    expect(idle, "a launch was under way")
    for word in (Meta.STEP, *(word for word in Meta if word > Meta.TICKET)):
        expect(words[word] >= 0, f"{word.name.lower()} is {words[word]}")
    expect(
        inserted >= counted + evicted,
        f"{inserted} rows were inserted, {counted} are held and {evicted} were evicted",
    )
    expect(-1 <= highest < _FLOAT_INF_BITS, "the largest priority is no finite number")
    expect(bool((labels >= -1).all()), "a label is negative")
    ages = (inserted - found["generation"][live].long()) % (1 << 32)
    expect(len(torch.unique(ages)) == filled, "two rows are of one insertion")
    youngest_first = not filled or (int(ages.min()) >= 1 and int(ages.max()) <= inserted)
    expect(inserted >= 1 << 32 or youngest_first, "a row is of an insertion that has not been")
    expect(bool((found["delta"][live] >= 0).all()), "a priority is negative or NaN")
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


def _sections(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> list[tuple[str, Any]]:
    config = {**config, "used_slots": len(tensors["rows"])}
    sections = [("config", np.frombuffer(json.dumps(config).encode(), np.uint8))]
    for name, tensor in tensors.items():
        sections.append((name, tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
    return sections


def write(path: str | os.PathLike[str], config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Write a snapshot file: all of it, or nothing.

    Raises:
        OSError: The disk is full, the folder is missing or not writable.
        ValueError: The path has a NUL in it.
    """
    name = os.fsencode(path)
    if b"\0" in name:  # the operating system would stop reading there
        raise ValueError(f"path: got {os.fspath(path)!r}, accepted: a path without NUL")
    extension().save_snapshot(name, _sections(config, tensors))


def encode(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> bytes:
    """A snapshot in memory."""
    data: bytes = extension().encode_snapshot(_sections(config, tensors))
    return data


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A snapshot file's settings and tensors; the checksums hold, consistency is not checked yet.

    Before more than the settings is read, the sections' sizes are compared with the settings, and the buffer's with
    the machine's memory.

    Raises:
        CheckpointError: The file is missing, no snapshot, of another version, truncated, damaged or too large.
    """
    try:
        file = extension().SnapshotFile(os.fsencode(path))
        if "config" not in file.sizes:
            raise KeyError("config")
        config = _parsed(file.section("config", _CONFIG_LIMIT))
        sizes = _expected_sizes(config)
        found = {name: size for name, size in file.sizes.items() if name != "config"}
        if found != sizes:
            raise ValueError(f"sections of {found} bytes, expected {sizes}")
        _check_memory(config, sum(sizes.values()))
        return _tensors(config, file.read())
    except (OSError, extension().SnapshotError, MemoryError) as error:
        raise CheckpointError(f"{os.fspath(path)}: {error}") from error
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{os.fspath(path)}: no snapshot of a replay buffer ({error!r})") from error


def decode(data: bytes) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The settings and tensors of a snapshot in memory.

    Raises:
        CheckpointError: It is damaged.
    """
    try:
        sections = extension().decode_snapshot(np.frombuffer(bytearray(data), np.uint8))
        return _tensors(_parsed(sections["config"].tobytes()), sections)
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"pickled replay buffer: no snapshot of one ({error})") from error


def _parsed(text: bytes) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except RecursionError:
        raise ValueError("settings are nested too deeply") from None
    if not isinstance(config, dict):
        raise TypeError(f"settings are {type(config).__name__}, expected an object")
    return config


def _expected_sizes(config: dict[str, Any]) -> dict[str, int]:
    """Bytes of each section, as the settings say."""
    capacity, classes, used = config["capacity"], config["num_classes"], config["used_slots"]
    check_int("capacity", capacity, 1, 1 << 31)
    check_int("used_slots", used, 0, capacity)
    if classes is not None:
        check_int("num_classes", classes, 1, 1 << 31)
    kinds = {**_BOOKKEEPING_KINDS, "rows": DTYPES[config["dtype"]]}
    lengths = {
        **dict.fromkeys(_BOOKKEEPING_KINDS, capacity),
        "sums": SumLayout.of(capacity).words,
        "meta": len(Meta),
        "class_counts": classes or 0,
        "rows": used * _row_elements(config),
    }
    return {name: length * kinds[name].itemsize for name, length in lengths.items()}


def _row_elements(config: dict[str, Any]) -> int:
    shape = config["sample_shape"]
    if not isinstance(shape, list) or len(shape) > 64:
        raise TypeError(f"sample_shape: got {shape!r}, accepted: a list of at most 64 integers")
    for size in shape:
        check_int("sample_shape", size, 0, 1 << 62)
    return math.prod(shape)


def _check_memory(config: dict[str, Any], contents: int) -> None:
    """Refuse what cannot be held: a small file may claim a large buffer."""
    rows = config["capacity"] * _row_elements(config) * DTYPES[config["dtype"]].itemsize
    need = rows + contents
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if need > have:
        raise MemoryError(f"a buffer of {need} bytes; this machine has {have}")


def _tensors(
    config: dict[str, Any], sections: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    kinds = {**_BOOKKEEPING_KINDS, "rows": DTYPES[config["dtype"]]}
    tensors = {name: torch.from_numpy(sections[name]).view(kind) for name, kind in kinds.items()}
    tensors["rows"] = tensors["rows"].view(config["used_slots"], *config["sample_shape"])
    return config, tensors

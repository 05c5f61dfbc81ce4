"""Image sources of ``kdfast synth`` that need no network: noise, shader programs, dead leaves, GLSL files.

Each is a function from image numbers to images, with the facts that a set's manifest keeps; one loop writes them all.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kdfast.data import ShardWriter
from kdfast.data.surrogate import leaves, load_programs, noise, random_programs, save_programs, shaders
from kdfast.data.surrogate.programs import Program
from kdfast.data.surrogate.uniform import uniform_noise
from kdfast.diffusion.parts import check_same_run, joined, merge_parts, part_directory, shard_range
from kdfast.errors import require
from kdfast.experiments.synth.config import SynthConfig
from kdfast.report.grid import write_grid

PROGRAMS, SHEET = "programs.json", "samples.png"
#: Programs that stand for all of a set's in its manifest.
_NAMED = 16
_SHEET_IMAGES, _SHEET_COLUMNS, _SHEET_TILE = 96, 12, 96


@dataclass(frozen=True)
class Source:
    """Where images come from.

    Attributes:
        make: ``(count, start)`` to uint8 ``[count, 3, H, W]``; an image depends on its number alone.
        facts: What makes the set this one: kept in the manifest, compared on resuming.
        programs: The shader programs of the first so many images, which are kept beside the set.
        faults: What was left out, a line each.
    """

    make: Callable[[int, int], torch.Tensor]
    facts: dict[str, Any]
    programs: Callable[[int], list[Program]] | None = None
    faults: list[str] = field(default_factory=list)


@contextlib.contextmanager
def open_source(config: SynthConfig, device: torch.device) -> Iterator[Source]:
    """The source that ``config`` names.

    Raises:
        DataError: A file of programs, or a folder of GLSL, that cannot be used.
        MissingExtraError: A package is missing.
        BackendError: There is no EGL to render GLSL with.
    """
    shape = (config.image_size, config.image_size)
    facts: dict[str, Any] = {
        "generator": config.source,
        "seed": config.seed,
        "image_size": config.image_size,
    }
    if config.source == "noise":
        yield Source(lambda n, start: _noise(config, n, start), facts | _noise_facts(config))
    elif config.source == "leaves":
        yield Source(
            lambda n, start: leaves(
                n, shape, seed=config.seed, start=start, limit=config.leaves, device=device
            ),
            facts | {"leaves": config.leaves},
        )
    elif config.source == "shaders":
        yield _shaders(config, device, facts)
    else:
        from kdfast.data.surrogate.glsl import GLSLFolder

        with GLSLFolder(config.folder or "", seconds=config.seconds) as folder:
            del facts["seed"]  # which has no part in it
            yield Source(
                lambda n, start: folder.images(n, shape, start=start),
                facts | folder.facts(),
                faults=[str(fault) for fault in folder.faults],
            )


def _noise_facts(config: SynthConfig) -> dict[str, Any]:
    facts: dict[str, Any] = {"noise": config.noise}
    if config.noise == "gaussian" and (config.noise_mean, config.noise_std) != ((0.5,) * 3, (0.25,) * 3):
        # Sets of the default's go on being told by what they always said.
        facts |= {"noise_mean": list(config.noise_mean), "noise_std": list(config.noise_std)}
    return facts


def _noise(config: SynthConfig, count: int, start: int) -> torch.Tensor:
    shape = (config.image_size, config.image_size)
    if config.noise == "uniform":
        return uniform_noise(count, shape, seed=config.seed, start=start)
    return noise(count, shape, mean=config.noise_mean, std=config.noise_std, seed=config.seed, start=start)


def _shaders(config: SynthConfig, device: torch.device, facts: dict[str, Any]) -> Source:
    programs: int | list[Program] = config.programs
    if config.programs_file is not None:
        programs = load_programs(config.programs_file)
        del facts["seed"]
    count = programs if isinstance(programs, int) else len(programs)

    def used(first: int) -> list[Program]:
        """The programs that the first so many images show."""
        first = min(first, count)
        return random_programs(first, seed=config.seed) if isinstance(programs, int) else programs[:first]

    facts |= {
        "programs": count,
        # A seed names other programs when the grammar grows from one version to the next: the set knows its own.
        "programs_sha256": hashlib.sha256(repr(used(_NAMED)).encode()).hexdigest(),
        "antialias": config.antialias,
    }

    def make(n: int, start: int) -> torch.Tensor:
        return shaders(
            n,
            (config.image_size, config.image_size),
            seed=config.seed,
            start=start,
            programs=programs,
            antialias=config.antialias,
            device=device,
        )

    return Source(make, facts, used)


def write(
    config: SynthConfig, accelerator: Any, bar: Callable[[int, int], None]
) -> tuple[int, list[str], bool]:
    """Write the set, or this process's share of it, as ``kdfast.diffusion.Synthesizer.write`` does.

    Returns:
        Images written by this call, what was left out, and whether the whole set is in place.
    """
    if config.sheet:  # said before any work is done
        require("matplotlib.image", extra="report", feature="a sheet of samples (sheet=false goes without)")
    threads = torch.get_num_threads()
    # Hundreds of small operations an image: a second thread costs more in meetings than it brings.
    torch.set_num_threads(1)
    try:
        return _write(config, accelerator, bar)
    finally:
        torch.set_num_threads(threads)


def _write(
    config: SynthConfig, accelerator: Any, bar: Callable[[int, int], None]
) -> tuple[int, list[str], bool]:
    rank, world = accelerator.process_index, accelerator.num_processes
    root = Path(config.out)
    start, stop = shard_range(config.images, config.samples_per_shard, rank, world)
    with open_source(config, accelerator.device) as source:
        check_same_run(root, source.facts)
        written = 0
        if start < stop and not (world > 1 and joined(root, config.images, resume=config.resume)):
            target = root if world == 1 else part_directory(root, start, stop)
            written = _write_range(config, source, target, start, stop, bar)
        complete = world == 1 or merge_parts(root, config.images, config.samples_per_shard, world)
        if rank == 0:
            _write_extras(config, source, root)
    return written, source.faults, complete


def _write_range(
    config: SynthConfig, source: Source, target: Path, start: int, stop: int, bar: Callable[[int, int], None]
) -> int:
    check_same_run(target, source.facts)
    with ShardWriter(
        target,
        **config.written,
        num_classes=config.num_classes,
        metadata=source.facts,
        first_sample=start,
    ) as writer:
        begun = start + writer.num_samples
        bar(begun - start, stop - start)
        for first in range(begun, stop, config.batch_size):
            count = min(config.batch_size, stop - first)
            writer.write(source.make(count, first), torch.arange(first, first + count) % config.num_classes)
            bar(first + count - start, stop - start)
    return max(0, stop - begun)


def _write_extras(config: SynthConfig, source: Source, root: Path) -> None:
    if source.programs is not None:
        save_programs(source.programs(config.images), root / PROGRAMS)
    if config.sheet:
        images = source.make(min(_SHEET_IMAGES, config.images), 0).cpu()
        scale = max(1, _SHEET_TILE // config.image_size)
        write_grid(root / SHEET, images, columns=_SHEET_COLUMNS, scale=scale)

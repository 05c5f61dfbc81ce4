"""Reading shards back as batches on the device, in an order that a checkpoint can name."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from kdfast.closing import Closing
from kdfast.constants import constant
from kdfast.data.decoder import Decoder, DecoderConfig
from kdfast.data.preflight import Fault, RecordTable, check_shards
from kdfast.data.reader import RecordReader
from kdfast.data.schedule import Schedule
from kdfast.documents import Fields, shown
from kdfast.errors import CheckpointError, ShardError
from kdfast.profiling import annotate, each

Batch = tuple[torch.Tensor, torch.Tensor]
Augment = Callable[[torch.Tensor, torch.Generator], torch.Tensor]


class ShardLoader(Closing):
    """Batches of a set of shards, on ``device``: images float32 ``[B, 3, H, W]`` and labels int64 ``[B]``.

    Images are in [0, 1], or normalised when ``mean`` and ``std`` are given. The order follows from ``seed``
    and the epoch alone, and is the same for both loaders. Every ``iter()`` starts the next epoch, except
    after :meth:`load_state_dict`, where it goes on with the very next sample.

    Args:
        directory: Shards with a manifest, or a folder of WebDataset tars (images and ``.i32`` labels). May be
            read-only.
        batch_size: Images a batch on this rank.
        device: ``"cuda"`` decodes on the GPU.
        image_size: Scale the shorter side to this and cut out the middle square; ``None`` keeps images as
            they are, which then must all be of one size.
        augment: Called as ``augment(images, generator)`` on each batch in [0, 1] on the device, before
            normalisation; the generator is seeded by seed, epoch, batch and rank. Or the name of a regime:
            ``"none"``, ``"standard"``, ``"high"`` or ``"extreme"`` (:mod:`kdfast.data.regimes`).
        shuffle: A new permutation of the whole set each epoch.
        seed: Of order and augmentation.
        rank, world_size: This process's share.
        on_error: ``"raise"`` at the first bad shard or record; ``"skip"`` to list it in :attr:`quarantined`
            and go on.
        last_batch: ``"partial"``: each sample exactly once, the last batch short. ``"fill"``: all batches
            full, the epoch's first samples coming again at its end.
        loader: ``"dali"``, or ``"torch"`` for the plain one on simplejpeg and Pillow.
        mean, std: Per channel, in units of [0, 1]; both or neither.
        num_workers: Decode threads (DALI; by default as many as there are CPUs, at most 8) or processes
            (torch; by default 0, which decodes in this one).
        images: Take only so many, the first ones; ``None`` takes all.
        records: Give the images' numbers in the set, int64 ``[B]``, in the labels' place: whoever keeps something of
            each image (a teacher's outputs, say) finds it by them, and its label in :attr:`record_labels`.

    Raises:
        ShardError: The set is empty or damaged; the message names shard, key and fault.
        MissingExtraError: The loader's packages are not installed; the other loader is never used in its
            place.
        ValueError: An argument is out of range, or the images are of several sizes and ``image_size`` is
            ``None``.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        batch_size: int,
        *,
        device: str | torch.device = "cpu",
        image_size: int | None = None,
        augment: Augment | str | None = None,
        shuffle: bool = True,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        on_error: Literal["raise", "skip"] = "raise",
        last_batch: Literal["partial", "fill"] = "partial",
        loader: Literal["dali", "torch"] = "dali",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        num_workers: int | None = None,
        images: int | None = None,
        records: bool = False,
    ) -> None:
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error: got {on_error!r}; accepted: 'raise', 'skip'")
        if loader not in ("dali", "torch"):
            raise ValueError(f"loader: got {loader!r}; accepted: 'dali', 'torch'")
        if image_size is not None and image_size < 1:
            raise ValueError(f"image_size: got {image_size}; must be at least 1, or None")
        augment = _augmentation(augment)
        channels = _channels(mean, std)
        self.source = str(directory)
        self._device = _device(device)
        self._table = check_shards(directory, on_error=on_error)
        if images is not None and not 1 <= images <= len(self._table):
            raise ValueError(f"images: got {images}; accepted: 1 to the set's {len(self._table)}, or None")
        self._count = len(self._table) if images is None else images
        self._schedule = Schedule(self._count, batch_size, shuffle, seed, rank, world_size, last_batch)
        self._raise, self._augment, self._records = on_error == "raise", augment, records
        # Augmentation comes before normalisation, so that one then is done after it.
        plain = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        self._after = channels if augment is not None and channels != plain else None
        inside = plain if augment is not None else channels
        config = DecoderConfig(
            self._device, batch_size, image_size, output_size(self._table, image_size), *inside, num_workers
        )
        self._reader = RecordReader(self._table)
        self._decoder = make_decoder(loader, self._reader, config)
        self._found: list[Fault] = []
        self._dropped: set[int] = set()
        self._epoch, self._batch = 0, 0
        # Where the next iter() starts is where we are: true at the start, after an epoch's end, and after
        # loading.
        self._settled = True
        # Weakly: it holds this loader, and one that is dropped in mid-epoch would keep its files until a collection.
        self._running: weakref.ref[Generator[Batch, None, None]] | None = None

    @property
    def epoch(self) -> int:
        """The epoch of the next sample, from 0."""
        return self._epoch

    @property
    def num_samples(self) -> int:
        """Usable images of the whole set, or of the part that is taken, all ranks together."""
        return self._count

    @property
    def sides(self) -> tuple[int, int]:
        """Shortest and longest of the images' shorter sides, as they are stored, in pixels."""
        shorter = np.minimum(self._table.height, self._table.width)
        return int(shorter.min()), int(shorter.max())

    @property
    def num_classes(self) -> int | None:
        """As the manifest says; ``None`` if it does not."""
        return self._table.num_classes

    @property
    def labels(self) -> NDArray[np.int64]:
        """The classes that its images are of, int64, ascending, each once."""
        return np.unique(self._table.label[: self._count])

    @property
    def record_labels(self) -> NDArray[np.int64]:
        """The label of each of the set's images, int64 ``[N]``, by its number."""
        return self._table.label

    @property
    def fingerprint(self) -> str:
        """What tells the set from any other, and from itself once it is changed."""
        return self._table.fingerprint

    @property
    def quarantined(self) -> list[Fault]:
        """What ``on_error="skip"`` left out: shard, key (empty for the shard itself) and reason."""
        return [*self._table.faults, *self._found]

    def __repr__(self) -> str:
        """Where the shards are, what is in them, and which batch comes next."""
        low, high = self.sides
        classes = "unlabelled" if self.num_classes is None else f"{self.num_classes} classes"
        return (
            f"ShardLoader({self.source!r}: {self.num_samples:,} images, {classes}, sides {low} to {high}; "
            f"{len(self):,} batches an epoch on {self._device}, next: batch {self._batch} of epoch {self._epoch})"
        )

    def __len__(self) -> int:
        """Batches an epoch, the same on every rank."""
        return len(self._schedule)

    def __iter__(self) -> Iterator[Batch]:
        self._end_epoch()  # one decoder serves one epoch at a time
        if not self._settled:
            self._epoch, self._batch = self._epoch + 1, 0
        self._settled = True
        running = self._batches(self._epoch, self._batch)
        self._running = weakref.ref(running)
        return running

    def _end_epoch(self) -> None:
        """An older iterator ends here."""
        running = self._running() if self._running is not None else None
        if running is not None:
            running.close()

    def _batches(self, epoch: int, first: int) -> Generator[Batch, None, None]:
        plan = self._schedule.batches(epoch)[first:]
        if self._dropped:
            plan = [batch[~np.isin(batch, list(self._dropped))] for batch in plan]
        decoding = self._decoder.run(plan)
        try:
            for number, (records, images, failures) in enumerate(each("loader.decode", decoding), first):
                self._quarantine(failures)
                self._settled = False
                self._epoch, self._batch = epoch, number + 1
                if number + 1 == len(self):
                    self._epoch, self._batch, self._settled = epoch + 1, 0, True
                if len(records) or not failures:
                    yield self._finish(records, images, epoch, number)
        finally:
            decoding.close()  # type: ignore[attr-defined]

    @annotate("loader.finish")
    def _finish(self, records: np.ndarray, images: torch.Tensor, epoch: int, number: int) -> Batch:
        if self._augment is not None:
            words = [self._schedule.seed, epoch, number, self._schedule.rank]
            seed = int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1)
            generator = torch.Generator(self._device).manual_seed(seed)
            images = self._augment(images, generator)
        if self._after is not None:
            mean, std = (constant(tuple(values), self._device).view(3, 1, 1) for values in self._after)
            images = (images - mean) / std
        labels = torch.from_numpy(records if self._records else self._table.label[records])
        return images, labels.to(self._device, non_blocking=True)

    def _quarantine(self, failures: list[tuple[int, str]]) -> None:
        for record, reason in failures:
            fault = self._table.fault(record, reason)
            if self._raise:
                raise ShardError(f"{fault}; on_error='skip' leaves faulty records out")
            if record not in self._dropped:
                self._dropped.add(record)
                self._found.append(fault)

    def set_epoch(self, epoch: int) -> None:
        """Start the next ``iter()`` at the beginning of this epoch."""
        if epoch < 0:
            raise ValueError(f"epoch: got {epoch}; must be at least 0")
        self._epoch, self._batch, self._settled = epoch, 0, True

    def state_dict(self) -> dict[str, Any]:
        """Name the next sample: epoch and batch, and the set and order that they refer to. JSON-able."""
        return {
            **self._identity(),
            "epoch": self._epoch,
            "batch": self._batch,
            "dropped": sorted(self._dropped),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken: the next ``iter()`` yields the batch that came next.

        Raises:
            CheckpointError: The state belongs to other data, another order, or another share.
        """
        given = Fields(dict(state) if isinstance(state, Mapping) else state, "loader state", CheckpointError)
        for name, mine in self._identity().items():
            if name not in given or given.raw(name) != mine:
                there = shown(given.raw(name)) if name in given else "not"
                raise CheckpointError(f"loader state: {name} is {there} there, {mine!r} here")
        epoch = given.integer("epoch", 0)
        batch = given.integer("batch", 0)
        if batch >= len(self):
            raise CheckpointError(f"loader state: epoch {epoch}, batch {batch} is not a place in this set")
        dropped = given.integers("dropped", 0, len(self._table) - 1)
        self._end_epoch()
        self._epoch, self._batch, self._settled = epoch, batch, True
        for record in sorted(set(dropped) - self._dropped):
            self._dropped.add(record)
            self._found.append(self._table.fault(record, "was left out before the checkpoint"))

    def _identity(self) -> dict[str, Any]:
        schedule = self._schedule
        return {
            "data": self._table.fingerprint,
            "batch_size": schedule.batch_size,
            "shuffle": schedule.shuffle,
            "seed": schedule.seed,
            "rank": schedule.rank,
            "world_size": schedule.world_size,
            "last_batch": schedule.last_batch,
            **({} if self._count == len(self._table) else {"images": self._count}),
        }

    def close(self) -> None:
        """Free decoder threads or processes, and open files; a loader that is dropped does so, too."""
        self._end_epoch()
        self._decoder.close()
        self._reader.close()


def _augmentation(augment: Augment | str | None) -> Augment | None:
    if isinstance(augment, str):
        from kdfast.data.regimes import regime

        return regime(augment)
    if augment is not None and not callable(augment):
        raise TypeError(
            f"augment: got {type(augment).__name__}; must be the name of a regime, or callable as "
            "augment(images, generator)"
        )
    return augment


def _device(device: str | torch.device) -> torch.device:
    chosen = torch.device(device)
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device: got {device!r}, but torch sees no CUDA device; use device='cpu'")
        return torch.device("cuda", torch.cuda.current_device() if chosen.index is None else chosen.index)
    if chosen.type != "cpu":
        raise ValueError(f"device: got {device!r}; accepted: 'cpu', 'cuda'")
    return chosen


Channels = tuple[float, float, float]


def _channels(mean: Sequence[float] | None, std: Sequence[float] | None) -> tuple[Channels, Channels]:
    if mean is None and std is None:
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if mean is None or std is None:
        raise ValueError("mean, std: give both or neither")
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != 3:
            raise ValueError(f"{name}: got {len(values)} values; must be 3, one a channel")
    if min(std) <= 0:
        raise ValueError(f"std: got {list(std)}; must be positive")
    m, s = [float(value) for value in mean], [float(value) for value in std]
    return (m[0], m[1], m[2]), (s[0], s[1], s[2])


def output_size(table: RecordTable, image_size: int | None) -> tuple[int, int]:
    """Height and width of what is decoded.

    Raises:
        ValueError: The images are of several sizes, and ``image_size`` is ``None``.
    """
    if image_size is not None:
        return image_size, image_size
    odd = np.flatnonzero((table.height != table.height[0]) | (table.width != table.width[0]))
    if odd.size:
        first, other = (f"{table.height[i]}x{table.width[i]} (key {table.keys[i]!r})" for i in (0, odd[0]))
        raise ValueError(
            f"image_size: images are of several sizes, e.g. {first} and {other}; give a size for all"
        )
    return int(table.height[0]), int(table.width[0])


def make_decoder(loader: Literal["dali", "torch"], reader: RecordReader, config: DecoderConfig) -> Decoder:
    """The decoder of this name.

    Raises:
        MissingExtraError: Its packages are not installed.
    """
    if loader == "dali":
        from kdfast.data.dali import DaliDecoder

        return DaliDecoder(reader, config)
    from kdfast.data.torch_loader import TorchDecoder

    return TorchDecoder(reader, config)

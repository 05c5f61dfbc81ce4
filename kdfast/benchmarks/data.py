"""Reading labelled JPEGs back as float batches on the device: one epoch of a set of shards.

Every provider decodes the same files with the same number of threads or processes and hands over float32 batches
in [0, 1]. The images are smooth fields with grain: JPEGs of about the size that photographs have.
"""

from __future__ import annotations

import io
import os
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from kdfast.benchmarks.case import Absent, Case, Provider, Settings, Work, peer
from kdfast.errors import MissingExtraError

CLASSES = 10


def cases(settings: Settings) -> Iterator[Case]:
    """All rows of the suite for this device and size of run."""
    sizes = settings.pick([(16, 16, 8)], [(224, 256, 64)], [(32, 10_000, 256), (224, 1024, 64)])
    for side, count, batch in sizes:
        yield _case(_Shards(side, count, batch, settings))


class _Shards:
    """A set of shards on disk, written when a provider first asks for it, removed with this object."""

    def __init__(self, side: int, count: int, batch: int, settings: Settings) -> None:
        self.side, self.count, self.batch = side, count, batch
        self._folder = tempfile.TemporaryDirectory(prefix="kdfast-bench-")
        self.directory = Path(self._folder.name) / "shards"
        self.device = settings.device
        # On a CPU the decoders are compared thread for thread.
        self.workers = 1 if settings.device == "cpu" else min(8, os.cpu_count() or 1)

    def images(self) -> torch.Tensor:
        """uint8 ``[count, 3, side, side]``."""
        generator = torch.Generator().manual_seed(0)
        coarse = torch.rand((self.count, 3, 7, 7), generator=generator)
        smooth = F.interpolate(coarse, (self.side, self.side), mode="bicubic").clamp(0, 1)
        grain = 0.03 * torch.randn(smooth.shape, generator=generator)
        return ((smooth + grain).clamp(0, 1) * 255).to(torch.uint8)

    def write(self) -> Path:
        """Write once; the folder."""
        if not (self.directory / "manifest.json").exists():
            from kdfast.data import ShardWriter

            labels = torch.arange(self.count) % CLASSES
            size = max(1, self.count // 4)
            try:
                with ShardWriter(self.directory, samples_per_shard=size, num_classes=CLASSES) as writer:
                    writer.write(self.images(), labels)
            except MissingExtraError as error:
                raise Absent(str(error)) from error
        return self.directory


def _case(shards: _Shards) -> Case:
    def check(provider: str, result: tuple[torch.Tensor, int]) -> None:
        total, count = result
        assert count == shards.count, f"{count} images in the epoch; {shards.count} were written"
        want = shards.images().double().div(255).mean((0, 2, 3))
        # Decoders differ by a unit here and there, JPEG by a few; averaged over the set nearly nothing is left.
        torch.testing.assert_close(total.cpu() / count, want, rtol=0, atol=1 / 255)

    threads = f"{shards.workers} threads" if shards.workers > 1 else "1 thread"
    processes = f"{shards.workers} processes" if shards.workers > 1 else "1 process"
    providers = (
        Provider("PIL", lambda: _pil(shards), graph=False, config=processes),
        Provider("webdataset", lambda: _webdataset(shards), graph=False, config=f"PIL, {processes}"),
        Provider("kdfast (torch)", lambda: _ours(shards, "torch"), graph=False, config=processes),
        Provider("kdfast", lambda: _ours(shards, "dali"), graph=False, config=f"DALI, {threads}"),
    )
    params = {"images": shards.count, "side": shards.side, "batch": shards.batch}
    return Case("data", "epoch of JPEG shards", params, 1, providers, check, shards.count, "images")


def _epoch(batches: Any, device: str) -> tuple[torch.Tensor, int]:
    """Take every batch; what :func:`check` wants to see of it, kept as small as a training step's first use."""
    total, count = torch.zeros(3, dtype=torch.float64, device=device), 0
    for images, _ in batches:
        total += images.mean((2, 3)).sum(0)
        count += len(images)
    if device == "cuda":
        torch.cuda.synchronize()
    return total, count


def _ours(shards: _Shards, loader: str) -> Work:
    directory = shards.write()
    from kdfast.data import ShardLoader

    if loader == "dali":
        peer("nvidia.dali")
    workers = 0 if loader == "torch" and shards.workers == 1 else shards.workers
    try:
        batches = ShardLoader(
            directory,
            shards.batch,
            device=shards.device,
            loader=loader,  # type: ignore[arg-type]
            num_workers=workers,
        )
    except MissingExtraError as error:
        raise Absent(str(error)) from error
    return lambda turn: _epoch(batches, shards.device)


class _Tars(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """JPEGs out of tars by offset, decoded by PIL: what one writes without a loader library."""

    def __init__(self, directory: Path) -> None:
        self.records: list[tuple[str, int, int, int]] = []
        for path in sorted(directory.glob("*.tar")):
            with tarfile.open(path) as archive:
                members = {member.name: member for member in archive.getmembers()}
            # The label is beside its image, as 4 bytes or as a decimal.
            data = path.read_bytes()
            for name, member in members.items():
                stem, _, suffix = name.rpartition(".")
                if suffix not in ("jpg", "jpeg"):
                    continue
                label = members[f"{stem}.i32"]
                raw = data[label.offset_data : label.offset_data + label.size]
                self.records.append(
                    (str(path), member.offset_data, member.size, int.from_bytes(raw, "little"))
                )

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        import numpy as np
        from PIL import Image

        path, offset, size, label = self.records[index]
        with open(path, "rb") as handle:
            handle.seek(offset)
            image = Image.open(io.BytesIO(handle.read(size))).convert("RGB")
        return torch.from_numpy(np.array(image)).permute(2, 0, 1), label


def _pil(shards: _Shards) -> Work:
    peer("PIL.Image")
    loader = torch.utils.data.DataLoader(
        _Tars(shards.write()),
        batch_size=shards.batch,
        shuffle=True,
        num_workers=0 if shards.workers == 1 else shards.workers,
        pin_memory=shards.device == "cuda",
        persistent_workers=shards.workers > 1,
    )
    return lambda turn: _epoch(_floats(loader, shards.device), shards.device)


def _floats(loader: Any, device: str) -> Iterator[tuple[torch.Tensor, Any]]:
    for images, labels in loader:
        yield images.to(device, non_blocking=True).float().div_(255), labels


def _webdataset(shards: _Shards) -> Work:
    library = peer("webdataset")
    paths = [str(path) for path in sorted(shards.write().glob("*.tar"))]
    data = (
        library.WebDataset(paths, shardshuffle=False).shuffle(256).decode("torchrgb8").to_tuple("jpg", "i32")
    )
    loader = torch.utils.data.DataLoader(
        data.batched(shards.batch),
        batch_size=None,
        num_workers=0 if shards.workers == 1 else min(4, shards.workers),
    )
    return lambda turn: _epoch(_floats(loader, shards.device), shards.device)

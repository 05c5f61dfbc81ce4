"""``kdfast export SET --to folder|webdataset``: a set of shards as files that any tool reads, bytes as they are."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

from kdfast.data.codec import extension
from kdfast.data.manifest import is_shard_folder, read_manifest
from kdfast.data.matching import shard_class_names
from kdfast.data.records import ShardRecords
from kdfast.data.tar import Record, pack
from kdfast.disk import write_atomic
from kdfast.errors import ConfigError
from kdfast.experiments.export.config import IMAGES, ExportConfig
from kdfast.training import files

#: Images a tar, where the set does not say.
_A_TAR = 1000
#: What no folder's name may hold, on any system; a name of dots alone, or of a split, would be another thing.
_FORBIDDEN = set('/\\:*?"<>|\0')


def export_images(config: ExportConfig) -> dict[str, Any]:
    """Write the set; image files are copied, not decoded.

    Returns:
        ``out``, ``images`` and ``classes``, those that there are images of.

    Raises:
        ConfigError: This is no set, the format is a network's, or ``out`` is missing or holds something.
        ShardError: The set is damaged.
        CheckpointError: The disk is full or failing.
    """
    if not is_shard_folder(config.run):
        raise ConfigError(
            f"--to: got {config.to} for {config.run}, which is no set of shards; accepted for networks: "
            "safetensors, torchscript, torch.export, onnx"
        )
    if config.to not in IMAGES:
        raise ConfigError(
            f"--to: got {config.to} for {config.run}, a set of shards; accepted: {', '.join(IMAGES)}"
        )
    if config.out is None:
        raise ConfigError(f"--out: missing; accepted: a directory for the images of {config.run}")
    out = Path(config.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out: {out} holds something already, accepted: a new or an empty directory")
    with files.reporting_disk(out), closing(ShardRecords(config.run)) as records:
        out.mkdir(parents=True, exist_ok=True)
        (_as_folder if config.to == "folder" else _as_webdataset)(records, out, config.run)
        found = sorted(set(records.labels.tolist()))
    return {"out": str(out), "images": len(records.labels), "classes": len(found)}


def _as_folder(records: ShardRecords, out: Path, data: str) -> None:
    """``OUT/CLASS/KEY.EXT``; classes without usable names go by their numbers, as wide as the largest."""
    names = shard_class_names(data)
    if not all(map(_fit, names)) or len({name.casefold() for name in names}) != len(names):
        names = ()
    highest = max(read_manifest(data).num_classes or 0, int(records.labels.max()) + 1)
    folders = names or tuple(f"{label:0{len(str(highest - 1))}d}" for label in range(highest))
    for label in set(records.labels.tolist()):
        (out / folders[label]).mkdir()
    for number, key in enumerate(records.table.keys):
        (image,) = records.stored([number])
        name = f"{Path(key).name}-{number}" if "/" in key else key
        (out / folders[records.labels[number]] / f"{name}.{extension(image)}").write_bytes(image)


def _as_webdataset(records: ShardRecords, out: Path, data: str) -> None:
    """Tars of ``KEY.jpg`` (``.png``, ``.webp``) and ``KEY.cls``, a number in digits, with the index that DALI reads."""
    a_tar = min(read_manifest(data).samples_per_shard, len(records.labels)) or _A_TAR
    for first in range(0, len(records.labels), a_tar):
        numbers = range(first, min(first + a_tar, len(records.labels)))
        images = records.stored(numbers)
        kind = extension(images[0])
        if any(extension(image) != kind for image in images):
            raise ConfigError(f"--to: got webdataset for {data}, which mixes image formats; accepted: folder")
        made = [
            Record(records.table.keys[n], image, str(int(records.labels[n])).encode())
            for n, image in zip(numbers, images, strict=True)
        ]
        tar, index = pack(made, kind, label="cls")
        write_atomic(out / f"{first // a_tar:06d}.idx", index)
        write_atomic(out / f"{first // a_tar:06d}.tar", tar)


def _fit(name: str) -> bool:
    return bool(name.strip(". ")) and not _FORBIDDEN & set(name) and len(name.encode()) < 200

"""What is known of a set of synthetic images, and how sharp a teacher's answers to it are."""

from __future__ import annotations

from typing import Any

import torch

from kdfast.data.manifest import is_shard_folder, read_manifest

# As the manifest's metadata calls them, and as recipes do.
_SETTINGS = {"guidance_scale": "guidance_scale", "num_inference_steps": "steps"}


def shard_classes(data: str | None) -> int | None:
    """How many classes a directory of shards says it has; ``None`` if it is none, or does not say."""
    return read_manifest(data).num_classes if data and is_shard_folder(data) else None


def describe(data: str | None) -> dict[str, Any]:
    """How many images a directory of shards holds, and how they were sampled, as far as it says."""
    if not data or not is_shard_folder(data):
        return {}
    manifest = read_manifest(data)
    known = {ours: manifest.metadata.get(theirs) for theirs, ours in _SETTINGS.items()}
    return {
        "images": manifest.num_samples,
        **{name: value for name, value in known.items() if value is not None},
    }


class ProbabilityVariance:
    """The variance of a network's class probabilities, averaged over images (DM-KD, Table 12).

    0 where every class is as likely as the others; (C − 1)/C² where all is one class's. Smaller is smoother, which is
    what the paper finds students to learn best from.
    """

    def __init__(self) -> None:
        self._total, self._images = 0.0, 0

    def update(self, logits: torch.Tensor) -> None:
        """Count a batch of logits ``[B, C]``."""
        variance = logits.double().softmax(1).var(1, unbiased=False)
        self._total += float(variance.sum())
        self._images += len(logits)

    def compute(self) -> float:
        """Over all images so far."""
        return self._total / max(self._images, 1)

"""``kdfast export RUN --to shards``: the images that an SSD-KD run inverted, as a training set for other students."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kdfast.errors import CheckpointError, ConfigError, DataError
from kdfast.experiments.export.config import ExportConfig
from kdfast.methods.ssdkd.shards import write_shards
from kdfast.replay import PrioritizedReplayBuffer
from kdfast.training.checkpoint import latest_checkpoint, load_checkpoint

__all__ = ["write_inverted"]


def write_inverted(config: ExportConfig) -> dict[str, Any]:
    """Write what the buffers of all processes held at the run's last checkpoint.

    Args:
        config: ``run`` is an SSD-KD run's folder, with its checkpoints; ``out`` by default ``shards`` in it.

    Returns:
        ``folder``, and how many ``images`` and ``classes`` it has.

    Raises:
        ConfigError: It is no such run, or best weights were asked for.
        CheckpointError: The checkpoint is damaged.
        ShardError: The folder cannot be written, or holds a set.
    """
    if config.weights != "last":
        raise ConfigError(
            f"--weights: got {config.weights}, accepted with --to shards: last; there is one buffer, as the run left it"
        )
    folder = Path(config.run)
    found = latest_checkpoint(folder / "checkpoints")
    if found is None:
        raise ConfigError(
            f"run: got {config.run}, which holds no checkpoints/, accepted with --to shards: the folder of an ssdkd run"
        )
    buffers = [PrioritizedReplayBuffer.from_state_dict(state, device="cpu") for state in _states(found)]
    out = folder / "shards" if config.out is None else Path(config.out)
    try:
        images = write_shards(buffers, out, num_classes=buffers[0].num_classes, metadata={"source": "ssdkd"})
    except ValueError as error:  # of images that no picture format holds
        raise DataError(f"{found}: {error}") from error
    return {"folder": str(out), "images": images, "classes": buffers[0].num_classes}


def _states(checkpoint: Path) -> list[dict[str, Any]]:
    """Each process's buffer."""
    ranks = load_checkpoint(checkpoint).states.get("loader")
    try:
        states = [rank["method"]["buffer"] for rank in ranks]  # type: ignore[union-attr]
    except (KeyError, TypeError):
        raise ConfigError(
            f"run: {checkpoint} is of another method, accepted with --to shards: the folder of an ssdkd run"
        ) from None
    if not states or None in states:
        raise ConfigError(f"run: {checkpoint} holds no buffer (replay was off), so there is no set to write")
    if not all(isinstance(state, dict) for state in states):
        raise CheckpointError(f"{checkpoint}: a buffer's state is no dict")
    return states

"""A replay buffer's images as a set of labelled shards."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from kdfast.data import ShardWriter
from kdfast.replay import PrioritizedReplayBuffer

__all__ = ["write_shards"]


def write_shards(
    buffers: PrioritizedReplayBuffer | Sequence[PrioritizedReplayBuffer],
    directory: str | os.PathLike[str],
    **settings: Any,
) -> int:
    """Write every row that is held, in the order of the slots, a buffer after the other.

    Args:
        buffers: Of uint8 images ``[C, H, W]``, C = 1 or 3, with labels.
        directory: Empty or new.
        **settings: Of :class:`kdfast.data.ShardWriter`; ``image_format`` is ``"png"`` unless said.

    Returns:
        How many there are.

    Raises:
        ValueError: Images have neither one nor three channels.
        ShardError: The folder cannot be written, or holds a set.
    """
    several = [buffers] if isinstance(buffers, PrioritizedReplayBuffer) else list(buffers)
    for buffer in several:
        if buffer.sample_shape[0] not in (1, 3):
            raise ValueError(
                f"export_shards: images have {buffer.sample_shape[0]} channels, accepted: 1 or 3"
            )
    count = 0
    with ShardWriter(directory, **{"image_format": "png", **settings}) as writer:
        for buffer in several:
            images, labels = _held(buffer)
            writer.write(images.expand(-1, 3, -1, -1), labels)
            count += len(images)
    return count


def _held(buffer: PrioritizedReplayBuffer) -> tuple[torch.Tensor, torch.Tensor]:
    state = buffer.state_dict()
    index = buffer.top_k(len(buffer)).index.sort().values.cpu()
    return state["rows"].cpu()[index], state["labels"].cpu()[index].long()

"""A replay buffer's images as a set of labelled shards."""

from __future__ import annotations

import os
from typing import Any

from kdfast.data import ShardWriter
from kdfast.replay import PrioritizedReplayBuffer

__all__ = ["write_shards"]


def write_shards(buffer: PrioritizedReplayBuffer, directory: str | os.PathLike[str], **settings: Any) -> int:
    """Write every row that is held, in the order of the slots.

    Args:
        buffer: Of uint8 images ``[C, H, W]``, C = 1 or 3, with labels.
        directory: Empty or new.
        **settings: Of :class:`kdfast.data.ShardWriter`.

    Returns:
        How many there are.

    Raises:
        ValueError: Images have neither one nor three channels.
        ShardError: The folder cannot be written, or holds a set.
    """
    state = buffer.state_dict()
    index = buffer.top_k(len(buffer)).index.sort().values.cpu()
    images, labels = state["rows"].cpu()[index], state["labels"].cpu()[index].long()
    if images.shape[1] not in (1, 3):
        raise ValueError(f"export_shards: images have {images.shape[1]} channels, accepted: 1 or 3")
    with ShardWriter(directory, **settings) as writer:
        writer.write(images.expand(-1, 3, -1, -1), labels)
    return len(images)

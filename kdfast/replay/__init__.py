"""Prioritized replay: a buffer of samples drawn in proportion to how badly the student matches the teacher."""

from kdfast.reference.replay import extension as _extension

_extension()  # says what is missing, and how to get it, before anything else fails

from kdfast.replay.buffer import PrioritizedReplayBuffer  # noqa: E402
from kdfast.replay.modulation import modulation  # noqa: E402
from kdfast.replay.types import ReplayBatch, ReplayStats, TopK  # noqa: E402

__all__ = ["PrioritizedReplayBuffer", "ReplayBatch", "ReplayStats", "TopK", "modulation"]

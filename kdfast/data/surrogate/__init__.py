"""Images to distil on that need no data: procedural generators."""

from kdfast.data.surrogate.noise import noise

__all__ = ["noise"]

"""Images from programs: shaders.py and leaves.py, each with its equation, bytes and launch plan."""

from . import leaves, shaders

__all__ = ["leaves", "shaders"]

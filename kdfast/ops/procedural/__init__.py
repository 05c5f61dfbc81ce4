"""Images from programs: shaders and dead leaves."""

from kdfast.ops.procedural.leaves import render_leaves
from kdfast.ops.procedural.shaders import render_shaders

__all__ = ["render_leaves", "render_shaders"]

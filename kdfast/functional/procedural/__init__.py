"""Images from programs: shaders and dead leaves."""

from kdfast.functional.procedural.leaves import render_leaves
from kdfast.functional.procedural.shaders import render_shaders

__all__ = ["render_leaves", "render_shaders"]

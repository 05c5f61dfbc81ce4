"""What registered ops ask of the kernels below them."""

from __future__ import annotations

import contextlib

__all__ = ["fresh_counters"]


def fresh_counters() -> contextlib.AbstractContextManager[None]:
    """:func:`kdfast.kernels.launch.fresh_counters`, imported when an op is about to launch."""
    from kdfast.kernels import launch

    fresh: contextlib.AbstractContextManager[None] = launch.fresh_counters()
    return fresh

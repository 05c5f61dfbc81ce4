"""What becomes of replay buffers when their process forks, and of the seed of a copy in another process.

A fork waits until nobody is in the middle of anything, so that the child finds whole state and free locks (the C++
core's lock sees to itself). The child's buffers on the CPU go on with a seed of their own: workers that drew what
their parent and each other draw would be no use. CUDA does not work in a forked child, so buffers on a GPU are left.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any

import torch

from kdfast.reference.replay.extension import extension

#: Buffers' states (:class:`ReplayState`) by the address of their meta.
_states: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_guard = threading.RLock()
_held: list[Any] = []

_STREAM = 0x464F524B


def register(state: Any) -> None:
    """Take part in forks."""
    with _guard:
        _states[state.meta.data_ptr()] = state


def owner(meta: torch.Tensor, leaves: torch.Tensor) -> Any:
    """The state that these tensors belong to; None for copies."""
    with _guard:
        state = _states.get(meta.data_ptr())
    return state if state is not None and state.leaves.data_ptr() == leaves.data_ptr() else None


def signed(seed: int) -> int:
    """64 bits as int64 holds them."""
    return seed - (1 << 64) if seed >= 1 << 63 else seed


def child_seed(state: Any) -> int:
    """The seed of the next copy that leaves for another process: a hash of the buffer's and the copy's number."""
    with state.turns:
        state.children += 1
        return _mixed(state.seed, state.children)


def _mixed(seed: int, number: int) -> int:
    low, high = extension().philox(seed, [number & 0xFFFFFFFF, number >> 32, 0, _STREAM])[:2]
    return int(low) | int(high) << 32


def _before() -> None:
    _guard.acquire()
    _held[:] = _states.values()
    for state in _held:
        state.turns.acquire()
        state.children += 1


def _in_parent() -> None:
    for state in _held:
        state.turns.release()
    _held.clear()
    _guard.release()


def _in_child() -> None:
    for state in _held:
        if state.on_cpu:
            state.seed = _mixed(state.seed, state.children)
            state.meta.numpy()[0] = signed(state.seed)
        state.children = 0
    _in_parent()


os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)

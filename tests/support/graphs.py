"""CUDA graphs on a CPU: every operator is noted with the very tensors that it read and wrote, and replayed on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kdfast import capture
from kdfast.reference import denoise as reference


class _Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out


class TapedGraph:
    """What a CUDA graph keeps: addresses and operators, no Python."""

    def __init__(self, body: Callable[[], Any]) -> None:
        tape = _Tape()
        with tape:
            self.result = body()
        self._calls = tape.calls

    def replay(self) -> None:
        """Every operator again, its results where they were."""
        with torch.no_grad():
            for func, args, kwargs, out in self._calls:
                again = func(*args, **kwargs)
                if any(value.alias_info is not None for value in func._schema.returns):
                    continue  # a view, or a tensor written in place: it is there already
                for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor):
                        old.copy_(new)


def _on_the_device(table: torch.Tensor, step: Any) -> list[torch.Tensor]:
    at = torch.as_tensor(step).reshape(1)
    return list(table.index_select(0, at)[0].unbind(0))


def on_a_cpu(patch: pytest.MonkeyPatch) -> list[TapedGraph]:
    """Record with :class:`TapedGraph` from now on; the list gets every recording."""
    made: list[TapedGraph] = []

    def record(body: Callable[[], Any], device: torch.device, **options: Any) -> tuple[Any, Any]:
        for _ in range(options.get("rehearsals", 0)):
            options.get("before", lambda: None)()
            body()
        made.append(TapedGraph(body))
        return made[-1], made[-1].result

    # On a CPU the reference looks its coefficients up on the host, which a recording would freeze.
    patch.setattr(reference, "coefficients", _on_the_device)
    patch.setattr(capture, "record", record)
    patch.setattr(capture, "can_capture", lambda device: True)
    patch.setattr(
        capture.cuda, "is_current_stream_capturing", lambda: False
    )  # a build without CUDA cannot be asked
    return made

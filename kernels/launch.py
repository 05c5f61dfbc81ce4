"""One way to launch a kernel: every launch is counted, so that a test can tell which code ran."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

#: What CUDA allows along the second grid dimension; programs loop over what is beyond.
MAX_GRID_Y = 65535

#: Launches by kernel name since the process began (or since :func:`count_launches` was entered).
launch_counts: Counter[str] = Counter()


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
    """Launch ``kernel`` on ``grid`` (any length up to 3); an empty grid launches nothing."""
    if 0 in grid:
        return
    launch_counts[kernel.__name__] += 1
    kernel[grid](*args, **kwargs)


@contextlib.contextmanager
def count_launches() -> Iterator[Counter[str]]:
    """Count the launches of a block: ``with count_launches() as counts: ...``."""
    global launch_counts
    outer, launch_counts = launch_counts, Counter()
    try:
        yield launch_counts
    finally:
        outer.update(launch_counts)
        launch_counts = outer


def device_guard(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make ``tensor``'s GPU current, since Triton launches on the current one; nothing on a CPU."""
    if tensor.device.type == "cuda" and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


class RowLayout(NamedTuple):
    """Rows as ``outer × inner``, and for each tensor its strides (outer, inner, class) in elements."""

    outer: int
    inner: int
    strides: list[tuple[int, int, int]]


def as_rows(tensors: Sequence[torch.Tensor], dim: int) -> RowLayout | None:
    """View tensors of one shape as rows over dimension ``dim`` without copying any.

    Neighbouring dimensions merge where every tensor allows it, in logical order, so that row ``r`` is
    ``(r // inner, r % inner)`` in each. None when more than two groups are left.
    """
    shape = tensors[0].shape
    groups: list[tuple[int, list[int]]] = []  # size, stride of each tensor
    for axis, size in enumerate(shape):
        if axis == dim or size == 1:
            continue
        strides = [tensor.stride(axis) for tensor in tensors]
        if groups and groups[-1][1] == [stride * size for stride in strides]:
            groups[-1] = (groups[-1][0] * size, strides)
        else:
            groups.append((size, strides))
    if len(groups) > 2:
        return None
    class_strides = [tensor.stride(dim) if shape[dim] > 1 else 1 for tensor in tensors]
    none = (1, [0] * len(tensors))
    if len(groups) == 1 and min(class_strides) != 1:
        groups = [none, *groups]  # classes lie across: the one group is what neighbours in memory
    (outer, outer_strides), (inner, inner_strides) = (*groups, none, none)[:2]
    return RowLayout(outer, inner, list(zip(outer_strides, inner_strides, class_strides)))


_counters: dict[tuple[int | None, int], torch.Tensor] = {}


def arrival_counter(device: torch.device, count: int = 1) -> torch.Tensor:
    """Zeros, at least ``count``, that kernels count their finished programs in, and leave at zero.

    One set a stream, since launches of two streams may overlap. While a graph is captured it is a fresh one:
    memory of the graph's pool must not outlive it in a cache.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=device)
    key = (device.index, torch.cuda.current_stream(device).cuda_stream)
    if key not in _counters or _counters[key].numel() < count:
        _counters[key] = torch.zeros(count, dtype=torch.int32, device=device)
    return _counters[key]

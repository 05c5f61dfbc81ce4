"""Tensors of one shape as rows over a dimension, without a copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


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

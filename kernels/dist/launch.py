"""Launch of the DIST kernels; the equation is in the package."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton

from ..common.launch_rows import Rows, in_place, rows_of
from ..common.scale import Scale, value_and_pointer
from ..common.tile import tile_grid, tile_sizes
from ..keys import launch_key
from ..launch import Kept, Launch, reduction
from . import bodies
from .plan import TURNS, dist_plan

Tensors = tuple[torch.Tensor | None, ...]


class Values(NamedTuple):
    """What the loss knows of rows and of columns, and its gradient needs: float32 ``[6 · rows]`` and ``[5 · V]``."""

    row: torch.Tensor
    column: torch.Tensor


def run(
    student: torch.Tensor,
    teacher: torch.Tensor,
    beta: float,
    gamma: float,
    scale: Scale,
    gradients: Tensors = (None, None),
    *,
    reduce: bool = True,
    upstream: torch.Tensor | None = None,
    exit_if_one: bool = False,
    fresh: bool = False,
    values: Values | None = None,
) -> tuple[torch.Tensor | None, Values | None]:
    """Three launches for the loss, one more for gradients.

    Args:
        student: Logits ``[..., V]``, any strides; bfloat16, float16 or float32.
        teacher: Logits of the same shape, its own strides and dtype.
        beta: Weight of the rows' correlation.
        gamma: Weight of the columns'.
        scale: Temperature and divisor; no row factors.
        gradients: Written: of student and teacher, each its own strides; None where it is not wanted.
        reduce: Write the loss; not with ``values``.
        upstream: One value that multiplies the gradients.
        exit_if_one: Do nothing if it is 1: the gradients are there already.
        fresh: Whether the gradients are ``torch.empty_like`` of what they belong to.
        values: What an earlier call of the same logits gave back: only the last launch is left to do.

    Returns:
        The 0-d loss or None; values, None where strides had too many groups for a launch without copies.
    """
    temperature, divisor, *_ = scale = scale.on(student.device)
    reads = (student, teacher)
    others = (temperature, divisor, upstream)
    if fresh:
        key: Any = (launch_key(reads, (*gradients, *others)), reduce, exit_if_one)
    else:
        key = (launch_key((*reads, *gradients), others), in_place(reads, gradients), reduce, exit_if_one)
    call = _KEPT.get(key)
    tensors: Tensors = (*reads, *gradients)
    if call is None:
        at = rows_of(reads, gradients, student.dim() - 1)
        call = _Call(at, others, reduce, exit_if_one)
        if at.copied:
            loss, _ = call(at.tensors, beta, gamma, scale, upstream, None)
            at.copy_back()
            return loss, None
        call = _KEPT.keep(key, call, student.device)
    found: tuple[torch.Tensor | None, Values] = call(tensors, beta, gamma, scale, upstream, values)
    return found


_KEPT = Kept()


class _Call:
    """One geometry: what is launched, and the memory that it needs. It holds no tensor."""

    __slots__ = ("columns", "device", "gradient", "groups", "merge", "reduce", "rows", "sizes")

    def __init__(self, at: Rows, others: tuple[Any, Any, Any], reduce: bool, exit_if_one: bool) -> None:
        student, teacher, grad_student, grad_teacher = at.tensors
        assert student is not None
        assert teacher is not None
        num_rows, num_classes = at.num_rows, at.num_classes
        plan = dist_plan(num_rows, num_classes, max(student.itemsize, teacher.itemsize))
        self.groups = groups = triton.cdiv(num_classes, plan.columns)
        self.sizes = 6 * num_rows, plan.splits * 5 * num_classes, 5 * num_classes
        self.device, self.reduce = student.device, reduce
        temperature, divisor, upstream = others
        common = {
            "V": num_classes,
            "T_PTR": isinstance(temperature, torch.Tensor),
            "EARLY_EXIT": exit_if_one,
            "num_warps": plan.num_warps,
            "enable_fp_fusion": True,
        }
        divisor = {"DIVISOR_PTR": isinstance(divisor, torch.Tensor)}
        tile = {"UNIT": at.unit, "ROWS": plan.rows, "BLOCK": plan.block}
        row_grid = (triton.cdiv(num_rows, plan.rows),)
        rows, strides = (num_rows, at.layout.inner), at.strides

        def launch(kernel: Any, grid: tuple[int, ...], fixed: tuple[int, ...], **own: Any) -> Launch:
            return Launch(kernel, grid, fixed, common | own, self.device)

        if plan.tile is None:
            self.rows = launch(bodies.dist_rows_kernel, row_grid, (*rows, *strides[:6]), **tile)
        else:
            sizes = tile_sizes(plan.tile, at.layout) | {"UNIT": at.unit, "num_warps": plan.tile.num_warps}
            grid = tile_grid(plan.tile, at.layout)
            self.rows = launch(bodies.dist_tile_rows_kernel, grid, (*rows, *strides[:6]), **sizes)
        self.columns = launch(
            bodies.dist_columns_kernel,
            (groups, plan.splits),
            (*rows, plan.rows_per_split, *strides[:6]),
            UNIT=at.unit,
            TURNS=TURNS,
            ROWS=plan.tile_rows // TURNS,
            COLUMNS=plan.columns,
        )
        self.merge = launch(
            bodies.dist_merge_kernel,
            (groups,),
            (num_rows, plan.rows_per_split, plan.splits),
            SPLITS=plan.merged,
            COLUMNS=plan.columns,
            REDUCE=reduce,
            **divisor,
        )
        self.gradient: Launch | None = None
        if grad_student is not None or grad_teacher is not None:
            wanted = {"GRAD_S": grad_student is not None, "GRAD_T": grad_teacher is not None}
            self.gradient = launch(
                bodies.dist_gradient_kernel,
                row_grid,
                (*rows, *strides),
                **tile,
                **divisor,
                **wanted,
                UPSTREAM=upstream is not None,
            )

    def __call__(
        self,
        tensors: Tensors,
        beta: float,
        gamma: float,
        scale: Scale,
        upstream: torch.Tensor | None,
        values: Values | None,
    ) -> tuple[torch.Tensor | None, Values]:
        temperature, divisor = value_and_pointer(scale.temperature), value_and_pointer(scale.divisor)
        factors = (*temperature, *divisor, float(beta), float(gamma))
        loss = partial = counter = None
        if values is None:
            row, parts, column = (torch.empty(size, dtype=torch.float32, device=self.device) for size in self.sizes)
            values = Values(row, column)
            reads = tensors[:2]
            if self.reduce:
                partial, counter, one = reduction(self.device, self.groups)
                loss = torch.empty_like(one)
            self.rows((*reads, row, upstream, *temperature))
            self.columns((*reads, row, parts, upstream, *temperature))
            self.merge((row, parts, column, partial, counter, loss, upstream, *factors))
        if self.gradient is not None:
            self.gradient((*tensors, *values, upstream, *factors))
        return loss, values

"""The loss and its gradients, a chunk of rows at a time; and by its definition, all rows at once."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from kdfast.backend import resolve
from kdfast.ops.common.closed import usable
from kdfast.ops.common.row_loss import Row, RowLoss
from kdfast.ops.kl import distillation, kl
from kdfast.ops.linear.job import Job
from kdfast.ops.pair import divergence, jsd
from kdfast.ops.topk import topk
from kdfast.reference.common import finish
from kdfast.reference.linear import head_logits
from kdfast.reference.pair import KINDS

__all__ = ["autocasts", "compute", "definition"]

Tensor = torch.Tensor


def definition(job: Job) -> Tensor:
    """The same from all logits at once, of operators that differentiate to any order."""
    logits = head_logits((_without_masked(job), job.weight, job.bias), job.dtype, job.softcap)
    total = logits.new_zeros(())
    for loss, other, row in _losses(job, logits, _teacher(job)):
        total = total + loss.reference(logits, other, row._replace(reduce=True))
    return total / job.divisor if len(job.hidden) else total


def _without_masked(job: Job) -> Tensor:
    """Hidden states, 0 where a row does not count: 0 times what it holds may be NaN."""
    return job.hidden if job.mask is None else job.hidden.masked_fill(~job.mask.unsqueeze(1), 0.0)


def _teacher(job: Job) -> Tensor | None:
    if job.teacher_logits is not None or job.teacher_hidden is None or job.teacher_weight is None:
        return job.teacher_logits
    return head_logits(
        (job.teacher_hidden, job.teacher_weight, job.teacher_bias), job.dtype, job.teacher_softcap
    )


def _losses(job: Job, logits: Tensor, teacher: Tensor | None) -> list[tuple[RowLoss, Tensor, Row]]:
    """(row loss, what it compares ``logits`` with, its arguments), whose sum the loss is."""
    row = Row((), 1, job.temperature, job.row_weight, job.mask, 1.0, False)
    labelled = row._replace(options=(job.smoothing,), divisor=_NEVER, label=job.label, factor=job.factor)
    found = []
    if job.kd_weight and teacher is not None:
        row = row._replace(divisor=1.0 / job.kd_weight)
        if job.teacher_index is not None:
            row = row._replace(
                options=(float(job.bucket),), label=job.teacher_index, factor=job.teacher_normalizer
            )
            found.append((topk, teacher, row))
        elif job.kind == "forward_kl" and job.alike:
            if job.label is not None:
                return [(distillation, teacher, labelled._replace(divisor=row.divisor))]
            found.append((kl, teacher, row))
        elif job.kind == "jsd" and job.alike:
            found.append((jsd, teacher, row._replace(options=tuple(job.numbers))))
        else:
            ratio, tensor = (1.0, job.ratio) if isinstance(job.ratio, Tensor) else (job.ratio, None)
            options = (float(KINDS.index(job.kind)), *job.numbers, ratio)
            found.append((divergence, teacher, row._replace(options=options, factor=tensor)))
    if (
        job.label is not None
    ):  # the divergence of the logits and themselves is 0, and infinitely little of it counts
        found.append((distillation, logits.detach(), labelled))
    return found


_NEVER = float("inf")


class Products:
    """The matrix products: accumulated in ``dtype``, half-precision operands as they are where a GPU takes them."""

    def __init__(self, job: Job) -> None:
        self.dtype, weight, teacher = job.dtype, job.weight, job.teacher_weight
        self.mixed = weight.device.type in ("cuda", "meta") and self.dtype == torch.float32
        # A CPU rounds a half-precision product on its way out, so that its weights are widened, once.
        self.weight = weight if self.mixed else weight.to(self.dtype)
        self.teacher_weight = teacher if self.mixed or teacher is None else teacher.to(self.dtype)

    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        """a @ b."""
        if a.dtype == b.dtype == self.dtype:
            return a @ b
        if self.mixed and a.dtype == b.dtype:
            return torch.mm(a, b, out_dtype=self.dtype)
        return a.to(self.dtype) @ b.to(self.dtype)

    def add(self, total: Tensor, a: Tensor, b: Tensor) -> None:
        """total += a @ b, without a second ``total``."""
        if self.mixed and a.dtype == b.dtype != self.dtype:
            torch.addmm(total, a, b, out_dtype=self.dtype, out=total)
        else:
            total.addmm_(a.to(self.dtype), b.to(self.dtype))

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float) -> Tensor:
        """Of one head, in ``dtype``, in memory of their own."""
        out = self.multiply(hidden, weight.t())
        out = out if bias is None else out.add_(bias)
        return out.div_(softcap).tanh_().mul_(softcap) if softcap else out


def _chunk(job: Job, products: Products, want_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """One chunk's loss, not yet divided, and its gradient with respect to the product of hidden states and weight."""
    logits = products.logits(job.hidden, products.weight, job.bias, job.softcap)
    teacher, own = job.teacher_logits, False
    if teacher is None and job.teacher_hidden is not None and products.teacher_weight is not None:
        teacher = products.logits(
            job.teacher_hidden, products.teacher_weight, job.teacher_bias, job.teacher_softcap
        )
        own = True
    total: Tensor | None = None
    gradient: Tensor | None = None
    by_reference = resolve(logits, logits) == "reference"
    for loss, other, row in _losses(job, logits, teacher):
        if by_reference:
            part, grad = _by_reference(loss, logits, other, row, want_gradient)
        else:
            # The KL kernel may write where it reads the student if rows begin on 16 bytes; elsewhere a kernel may read
            # a neighbouring row's edge. The teacher's own logits are not needed after the divergence.
            over_student = loss in (kl, distillation) and other is teacher and logits.shape[1] % 8 == 0
            grad = None
            if want_gradient and over_student and not job.softcap:
                grad = logits
            elif want_gradient:
                spare = own and gradient is not None and teacher is not None
                grad = teacher if spare else torch.empty_like(logits)
            part = loss.launcher(logits, other, row.contiguous(), (grad, None), fresh=False).sum()
        total = part if total is None else total + part
        gradient = grad if gradient is None or grad is None else gradient.add_(grad)
    assert total is not None
    if gradient is not None and job.softcap:
        logits.div_(job.softcap)
        gradient.addcmul_(gradient, logits.square_(), value=-1.0)  # tanh' = 1 - tanh²
    return total, gradient


def _by_reference(
    loss: RowLoss, logits: Tensor, other: Tensor, row: Row, want_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    row = row._replace(reduce=True)
    closed = loss.closed(row) if loss.closed is not None and usable(logits, other) else None
    if closed is not None and logits.device.type == "cpu":
        rows, gradient, _ = closed(logits, other, want_gradient, False)
        value = finish(rows, row.temperature, row.weight, row.mask, row.divisor, True)
        if gradient is None:
            return value, None
        # T² of the loss over T of the softmax; nobody else has the gradient.
        scale = row.temperature / row.divisor
        scale = scale if row.weight is None else (row.weight.to(gradient.dtype) * scale).unsqueeze(1)
        gradient.mul_(scale)
        return value, gradient if row.mask is None else gradient.masked_fill_(~row.mask.unsqueeze(1), 0.0)
    if not want_gradient:
        return loss.reference(logits, other, row), None
    # torch.func differentiates below autograd, too, where a registered op runs.
    pulled: Any = torch.func.vjp(lambda x: loss.reference(x, other, row), logits)
    value, pull = pulled
    return value, pull(torch.ones_like(value))[0]


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on; a meta tensor's device has none, and torch raises."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def _counted(mask: Tensor | None) -> Tensor | None:
    """Which rows count: one look at the device, which saves the products of all others."""
    if mask is None or (mask.is_cuda and torch.cuda.is_current_stream_capturing()):
        return None
    return mask.nonzero().squeeze(1)


def compute(
    job: Job, chunk_rows: int, needs: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss and gradients of hidden states, weight and bias (empty if not needed), for an upstream gradient of 1."""
    device = job.hidden.device
    with torch.autocast(device.type, enabled=False) if autocasts(device) else contextlib.nullcontext():
        return _compute(job, chunk_rows, needs)


def _compute(
    job: Job, chunk_rows: int, needs: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    need_hidden, need_weight, need_bias = needs
    dtype, new, shape = job.dtype, job.hidden.new_zeros, job.weight.shape
    loss = new((), dtype=dtype)
    grad_weight = new(shape, dtype=dtype) if need_weight else new(0)
    grad_bias = new(shape[:1], dtype=dtype) if need_bias else new(0)
    index = _counted(job.mask)
    like = torch.empty_like if index is None else torch.zeros_like
    kept = job.kept
    grad_hidden = like(job.hidden, dtype=kept) if need_hidden else new(0)
    rows = len(job.hidden) if index is None else len(index)
    divisor = job.divisor.to(dtype) if isinstance(job.divisor, Tensor) else job.divisor
    scale = 1.0 / divisor if rows else 0.0  # a sum of nothing is 0, whatever it is the mean of

    def step(some: slice | Tensor, products: Products) -> None:
        """One chunk; a function, so that nothing of it is alive when the next one begins."""
        chunk = job.take(some) if index is None else job._replace(mask=None).take(some)
        part, gradient = _chunk(chunk, products, any(needs))
        loss.add_(part)
        if gradient is None:
            return
        if need_bias:
            grad_bias.add_(gradient.sum(0))
        if (
            products.mixed
        ):  # before the divisor, so that a half-precision gradient stays clear of the smallest numbers
            gradient = gradient.to(job.weight.dtype)
        if need_hidden:
            product = products.multiply(gradient, products.weight)
            if isinstance(some, slice):
                torch.mul(product, scale, out=grad_hidden[some])
            else:
                grad_hidden[some] = product.mul_(scale).to(grad_hidden.dtype)
        if need_weight:
            products.add(grad_weight, gradient.t(), _without_masked(chunk))

    if rows:
        products = Products(job)
        for start in range(0, rows, chunk_rows):
            some = slice(start, start + chunk_rows)
            step(some if index is None else index[some], products)
    if need_weight:
        grad_weight = grad_weight.mul_(scale).to(kept)
    if need_bias:
        grad_bias = grad_bias.mul_(scale).to(kept)
    return loss * scale, grad_hidden, grad_weight, grad_bias

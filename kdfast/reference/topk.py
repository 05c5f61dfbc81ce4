"""KL to a cached top-k teacher: by its definition, the oracle of the tests, and in closed form for CPU tensors."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from kdfast.reference.closed import CAREFUL_BELOW, Closed, again_with_care, closed_form
from kdfast.reference.common import NEAR, compute_dtype
from kdfast.reference.kl import kd_kl_rows
from kdfast.reference.native import address, extension

__all__ = ["Kept", "first_of_equals", "topk_closed", "topk_rows"]

#: Below this a probability is computed again in float64: what is divided by it, or taken the logarithm of, overflows.
LEAST = 1e-20
Into = torch.Tensor | None
Where = slice | torch.Tensor


class Kept(NamedTuple):
    """What was kept of a teacher beside its logits, and what is made of the rest.

    Attributes:
        classes: int64 ``[..., k]``: which the logits are of; negative: padding.
        normalizer: Log-sum-exp of all its logits at T, one a row, or None.
        bucket: Whether the classes that were not kept are one more outcome.
    """

    classes: torch.Tensor
    normalizer: torch.Tensor | None
    bucket: bool


def first_of_equals(index: torch.Tensor) -> torch.Tensor:
    """False where a row ``[..., k]`` has named the same class before."""
    order = index.argsort(dim=-1, stable=True)
    in_order = index.gather(-1, order)
    again = torch.zeros_like(index, dtype=torch.bool)
    again[..., 1:] = in_order[..., 1:] == in_order[..., :-1]
    return torch.ones_like(again).scatter(-1, order, ~again)


def topk_rows(
    student: torch.Tensor, logits: torch.Tensor, kept: Kept, temperature: torch.Tensor | float
) -> torch.Tensor:
    """KL over the k kept classes and, for ``kept.bucket``, all others as one outcome; without the factor T².

    An index outside 0 … V - 1 and a logit of -inf are padding, a class counts the first time that it is named, and a
    row that names none is 0.
    """
    index = kept.classes
    present = (index >= 0) & (index < student.shape[-1]) & (logits != -math.inf)
    present = present & first_of_equals(index.masked_fill(~present, -1))
    named = present.any(-1)
    safe = index.masked_fill(~present, 0)
    drop = ~named.unsqueeze(-1)  # before anything is computed: 0 times NaN would come back as a gradient
    student, logits = student.masked_fill(drop, 0.0), logits.masked_fill(drop, 0.0)
    rows = _rows(student, logits, kept._replace(classes=safe), present | drop, temperature)
    return rows.masked_fill(~named, 0.0)


def _rows(
    student: torch.Tensor,
    logits: torch.Tensor,
    named: Kept,
    present: torch.Tensor,
    temperature: torch.Tensor | float,
) -> torch.Tensor:
    (safe, normalizer, bucket), dtype = named, compute_dtype(student)
    scaled = student.to(dtype) / temperature
    kept = (logits.to(dtype) / temperature).masked_fill(~present, -math.inf)
    if not bucket:
        return kd_kl_rows(scaled.gather(-1, safe).masked_fill(~present, -math.inf), kept, 1.0, -1)
    log_p = torch.log_softmax(kept, -1) if normalizer is None else kept - normalizer.to(dtype).unsqueeze(-1)
    chosen = torch.zeros(student.shape, dtype=torch.int64, device=student.device)
    chosen = chosen.scatter_add(-1, safe, present.long()) > 0
    total = torch.logsumexp(scaled, -1, keepdim=True)
    # Not below the rounding of 1, as in the kernel: there is no other class left, or as good as none.
    rounding = torch.finfo(dtype).eps / 2
    none_left = chosen.all(-1)
    others = scaled.masked_fill(chosen & ~none_left.unsqueeze(-1), -math.inf)
    q_other = (
        (torch.logsumexp(others, -1) - total.squeeze(-1))
        .exp()
        .masked_fill(none_left, 0.0)
        .clamp(min=rounding)
    )
    p_other = torch.zeros_like(q_other) if normalizer is None else (1 - log_p.exp().sum(-1)).clamp(min=0.0)
    log_q = (scaled.gather(-1, safe) - total).masked_fill(~present, 0.0)
    p, q = log_p.exp(), log_q.exp().masked_fill(~present, 0.0)
    terms = _kl_terms(p, q, log_p.masked_fill(~present, 0.0) - log_q, present).sum(-1)
    ratio = torch.where(p_other > 0, p_other, q_other) / q_other
    return terms + _kl_terms(p_other, q_other, ratio.log(), p_other > 0)


def _kl_terms(p: torch.Tensor, q: torch.Tensor, delta: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """p·δ + (q - p), summed so that near-equal p and q do not cancel; δ = log p - log q."""
    near = (delta.detach().abs() < NEAR) & present
    small = torch.where(near, delta, torch.zeros_like(delta))
    return torch.where(near, p * (small + torch.special.expm1(-small)), p * delta + (q - p))


def topk_closed(
    student: torch.Tensor,
    logits: torch.Tensor,
    kept: Kept,
    temperature: torch.Tensor | float,
    need_student: bool,
) -> Closed:
    """:func:`topk_rows`, and T times its gradient to the student where it is needed, in few passes over V.

    With M = Σ p_c + p_o, classes outside K have T·∂/∂s_c = q_c·(M - p_o/q_o), those in K q_c·M - p_c. Rows that nearly
    agree, that name a class twice or none, or whose probabilities underflow take the definition, in float64.

    One loop of csrc/topk_loop.hpp where everything is computed in float32 and the extension was built.
    """
    index = kept.classes.reshape(-1, kept.classes.shape[-1])
    log_z = None if kept.normalizer is None else kept.normalizer.reshape(-1).to(torch.float32)

    def plain(s: torch.Tensor, t: torch.Tensor, rows: Where, grad: Into, _: Into) -> torch.Tensor:
        own = None if log_z is None else log_z[rows]
        found = _in_one_loop(s, t, Kept(index[rows], own, kept.bucket), temperature, grad)
        if found is not None:
            return found[0]
        present, safe, odd = _places(index[rows], t, s.shape[1])
        if kept.bucket:
            loss = _bucket(s, t, own, (present, safe), temperature, grad)
        else:
            loss = _renormalized(s, t, (present, safe), temperature, grad)
        return loss.masked_fill_(odd | (loss == math.inf), math.nan)

    def careful(s: torch.Tensor, t: torch.Tensor, rows: Where, grad: Into, _: Into) -> torch.Tensor:
        wide = None if log_z is None else log_z[rows].double()
        with torch.enable_grad():
            leaf = s.requires_grad_(grad is not None)
            loss = topk_rows(leaf, t, Kept(index[rows], wide, kept.bucket), temperature)
            total = loss.sum()
        if grad is not None:
            grad.copy_(torch.autograd.grad(total, leaf)[0] * temperature)
        return loss.detach()

    last = student.dim() - 1
    if student.dtype is logits.dtype is torch.float32:
        # Nothing to widen, or to cut: a row is kept in the cache by the loop itself.
        s, t = (x.detach().reshape(-1, x.shape[-1]) for x in (student, logits))
        grad = torch.empty(s.shape, device=s.device) if need_student else None
        found = _in_one_loop(s, t, Kept(index, log_z, kept.bucket), temperature, grad)
        if found is not None:
            loss, smallest = found
            if not smallest >= CAREFUL_BELOW:
                again_with_care(loss, s, t, (grad, None), careful, CAREFUL_BELOW)
            return loss.view(student.shape[:-1]), None if grad is None else grad.view(student.shape), None
    return closed_form(student, logits, last, (need_student, False), plain, careful, chunk=4)


def _in_one_loop(
    s: torch.Tensor, t: torch.Tensor, kept: Kept, temperature: torch.Tensor | float, grad: Into
) -> tuple[torch.Tensor, float] | None:
    """The rows that need no care in C++, NaN for others, and the smallest or NaN; None where it cannot be."""
    library = extension()
    if library is None or s.device.type != "cpu" or s.dtype is not torch.float32 or not s.shape[1]:
        return None
    s, t = s if s.stride(1) == 1 else s.contiguous(), t.contiguous()
    index, log_z = kept.classes.contiguous(), kept.normalizer
    log_z = None if log_z is None else log_z.contiguous()
    loss = torch.empty(len(s))
    smallest: float = library.topk_rows(
        [*s.shape, s.stride(0), t.shape[1]],
        s.data_ptr(),
        [index.data_ptr(), t.data_ptr(), address(log_z)],
        kept.bucket,
        1.0 / float(temperature),
        loss.data_ptr(),
        address(grad),
        torch.get_num_threads(),
    )
    return loss, smallest


def _places(
    index: torch.Tensor, logits: torch.Tensor, classes: int
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """(where a class is, None if everywhere; where to look; rows that name a class twice)."""
    out = (index < 0) | (index >= classes) | (logits == -math.inf)
    present = None if not bool(out.any()) else ~out
    # Padding goes to a column of its own; whoever finds another's number where it left its own was there first.
    place = index if present is None else torch.where(present, index, classes)
    number = torch.arange(index.shape[1], dtype=torch.int32, device=index.device).expand(index.shape)
    board = torch.empty(len(index), classes + 1, dtype=torch.int32, device=index.device)
    again = board.scatter_(1, place, number).gather(1, place) != number
    if present is None:
        return None, index, again.any(-1)
    return present, index.masked_fill(out, 0), (again & present).any(-1)


def _bucket(
    s: torch.Tensor,
    t: torch.Tensor,
    log_z: torch.Tensor | None,
    places: tuple[torch.Tensor | None, torch.Tensor],
    temperature: torch.Tensor | float,
    grad: Into,
) -> torch.Tensor:
    present, at = places
    scaled = s * (1.0 / temperature)
    q = torch.softmax(scaled, -1, out=torch.empty_like(scaled) if grad is None else grad)
    kept, log_p = scaled.gather(-1, at), t * (1.0 / temperature)
    if present is not None:
        kept.masked_fill_(~present, -math.inf)
        log_p.masked_fill_(~present, -math.inf)
    log_p = torch.log_softmax(log_p, -1) if log_z is None else log_p.sub_(log_z.unsqueeze(-1))
    # The student's log-sum-exp, of its most probable class in K: no pass over V of its own.
    best, first = kept.max(-1, keepdim=True)
    at_best = at.gather(-1, first)
    if present is not None:  # padding looks where a class is that is looked at anyway
        at = torch.where(present, at, at_best)
    q_kept, q_best = q.gather(-1, at), q.gather(-1, at_best)
    p = log_p.exp()
    delta = log_p.sub_(kept).add_(best - q_best.log())
    if present is not None:
        delta.masked_fill_(~present, 0.0)
    # Without the others' own sum 1 - Σ q_c would cancel.
    others = q.scatter_(-1, at, 0.0).sum(-1, keepdim=True)
    sum_p = p.sum(-1, keepdim=True)
    p_other = torch.zeros_like(others) if log_z is None else (1 - sum_p).clamp_(min=0.0)
    mass = sum_p + p_other
    loss = (p * delta).sum(-1, keepdim=True) + torch.xlogy(p_other, p_other / others) + (1 - mass)
    loss.masked_fill_((others < torch.finfo(s.dtype).eps) | (q_best < LEAST), math.nan)
    if grad is not None:
        own = q_kept * mass - p
        if present is not None:
            own = torch.where(present, own, own.gather(-1, first))
        q.mul_(mass - p_other / others).scatter_(-1, at, own)
    return loss.squeeze(-1)


def _renormalized(
    s: torch.Tensor,
    t: torch.Tensor,
    places: tuple[torch.Tensor | None, torch.Tensor],
    temperature: torch.Tensor | float,
    grad: Into,
) -> torch.Tensor:
    present, at = places
    kept = s.gather(-1, at)
    if present is not None:
        t, kept = (x.masked_fill(~present, -math.inf) for x in (t, kept))
    log_q, log_p = (torch.log_softmax(x * (1.0 / temperature), -1) for x in (kept, t))
    p, q, delta = log_p.exp(), log_q.exp(), log_p.sub_(log_q)
    if present is not None:
        delta.masked_fill_(~present, 0.0)
    if grad is not None:
        grad.zero_().scatter_add_(-1, at, q.sub_(p))
    return (p * delta).sum(-1)

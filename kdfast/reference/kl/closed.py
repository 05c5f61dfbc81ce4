"""The KL divergence and its gradients in closed form: the same numbers as losses.py, in fewer passes.

What CPU tensors take. Most rows need no care: two log-softmaxes, one exponential each, a dot product, and all of that
in one loop of csrc/row_losses.hpp where the extension was built. Rows whose student and teacher nearly agree, or that
hold -inf, are found by their result and computed again, with care.
"""

from __future__ import annotations

import torch

from kdfast.reference.closed import Closed, log_softmax_at, looped_form
from kdfast.reference.common import NEAR, compute_dtype
from kdfast.reference.kl.rows import Labels, cross_entropy_gradient

Into = torch.Tensor | None


def kd_kl_closed(
    student: torch.Tensor,
    teacher: torch.Tensor,
    temperature: torch.Tensor | float,
    dim: int,
    need_student: bool,
    need_teacher: bool,
) -> Closed:
    """KL of each row, and T times its gradients to student and teacher where they are needed.

    Everything in float32 (float64 for float64 inputs); no factor T², no weights.
    """

    def plain(s: torch.Tensor, t: torch.Tensor, rows: object, grad_s: Into, grad_t: Into) -> torch.Tensor:
        return _plain(s, t, temperature, grad_s, grad_t)

    def careful(s: torch.Tensor, t: torch.Tensor, rows: object, grad_s: Into, grad_t: Into) -> torch.Tensor:
        return _careful(s, t, temperature, grad_s, grad_t)

    need = need_student, need_teacher
    return looped_form(student, teacher, dim, need, ("kl_rows", temperature, ()), plain, careful)


def _plain(
    s: torch.Tensor, t: torch.Tensor, temperature: torch.Tensor | float, grad_s: Into, grad_t: Into
) -> torch.Tensor:
    log_q, free = log_softmax_at(s, temperature)
    log_p, p = log_softmax_at(t, temperature)
    torch.exp(log_p, out=p)
    delta = log_p.sub_(log_q)
    loss = torch.mul(p, delta, out=free).sum(-1)  # not vecdot: autocast would round it
    if grad_s is not None:
        torch.exp(log_q, out=grad_s).sub_(p)
    if grad_t is not None:
        torch.sub(delta, loss.unsqueeze(-1), out=grad_t).mul_(p)
    return loss


def _careful(
    s: torch.Tensor, t: torch.Tensor, temperature: torch.Tensor | float, grad_s: Into, grad_t: Into
) -> torch.Tensor:
    scaled_s, scaled_t = s / temperature, t / temperature
    log_z = [scaled.logsumexp(-1, keepdim=True) for scaled in (scaled_s, scaled_t)]
    absent = t == float("-inf")
    q, p = (scaled_s - log_z[0]).exp(), (scaled_t - log_z[1]).exp()
    # Logits are subtracted before anything is scaled or rounded: exact when they are close.
    delta = torch.where(absent, 0.0, (t - s) / temperature - (log_z[1] - log_z[0]))
    near = (delta.abs() < NEAR) & ~absent
    difference = torch.where(near, p * torch.special.expm1(torch.where(near, -delta, 0.0)), q - p)
    loss = (p * delta + difference).sum(-1)
    # Recentred: the rounding of the two log-sum-exps shifts every δ of a row alike.
    centre = difference.sum(-1, keepdim=True)
    if grad_s is not None:
        torch.sub(difference, centre * q, out=grad_s)
    if grad_t is not None:
        torch.mul(p, delta + centre - loss.unsqueeze(-1), out=grad_t)
    return loss


def kd_kl_gradients(
    upstream: torch.Tensor,
    student: torch.Tensor,
    teacher: torch.Tensor,
    temperature: torch.Tensor | float,
    dim: int,
    row_weight: torch.Tensor | None,
    mask: torch.Tensor | None,
    divisor: torch.Tensor | float,
    labels: Labels | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of ``losses.kd_kl``; what a registered op needs, below autograd.

    ``upstream`` is 0-d for a reduced loss, else one value a row.
    """
    dtype = compute_dtype(student, teacher)
    _, grad_student, grad_teacher = kd_kl_closed(student, teacher, temperature, dim, True, True)
    weight = upstream.to(dtype) if row_weight is None else upstream.to(dtype) * row_weight.to(dtype)
    weight = weight.unsqueeze(dim) if weight.dim() else weight
    scale = weight * (temperature / divisor)  # T² of the loss over T of the softmax
    assert grad_student is not None
    assert grad_teacher is not None
    grads = [grad_student * scale, grad_teacher * scale]
    if labels is not None:
        grads[0] = grads[0] + weight * cross_entropy_gradient(student, labels, dim)
    if mask is not None:
        grads = [grad.masked_fill(~mask.unsqueeze(dim), 0.0) for grad in grads]
    return grads[0].to(student.dtype), grads[1].to(teacher.dtype)

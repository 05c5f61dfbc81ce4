"""The KL divergence and its gradients in closed form: the same numbers as losses.py, in fewer passes.

What CPU tensors take. Most rows need no care: two log-softmaxes, one exponential each, a dot product. Rows whose
student and teacher nearly agree, or that hold -inf, are found by their result and computed again, with care.
"""

from __future__ import annotations

import torch

from kdfast.reference.losses import NEAR, compute_dtype

#: Below this a row's divergence has lost digits to cancellation in float32 (F.kl_div's has, too).
CAREFUL_BELOW = 1e-3

Closed = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]


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
    dtype = compute_dtype(student, teacher)
    s, t = student.detach().to(dtype).movedim(dim, -1), teacher.detach().to(dtype).movedim(dim, -1)
    rows, grad_student, grad_teacher = _plain(s, t, temperature, need_student, need_teacher)
    careful = ~(rows >= CAREFUL_BELOW)  # NaN, too: 0·inf, where a class is absent
    if bool(careful.any()):
        patch = _careful(s[careful], t[careful], temperature)
        for whole, part in zip((rows, grad_student, grad_teacher), patch, strict=True):
            if whole is not None and part is not None:
                whole[careful] = part
    back = [None if g is None else g.movedim(-1, dim) for g in (grad_student, grad_teacher)]
    return rows, back[0], back[1]


def _plain(
    s: torch.Tensor,
    t: torch.Tensor,
    temperature: torch.Tensor | float,
    need_student: bool,
    need_teacher: bool,
) -> Closed:
    log_q, log_p = torch.log_softmax(s / temperature, -1), torch.log_softmax(t / temperature, -1)
    p = log_p.exp()
    delta = log_p.sub_(log_q)
    rows = (p * delta).sum(-1)  # not vecdot: autocast would round it
    grad_student = log_q.exp_().sub_(p) if need_student else None
    grad_teacher = delta.sub_(rows.unsqueeze(-1)).mul_(p) if need_teacher else None
    return rows, grad_student, grad_teacher


def _careful(s: torch.Tensor, t: torch.Tensor, temperature: torch.Tensor | float) -> Closed:
    scaled_s, scaled_t = s / temperature, t / temperature
    log_z = [scaled.logsumexp(-1, keepdim=True) for scaled in (scaled_s, scaled_t)]
    absent = t == float("-inf")
    q, p = (scaled_s - log_z[0]).exp(), (scaled_t - log_z[1]).exp()
    # Logits are subtracted before anything is scaled or rounded: exact when they are close.
    delta = torch.where(absent, 0.0, (t - s) / temperature - (log_z[1] - log_z[0]))
    near = (delta.abs() < NEAR) & ~absent
    difference = torch.where(near, p * torch.special.expm1(torch.where(near, -delta, 0.0)), q - p)
    rows = (p * delta + difference).sum(-1)
    # Recentred: the rounding of the two log-sum-exps shifts every δ of a row alike.
    centre = difference.sum(-1, keepdim=True)
    return rows, difference - centre * q, p * (delta + centre - rows.unsqueeze(-1))

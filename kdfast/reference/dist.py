"""DIST: by its definition, the oracle of the tests, and in closed form for CPU tensors."""

from __future__ import annotations

import torch

from kdfast.reference.closed import Closed
from kdfast.reference.common import compute_dtype
from kdfast.reference.native import address, extension

__all__ = ["DIST_EPS", "dist", "dist_closed"]

#: ε of DIST's correlations, as its authors have it.
DIST_EPS = 1e-8


def dist(
    student: torch.Tensor, teacher: torch.Tensor, beta: float, gamma: float, temperature: torch.Tensor | float
) -> torch.Tensor:
    """T²·(β·inter + γ·intra) of logits ``[..., V]`` (Huang et al. 2022, Eq. 9); every leading index is a sample."""
    dtype = compute_dtype(student, teacher)
    q, p = (torch.softmax(x.to(dtype).flatten(0, -2) / temperature, -1) for x in (student, teacher))

    def distance(dim: int) -> torch.Tensor:
        a, b = q - q.mean(dim, keepdim=True), p - p.mean(dim, keepdim=True)
        norms = a.norm(dim=dim) * b.norm(dim=dim)
        similar: torch.Tensor = (a * b).sum(dim) / (norms + DIST_EPS)
        return (1 - similar).mean()

    return (beta * distance(1) + gamma * distance(0)) * (temperature * temperature)


def dist_closed(
    student: torch.Tensor,
    teacher: torch.Tensor,
    beta: float,
    gamma: float,
    temperature: torch.Tensor | float,
    need_student: bool,
    need_teacher: bool,
) -> Closed:
    """:func:`dist` without the factor T², and T times its gradients where they are needed.

    One loop of csrc/dist_loop.hpp where everything is computed in float32 and the extension was built, else operators.
    With a, b a row's or column's centred probabilities, ρ = ⟨a, b⟩/(|a|·|b| + ε) has the gradient
    (b - ρ·|b|/|a|·a)/(|a|·|b| + ε) with respect to a, which is centred already; 0 stands for 1/|a| where a is 0.
    """
    dtype = compute_dtype(student, teacher)
    s, t = (x.detach().to(dtype).flatten(0, -2) for x in (student, teacher))
    library = extension()
    if library is not None and dtype is torch.float32 and s.device.type == "cpu":
        s, t = (x if x.stride(1) == 1 else x.contiguous() for x in (s, t))
        grads = [
            torch.empty(x.shape) if need else None
            for x, need in ((student, need_student), (teacher, need_teacher))
        ]
        loss: float = library.dist_loss(
            [*s.shape, s.stride(0), t.stride(0)],
            s.data_ptr(),
            t.data_ptr(),
            1.0 / float(temperature),
            beta,
            gamma,
            *[address(grad) for grad in grads],
            torch.get_num_threads(),
        )
        return torch.tensor(loss, dtype=torch.float32), grads[0], grads[1]
    q, p = (torch.softmax(x / temperature, -1) for x in (s, t))
    sides = (q, need_student), (p, need_teacher)
    found = [torch.zeros_like(own) if need else None for own, need in sides]
    value = torch.zeros((), dtype=dtype, device=q.device)
    for dim, share in ((1, beta), (0, gamma)):
        a, b = (x - x.mean(dim, keepdim=True) for x in (q, p))
        length_a, length_b = (x.norm(dim=dim, keepdim=True) for x in (a, b))
        rest = length_a * length_b + DIST_EPS
        rho = (a * b).sum(dim, keepdim=True) / rest
        value += share * (1 - rho).mean()
        weight = share / max(1, rho.numel()) / rest
        pairs = (found[0], a, length_a, b, length_b), (found[1], b, length_b, a, length_a)
        for grad, own, length, other, others_length in pairs:
            if grad is not None:
                along = torch.where(length == 0, 0.0, weight * rho * others_length / length)
                grad.addcmul_(own, along).addcmul_(other, weight, value=-1)
    for grad, (own, _), like in zip(found, sides, (student, teacher), strict=True):
        if grad is not None:  # through the softmax
            grad.mul_(own).sub_(own * grad.sum(-1, keepdim=True)).resize_(like.shape)
    return value, found[0], found[1]

"""Distillation from hidden states: both heads, the KL divergence of their logits, gradients of student and its weight.

What a vocabulary's logits cost is memory: the peak beside the times is the point. Four matrix products of
``rows × hidden × classes`` are the same for everyone, and no bytes are counted, since products decide.

Liger has no KL of two linear heads; its row is ``LigerFusedLinearJSD`` at β = 0, which is the same forward divergence
in natural units, at T = 1 as here, because it puts no T² before the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kdfast.benchmarks.case import Absent, Case, Provider, Settings, Work, peer
from kdfast.functional import fused_linear_kd_loss

#: Rows of one part of the check, which computes in float64.
PART = 512
Result = tuple[Tensor, Tensor, Tensor]


def cases(settings: Settings) -> Iterator[Case]:
    """All rows of the suite for this device and size of run."""
    if settings.device == "cuda":
        large = [(4096, 4096, 32000), (4096, 4096, 128256)]
        sizes = settings.pick([(16, 8, 40)], large, large)
    else:
        sizes = settings.pick([(16, 8, 40)], [(256, 64, 4000)], [(256, 64, 4000), (1024, 256, 32000)])
    for rows, hidden, classes in sizes:
        yield _case(rows, hidden, classes, settings)


def eager_heads(student: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
    """What people write: all logits of both, at once."""
    log_q = F.log_softmax(F.linear(student, weight).float(), -1)
    with torch.no_grad():
        p = F.softmax(F.linear(teacher, teacher_weight).float(), -1)
    return F.kl_div(log_q, p, reduction="batchmean")


def _case(rows: int, hidden: int, classes: int, settings: Settings) -> Case:
    device = settings.device
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    made: list[Tensor] = []

    def operands() -> list[Tensor]:
        if not made:
            generator = torch.Generator(device).manual_seed(0)

            def draw(*shape: int, scale: float) -> Tensor:
                return (scale * torch.randn(shape, generator=generator, device=device)).to(dtype)

            scale = 3 * hidden**-0.5  # logits that spread as those of a trained head
            made.extend(draw(rows, hidden, scale=1.0).requires_grad_(index == 0) for index in range(2))
            made.extend(draw(classes, hidden, scale=scale).requires_grad_(index == 0) for index in range(2))
        return made

    def work(loss: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Work:
        student, teacher, weight, teacher_weight = operands()

        def step(turn: int) -> Result:
            value = loss(student, weight, teacher, teacher_weight)
            grad, grad_weight = torch.autograd.grad(value, (student, weight))
            return value, grad, grad_weight

        return step

    wanted: list[Tensor] = []

    def check(provider: str, result: Result) -> None:
        if not wanted:
            wanted.extend(_exact(*operands()))
        torch.testing.assert_close(result[0].double(), wanted[0], rtol=2e-2, atol=1e-6)
        limit = 5e-2 if dtype != torch.float32 else 1e-4
        for name, got, want in zip(("hidden states", "weight"), result[1:], wanted[1:], strict=True):
            error = float((got.double() - want).norm() / want.norm())
            assert error < limit, (
                f"the gradient of {name} is off by {error:.2e} of its norm; limit {limit:.0e}"
            )

    providers = (
        Provider("eager", lambda: work(eager_heads), graph=False),
        Provider("Liger", lambda: work(_liger(settings)), graph=False, config="LigerFusedLinearJSD, β = 0"),
        Provider("kdfast", lambda: work(fused_linear_kd_loss), graph=False),
    )
    params = {"rows": rows, "hidden": hidden, "classes": classes, "dtype": str(dtype).removeprefix("torch.")}
    return Case("linear", "fused_linear_kd_loss", params, 1, providers, check, rows, "rows", family="linear")


def _exact(student: Tensor, teacher: Tensor, weight: Tensor, teacher_weight: Tensor) -> list[Tensor]:
    """Loss and both gradients in float64, a part of the rows at a time."""
    wide, wide_teacher = weight.detach().double(), teacher_weight.double()
    value = torch.zeros((), dtype=torch.float64, device=weight.device)
    grad_weight, grads = torch.zeros_like(wide), []
    for some, same in zip(torch.split(student.detach(), PART), torch.split(teacher, PART), strict=True):
        x = some.double()
        log_q = torch.log_softmax(x @ wide.T, -1)
        log_p = torch.log_softmax(same.double() @ wide_teacher.T, -1)
        value += (log_p.exp() * (log_p - log_q)).sum() / len(student)
        delta = (log_q.exp() - log_p.exp()) / len(student)
        grads.append(delta @ wide)
        grad_weight += delta.T @ x
    return [value, torch.cat(grads), grad_weight]


def _liger(settings: Settings) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    if settings.device != "cuda":
        raise Absent("Liger's kernels are Triton's alone: they need a GPU")
    module: Any = peer("liger_kernel.transformers.fused_linear_jsd").LigerFusedLinearJSD(
        jsd_beta=0.0, temperature=1.0
    )

    def loss(student: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
        value: Tensor = module(student, weight, teacher, teacher_weight)
        return value

    return loss

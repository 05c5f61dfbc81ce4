"""kd_kl_div against what people write without it, forward and backward, on the same tensors in one run.

Traffic in moves of one logit tensor (N elements, read or written once), from logits to the student's gradient:

    eager       26N   two softmaxes with a division each, kl_div, and the way back
    compiled    5N    where the class dimension fits a persistent reduction, up to 8N elsewhere
    kdfast      3N    on the Triton backend; the reference, which runs on the CPU, is plain PyTorch

Each provider is checked against float64 before it is timed. Timings on a shared or frequency-scaled machine mean
nothing: compare providers within one run, and look at the spread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kdfast.functional import kd_kl_div

TEMPERATURE = 4.0
# CIFAR-100 at the papers' batch; ImageNet at theirs; many classes.
SHAPES = [(64, 100), (256, 1000), (64, 32000)]
#: Inputs take turns, so that the second call does not find the first one's in the cache.
ROTATION = 4

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def eager(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    log_q = F.log_softmax(student / TEMPERATURE, dim=-1)
    p = F.softmax(teacher / TEMPERATURE, dim=-1)
    return F.kl_div(log_q, p, reduction="batchmean") * TEMPERATURE**2


def fused(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return kd_kl_div(student, teacher, TEMPERATURE)


PROVIDERS: dict[str, Loss] = {"eager": eager, "compiled": torch.compile(eager), "kdfast": fused}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("provider", PROVIDERS)
def test_kl_forward_backward(benchmark: Any, device: str, provider: str, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    pairs = [
        tuple((3 * torch.randn(shape, generator=generator)).to(device) for _ in range(2))
        for _ in range(ROTATION)
    ]
    loss = PROVIDERS[provider]

    def step(student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        student.requires_grad_()
        value = loss(student, teacher)
        (grad,) = torch.autograd.grad(value, student)
        if device == "cuda":
            torch.cuda.synchronize()
        return value, grad

    student, teacher = pairs[0]
    exact = student.detach().double().requires_grad_()
    want = eager(exact, teacher.double())
    (want_grad,) = torch.autograd.grad(want, exact)
    value, grad = step(student, teacher)
    torch.testing.assert_close(value.double(), want, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(grad.double(), want_grad, rtol=1e-4, atol=1e-7)

    turns: Iterator[Any] = cycle(pairs)
    benchmark.extra_info |= {
        "elements": student.numel(),
        "itemsize": student.element_size(),
        "torch": torch.__version__,
    }
    benchmark.pedantic(step, setup=lambda: (next(turns), {}), rounds=50, warmup_rounds=5)

"""Half-precision gradients of a loss that is scaled (`torch.amp.GradScaler`) are rounded once, after the scale.

A loss that is a mean has gradients of one over its size: in float16 they are near the smallest numbers, and what is
rounded before the scale multiplies it has lost its digits, or is 0. Every loss, as eager calls run it and as
torch.compile sees it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from kdfast.functional import (
    bn_mse,
    bn_statistics_loss,
    dist_loss,
    fused_linear_kd_loss,
    jsd_loss,
    kd_kl_div,
    noise_mse,
)
from kdfast.reference.feature import noise_error
from tests.conftest import Target

Loss = Callable[..., torch.Tensor]


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def heads(
    student: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, other: torch.Tensor
) -> torch.Tensor:
    return fused_linear_kd_loss(
        student, weight, other[:, :8], other[:16, 8:], temperature=2.0, student_bias=bias, reduction="mean"
    )


def batch(*others: torch.Tensor, training: bool) -> Loss:
    def loss(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        held = (None, None) if training else (0.1 * torch.ones(32), torch.ones(32))
        return bn_mse(
            x,
            IMAGES.flip(0).to(x.device, x.dtype),
            *(t if t is None else t.to(x.device) for t in held),
            weight,
            bias,
            training,
        )

    return loss


IMAGES = draw(4, 32, 16, 16)
CHANNEL = 1 + 0.1 * draw(32)
#: Gradients for an upstream of 1 are below 2⁻¹⁴ by far then, and would keep two digits in half precision.
SMALL = 0.02 * CHANNEL
NEAR = 0.03 * IMAGES - noise_error(torch.zeros_like(IMAGES), 3)
LOSSES: dict[str, tuple[Loss, tuple[torch.Tensor, ...]]] = {
    "bn_mse": (batch(training=True), (IMAGES, SMALL, CHANNEL)),
    "bn_mse, evaluating": (batch(training=False), (IMAGES, SMALL, CHANNEL)),
    "noise_mse": (lambda x: noise_mse(x, seed=3), (NEAR,)),
    "bn_statistics_loss": (
        lambda x: 1e-3 * bn_statistics_loss(x, torch.zeros(32).to(x.device), torch.ones(32).to(x.device))[0],
        (IMAGES,),
    ),
    "kd_kl_div": (lambda s: kd_kl_div(s, s.detach().flip(0), 2.0, reduction="mean"), (draw(2000, 16),)),
    "jsd_loss": (lambda s: jsd_loss(s, s.detach().flip(0), reduction="mean"), (draw(2000, 16),)),
    "dist_loss": (lambda s: 1e-3 * dist_loss(s, s.detach().flip(0)), (draw(200, 16),)),
    "fused_linear_kd_loss": (
        lambda h, w, b: heads(h, w, b, draw(20_000, 16).to(h)),
        (draw(20_000, 8), draw(16, 8), draw(16)),
    ),
}


@pytest.mark.parametrize("compiling", [False, True], ids=["eager", "registered"])
@pytest.mark.parametrize("name", LOSSES)
def test_the_scale_comes_before_the_rounding(
    name: str, compiling: bool, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, given = LOSSES[name]
    halves = [x.to(target.device, torch.float16) for x in given]
    exact = [x.double().requires_grad_() for x in halves]
    grads = torch.autograd.grad(loss(*exact), exact)
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", compiling)
    assert torch.compiler.is_compiling() is compiling
    for at, want in enumerate(grads):
        # What GradScaler would end at: the largest power of two that nothing overflows under.
        scale = 2.0 ** int(math.log2(30_000 / float(want.abs().max())))
        inputs = [x.clone().requires_grad_(n == at) for n, x in enumerate(halves)]
        (loss(*inputs).float() * scale).backward()
        grad = inputs[at].grad
        assert grad is not None
        assert grad.dtype == torch.float16
        error = float((grad.double() / scale - want).norm() / want.norm())
        assert error < 6e-4, f"input {at}: {error:.1e}"  # one rounding: 2⁻¹¹

"""Few rows of a large vocabulary, shared by several programs: no gradient may land on logits still to be read."""

from __future__ import annotations

import pytest
import torch

import kdfast
from kdfast.functional import fused_linear_kd_loss


@pytest.mark.gpu
def test_nearly_equal_rows_shared_by_programs_get_the_right_gradient() -> None:
    """Nearly equal, so that each program reads the whole row again; `make sanitize` sees the race itself."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(3, 8, generator=generator), torch.randn(20000, 8, generator=generator)
    teacher = hidden + 1e-3 * torch.randn(3, 8, generator=generator)
    given = [tensor.cuda().clone().requires_grad_() for tensor in (hidden, weight)]
    with kdfast.use_backend("triton"):
        loss = fused_linear_kd_loss(*given, teacher.cuda(), weight.cuda())
        grads = torch.autograd.grad(loss, given)
    exact = [tensor.double().requires_grad_() for tensor in (hidden, weight)]
    with kdfast.use_backend("reference"):
        want = torch.autograd.grad(fused_linear_kd_loss(*exact, teacher.double(), weight.double()), exact)
    for got, exactly in zip(grads, want, strict=True):
        assert float((got.cpu().double() - exactly).norm() / exactly.norm()) < 1e-2

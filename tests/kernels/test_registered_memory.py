"""What a registered op returns is memory that its kernels wrote: one more copy is up to two thirds of their traffic.

Not so of ``fused_linear_kd_loss``, whose gradients torch's own matrix products write.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import kdfast
from tests.conftest import INTERPRETING
from tests.kernels.denoise import test_denoise
from tests.kernels.dist import test_dist
from tests.kernels.feature import test_feature
from tests.kernels.feature import test_noise as test_feature_noise
from tests.kernels.images import test_images
from tests.kernels.kl import test_distillation, test_kl
from tests.kernels.norm import test_norm, test_statistics_loss
from tests.kernels.pair import test_divergence, test_pair
from tests.kernels.procedural import test_leaves, test_shaders
from tests.kernels.topk import test_topk
from tests.support.conformance import OpCase, as_tuple

MODULES = (
    test_denoise, test_dist, test_feature, test_feature_noise, test_images, test_distillation, test_kl, test_norm,
    test_statistics_loss, test_divergence, test_pair, test_leaves, test_shaders, test_topk,
)  # fmt: skip
#: Whose cases differ in arithmetic alone: the first stands for them.
ALIKE = (test_divergence, test_pair, test_kl, test_distillation, test_topk, test_dist)
CASES = [
    pytest.param(case, id=f"{module.__name__.rpartition('.')[2]}-{case.name}")
    for module in MODULES
    for case in [x for x in module.TestConformance.cases if x.opcheck][: 1 if module in ALIKE else None]
    # The gradient of a residual that nothing follows is the one that came in, which no op may return: a copy.
    if (module, case.name) != (test_norm, "residual")
]
pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not INTERPRETING, reason="the kernels are what is looked at"),
]


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Every tensor that a kernel was given; held, so that no other takes its memory."""
    from triton.runtime.interpreter import InterpretedFunction

    given: list[Tensor] = []
    plain = InterpretedFunction.run

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        given.extend(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", run)
    return given


def differentiable(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 1


@pytest.mark.parametrize("case", CASES)
def test_a_registered_op_returns_what_its_kernels_wrote(case: OpCase, written: list[Tensor]) -> None:
    assert case.opcheck is not None
    op, given = case.opcheck(case.inputs(case.small_shapes[0], torch.float32, "cpu"))
    args = [x.detach().requires_grad_() if differentiable(x) else x for x in given]
    with kdfast.use_backend("triton"):
        outputs = as_tuple(op(*args))
        leaves, made = (
            [x for x in xs if isinstance(x, Tensor) and x.requires_grad] for xs in (args, outputs)
        )
        found = [x for x in outputs if isinstance(x, Tensor)]
        if made:
            total = torch.stack([x.sum() for x in made]).sum()
            found += [x for x in torch.autograd.grad(total, leaves, allow_unused=True) if x is not None]
    largest = max(x.numel() for x in (*args, *found) if isinstance(x, Tensor))
    memory = {x.untyped_storage().data_ptr() for x in written}
    large = [x for x in found if 2 * x.numel() > largest]
    assert [tuple(x.shape) for x in large if x.untyped_storage().data_ptr() not in memory] == []
    assert large or case.name == "render_shaders"  # whose tables of programs are larger than its small images

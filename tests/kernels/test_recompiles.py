"""torch.compile compiles a loss once for all batch sizes and temperatures (and once before, for the first of them)."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import kdfast
from kdfast.functional import dist_loss, distillation_loss, dkd_loss, jsd_loss, kd_kl_div
from tests.conftest import INTERPRETING

pytest.importorskip("triton")

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Any], torch.Tensor]

LOSSES: dict[str, Loss] = {
    "batchmean": lambda s, t, y, heat: kd_kl_div(s, t, 4.0),
    "mean": lambda s, t, y, heat: jsd_loss(s, t, reduction="mean"),
    "rowmean": lambda s, t, y, heat: kd_kl_div(s, t, 4.0, reduction="rowmean"),
    "float": lambda s, t, y, heat: dkd_loss(s, t, y, temperature=heat),
    "tensor": lambda s, t, y, heat: kd_kl_div(s, t, torch.tensor(3.0)),
    "weighted": lambda s, t, y, heat: distillation_loss(
        s, t, y, temperature=heat, kd_weight=0.7, ce_weight=0.3
    ),
    "dist": lambda s, t, y, heat: dist_loss(s, t, temperature=heat),
}

BACKENDS = [
    pytest.param(
        "triton",
        marks=[
            pytest.mark.interpreter,
            pytest.mark.skipif(not INTERPRETING, reason="runs the ops in the interpreter"),
        ],
    ),
    pytest.param("reference", marks=pytest.mark.skipif(INTERPRETING, reason="takes no kernel")),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LOSSES)
def test_one_compile_for_all_batch_sizes_and_temperatures(name: str, backend: str) -> None:
    torch._dynamo.reset()
    compiled = 0

    def counting(graph: torch.fx.GraphModule, _: Any) -> Any:
        nonlocal compiled
        compiled += 1
        return graph.forward

    loss = LOSSES[name]
    traced = torch.compile(loss, backend=counting, fullgraph=True)  # which fails at the ninth recompile
    generator = torch.Generator().manual_seed(0)
    with kdfast.use_backend(backend):
        for rows, heat in zip(range(2, 13), itertools.count(1.0, 0.25)):
            student, teacher = torch.randn(2, rows, 7, generator=generator)
            target = torch.randint(0, 7, (rows,), generator=generator)
            found = traced(student, teacher, target, heat)
            torch.testing.assert_close(found, loss(student, teacher, target, heat), rtol=1e-5, atol=1e-6)
    assert compiled <= 2  # the first batch alone, then any


def test_a_temperature_out_of_range_is_refused_while_tracing_too() -> None:
    torch._dynamo.reset()
    traced = torch.compile(lambda s, heat: kd_kl_div(s, s, heat), backend="eager")
    student = torch.randn(3, 5)
    for heat in (1.5, 2.5):
        traced(student, heat)
    for wrong in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=r"temperature: got .* above 0 is needed"):
            traced(student, wrong)

"""What of an operator goes into torch.compile's graph, and what it refuses to be asked."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

import kdfast
from kdfast.ops.common import registered
from kdfast.ops.kl import kd_statistics_op, kl
from tests.conftest import INTERPRETING
from tests.kernels.test_registered_memory import CASES
from tests.support.conformance import OpCase, as_tuple

if INTERPRETING:
    pytest.skip("the reference is called by the same operators", allow_module_level=True)

#: Of a step: lists of tensors are for torch's own registration.
WHOLE = ("kdfast.denoise_step.default", "kdfast.denoise_step_backward.default")
CALL = ([], 1, 4.0, None, None, None, 8.0, None, True, None, None, None, None)


def logits() -> tuple[Tensor, Tensor]:
    student, teacher = torch.randn(2, 8, 10)
    return student.requires_grad_(), teacher


@pytest.mark.parametrize("case", CASES)
def test_a_graph_calls_kernels_that_autograd_does_not_see(case: OpCase) -> None:
    found: set[str] = set()

    def look(graph: Any, _: Any) -> Any:
        found.update(str(node.target) for node in graph.graph.nodes if str(node.target).startswith("kdfast"))
        return make_boxed_func(graph.forward)

    op, args = case.opcheck(case.inputs(case.small_shapes[0], torch.float32, "cpu"))  # type: ignore[misc]
    torch.compiler.reset()
    with kdfast.use_backend("reference"):
        out = torch.compile(
            lambda *given: op(*given), backend=aot_autograd(fw_compiler=look, bw_compiler=look)
        )(*args)
        for x in as_tuple(out):
            if x.requires_grad:
                x.sum().backward(retain_graph=True)
    assert found
    assert all(name.endswith("_kernel.default") or name in WHOLE for name in found), found


@pytest.mark.parametrize(("name", "entered"), [("kd_kl", True), ("kd_kl_kernel", False)])
def test_autograd_is_entered_only_where_it_is_asked_for(name: str, entered: bool) -> None:
    student, teacher = logits()
    frames: list[str] = []

    def enter(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_globals.get("__name__") == registered.__name__:
            frames.append(frame.f_code.co_name)

    op = getattr(torch.ops.kdfast, name).default
    with torch.no_grad():
        sys.setprofile(enter)
        try:
            op(student, teacher, *CALL)
        finally:
            sys.setprofile(None)
    assert bool(frames) is entered, frames


def test_a_compiler_that_asks_for_compliance_finds_it() -> None:
    student, teacher = logits()
    torch.compiler.reset()
    with torch._dynamo.config.patch(only_allow_pt2_compliant_ops=True):
        compiled = torch.compile(lambda s, t: kl.op(s, t, *CALL), fullgraph=True, backend="aot_eager")
        assert compiled(student, teacher).requires_grad


def test_an_operator_without_a_gradient_says_so() -> None:
    student, teacher = logits()
    found = kd_statistics_op(student, teacher, 2.0, None, 1)[0]
    with pytest.raises(RuntimeError, match="kdfast::kd_statistics has no gradient"):
        found.sum().backward()


def test_a_second_derivative_is_refused_not_zero() -> None:
    student, teacher = logits()
    loss = kl.op(student, teacher, *CALL)
    (grad,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="kdfast::kd_kl_backward has no gradient"):
        grad.square().sum().backward()

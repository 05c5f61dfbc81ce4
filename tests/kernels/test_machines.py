"""Every regime that any machine would choose, at sizes the interpreter can take: thresholds are lowered, not shapes
raised, so that a row of 20 classes is as long here as one of 128,256 is on a GPU.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch

import kdfast
from kdfast.functional import kd_kl_div
from tests.conftest import INTERPRETING
from tests.support.conformance import ConformanceSuite, OpCase, as_tuple, assert_verbose_allclose, relayout
from tests.support.machines import MACHINES, lowered

pytest.importorskip("triton")

from kdfast.kernels.kl import launch as kl_launch
from kdfast.kernels.kl import plan as kl_planning
from kdfast.kernels.machine import Machine, machine_of, triton_version, use_machine

__all__ = ["lowered"]  # a fixture

interpreted = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not INTERPRETING, reason="a GPU is the machine that it is"),
]

#: The families whose plans ask for the machine, and those that ask for sizes alone.
BY_MACHINE = (
    "kl.test_kl",
    "kl.test_distillation",
    "pair.test_pair",
    "linear.test_linear",
    "replay.test_replay",
)
BY_SIZE = (
    "topk.test_topk",
    "dist.test_dist",
    "norm.test_norm",
    "norm.test_statistics_loss",
    "feature.test_feature",
    "feature.test_noise",
    "denoise.test_denoise",
    "images.test_images",
)


class Planned(NamedTuple):
    case: OpCase
    machine: str


def _cases(modules: tuple[str, ...]) -> Iterator[OpCase]:
    for name in modules:
        module = importlib.import_module(f"tests.kernels.{name}")
        for suite in vars(module).values():
            if (
                isinstance(suite, type)
                and issubclass(suite, ConformanceSuite)
                and suite is not ConformanceSuite
            ):
                yield from suite.cases


def _planned() -> list[Any]:
    if not INTERPRETING:
        return []
    # Of the families below the KL, plans look at Triton's version alone, or at whether a machine is meant at all.
    pairs = [Planned(case, machine) for case in _cases(BY_MACHINE[:2]) for machine in MACHINES]
    pairs += [Planned(case, machine) for case in _cases(BY_MACHINE[2:]) for machine in ("90:132:3.6", "0:1")]
    pairs += [Planned(case, "90:132") for case in _cases(BY_SIZE)]
    return [pytest.param(planned, id=f"{planned.case.name}-{planned.machine}") for planned in pairs]


def _small(case: OpCase) -> list[tuple[int, ...]]:
    shapes = [shape for shape in case.small_shapes if max(shape) < 1000]
    return shapes or list(case.small_shapes[:1])


@pytest.mark.parametrize("planned", _planned())
@pytest.mark.usefixtures("lowered")
class TestEveryRegime:
    pytestmark = interpreted

    def test_matches_the_fp64_oracle(self, planned: Planned) -> None:
        """Results and gradients in float32, as the inputs lie and where rows do not begin on 16 bytes."""
        case = planned.case
        rtol, atol = case.tolerance(torch.float32)
        for shape in _small(case):
            inputs = case.inputs(shape, torch.float32, "cpu")
            moved = {key: relayout(x, "sliced") if key in case.cast else x for key, x in inputs.items()}
            exact = self._exact(case, inputs)
            for given in (inputs, moved):
                with use_machine(planned.machine):
                    results, grads = self._results(case, given)
                for got, want in zip(results, exact[0], strict=True):
                    assert_verbose_allclose(got, want, rtol=rtol, atol=atol, what=f"{case.name} {shape}")
                for key, grad in grads.items():
                    want = exact[1][key]
                    size = max(float(want.abs().max()), 1e-30) if want.numel() else 1.0
                    assert_verbose_allclose(
                        grad / size, want / size, rtol=rtol, atol=atol, what=f"grad of {key}"
                    )

    @staticmethod
    def _results(case: OpCase, inputs: dict[str, torch.Tensor]) -> tuple[tuple[torch.Tensor, ...], Any]:
        if case.differentiable:
            return ConformanceSuite._grad(case, inputs, case.run)
        return as_tuple(case.run(**inputs)), {}

    @staticmethod
    def _exact(case: OpCase, inputs: dict[str, torch.Tensor]) -> tuple[tuple[torch.Tensor, ...], Any]:
        doubled = ConformanceSuite._to64(inputs)
        if case.differentiable:
            return ConformanceSuite._grad(case, doubled, case.oracle)
        return as_tuple(case.oracle(**doubled)), {}


@pytest.mark.interpreter
@pytest.mark.skipif(not INTERPRETING, reason="a GPU is the machine that it is")
@pytest.mark.usefixtures("lowered")
def test_together_the_machines_take_every_regime(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the class above would pass by never going where the fault is."""
    taken: set[str] = set()
    real = kl_launch.kl_plan

    def spy(*args: Any, **kwargs: Any) -> kl_planning.KLPlan:
        plan = real(*args, **kwargs)
        taken.add(plan.regime)
        return plan

    monkeypatch.setattr(kl_launch, "kl_plan", spy)
    for case in _cases(BY_MACHINE[:2]):
        for machine in MACHINES:
            for shape in _small(case):
                with use_machine(machine):
                    TestEveryRegime._results(case, case.inputs(shape, torch.float32, "cpu"))
    assert taken == {"rows", "cluster", "two_pass", "split", "tickets", "chunks", "classes", "class_tuple"}


@pytest.mark.interpreter
@pytest.mark.skipif(not INTERPRETING, reason="a GPU is the machine that it is")
@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("apart", [1.0, 1e-3])
def test_a_gradient_may_go_over_its_logits(machine: str, apart: float) -> None:
    """In any regime, and where student and teacher are so close that a row is read once more."""
    from kdfast.kernels import kl as kernels

    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(3, 32_000, generator=generator)
    student = teacher + apart * torch.randn(3, 32_000, generator=generator)
    inputs = student.double().requires_grad_()
    with kdfast.use_backend("reference"):
        kd_kl_div(inputs, teacher.double(), 2.0, reduction="sum").backward()
    with use_machine(machine):
        scale, wanted = kernels.Scale(2.0, 1.0, None, None), kernels.Wanted(True, True)
        kernels.PLAIN((student, teacher), (student, None), 1, scale, wanted)
    assert inputs.grad is not None
    size = float(inputs.grad.abs().max())
    assert_verbose_allclose(student / size, inputs.grad / size, rtol=1e-4, atol=1e-4)


def test_a_machine_is_chosen_for_a_block_or_a_process() -> None:
    cpu = torch.device("cpu")
    before = machine_of(cpu)
    with use_machine("90:132:3.6") as machine:
        assert machine_of(cpu) == machine == Machine(90, 132, (3, 6))
        assert triton_version() == (3, 6)
    assert machine_of(cpu) == before
    told = subprocess.run(
        [
            sys.executable,
            "-c",
            "import torch; from kdfast.kernels.machine import machine_of; print(machine_of(torch.device('cpu')))",
        ],
        env={**os.environ, "KDFAST_MACHINE": "100:148"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "capability=100, multiprocessors=148" in told.stdout


@pytest.mark.parametrize("text", ["h100", "90", "90:0", "90:132:3", "90:-1"])
def test_another_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="KDFAST_MACHINE: got"), use_machine(text):
        pass


def test_machines_are_values() -> None:
    assert dataclasses.replace(Machine.parse("90:132"), multiprocessors=108) != Machine.parse("90:132")

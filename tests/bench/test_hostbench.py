"""Launches and Python calls of a call are counted, which no busy machine changes; and a launch that is run directly is
the one that Triton would have made.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.conftest import INTERPRETING

pytest.importorskip("triton")
if INTERPRETING:
    pytest.skip("measures compiled launches", allow_module_level=True)

from triton import knobs

from bench.hostbench import Silent, pretended, python_calls
from bench.hostcases import CASES
from kdfast import functional as F
from kdfast.kernels import kl as kernels
from kdfast.kernels import launch as launching

#: Functions of kdfast's that a call may enter: a few more than it does.
PYTHON_CALLS = {
    "kd_kl_div f+b": 22,
    "jsd_loss f+b": 23,
    "dkd_loss f+b": 25,
    "kd_kl_div without grad": 15,
    "kd_statistics": 12,
    "distillation_loss f+b": 27,
    "denoise_step, guided": 25,
    "DDIMScheduler.step_cfg": 44,
    "replay.sample": 21,
    "replay.update_priority": 22,
    "noise_mix f+b": 24,
    "noise_mse f+b": 20,
    "bn_relu f+b": 48,
    "bn_mse f+b": 42,
    "bn_ddim_step f+b": 50,
    "reparam_middle_loss f+b": 30,
    "bn_statistics_loss f+b": 30,
    "dist_loss f+b": 45,
    "divergence_loss forward_kl f+b": 24,
    "divergence_loss reverse_kl f+b": 24,
    "divergence_loss alpha f+b": 24,
    "divergence_loss, T of the teacher f+b": 24,
    "topk_kd_loss f+b": 24,
    "fused_linear_kd_loss f+b": 101,
    "fused_linear_kd_loss reverse_kl f+b": 101,
    "crop_flip_normalize": 39,
    "render_shaders": 23,
}


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_a_call_stays_within_its_launches_and_python_calls(case: Any) -> None:
    pytest.importorskip("kdfast._C", reason="without it keys and launches are Python's")
    with pretended():
        call = case.make()
        call()
        with launching.count_launches() as counts:
            call()
        assert 0 < sum(counts.values()) <= case.launches
        assert python_calls(call) <= PYTHON_CALLS[case.name]


def _arguments(student: torch.Tensor, teacher: torch.Tensor) -> tuple[Any, ...]:
    """What the launcher is given, after the compiled function; of tensors their shapes: memory is another each time."""
    F.kd_kl_div(student, teacher, 4.0)
    given = Silent.last()[:5] + Silent.last()[10:]
    return tuple(tuple(x.shape) if isinstance(x, torch.Tensor) else x for x in given)


@pytest.fixture(params=["extension", "python"])
def direct(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches by ``kdfast._C``, and as without it."""
    if request.param == "python":
        monkeypatch.setattr(launching, "extension", None)
    else:
        pytest.importorskip("kdfast._C")


@pytest.mark.usefixtures("direct")
@pytest.mark.parametrize("shape", [(8, 10), (3, 10, 4)])
def test_a_direct_launch_is_the_one_that_triton_would_make(shape: tuple[int, ...]) -> None:
    whole = torch.randn(*shape[:-1], shape[-1] + 4)
    with pretended():
        for student in (whole[..., :-4].contiguous(), whole[..., 1:-3], whole[..., :-4]):  # begins, strides
            by_triton = _arguments(student, student.clone())
            assert _arguments(student, student.clone()) == by_triton
            launching.forget()
            assert _arguments(student, student.clone()) == by_triton


@pytest.mark.usefixtures("direct")
def test_hooks_of_profilers_are_called_and_knobs_are_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher, heard = torch.randn(4, 6), torch.randn(4, 6), []
    with pretended():
        for _ in range(2):
            F.kd_kl_div(student, teacher)
        assert Silent.last()[7:10] == (None, None, None)
        knobs.runtime.launch_enter_hook.add(heard.append)
        try:
            F.kd_kl_div(student, teacher)
            assert Silent.last()[7].get()["name"] == "kd_kl_tile_kernel"
            assert Silent.last()[8] is knobs.runtime.launch_enter_hook
        finally:
            knobs.runtime.launch_enter_hook.calls.clear()
        family = next(iter(kernels.PLAIN.kept.values())).launch
        compiled = family._ready.compiled
        monkeypatch.setattr(knobs.runtime, "debug", True)
        F.kd_kl_div(student, teacher)  # compiled anew, with assertions
        assert family._ready.compiled is not compiled


def test_what_is_kept_is_bounded_and_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "MAX_KEPT", 3)
    with pretended():
        for rows in range(1, 7):
            F.kd_kl_div(torch.randn(rows, 6), torch.randn(rows, 6))
        assert len(kernels.PLAIN.kept) == 3
    assert not kernels.PLAIN.kept
    F.kd_kl_div(torch.randn(2, 6), torch.randn(2, 6))
    assert not kernels.PLAIN.kept  # nothing is launched for a CPU

"""Long rows by ticket: what is computed, that no order of programs changes it, and what the compiler makes of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kdfast.functional import kd_kl_div
from tests.conftest import INTERPRETING, Target
from tests.kernels.kl.test_kl import oracle, pair
from tests.support.conformance import assert_verbose_allclose

pytest.importorskip("triton")

from kdfast.kernels import kl
from kdfast.kernels.kl import launch as launching
from kdfast.kernels.kl import plan as planning
from kdfast.kernels.launch import count_launches
from kdfast.kernels.machine import Machine

KERNEL = "kd_kl_tickets_kernel"
TENSOR = torch.Tensor


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two multiprocessors without a cache: few rows of few parts take tickets, with a lag of a row."""
    monkeypatch.setattr(launching, "machine_of", lambda device: Machine(90, 2, (3, 6)))
    monkeypatch.setattr(planning, "CACHES", ((80, 0),))
    planning.kl_plan.cache_clear()
    yield
    planning.kl_plan.cache_clear()


def run(
    s: TENSOR, t: TENSOR, upstream: float = 1.0, dim: int = -1, **options: object
) -> tuple[TENSOR, TENSOR, TENSOR]:
    s, t = s.detach().requires_grad_(), t.detach().requires_grad_()
    with count_launches() as counts:
        loss = kd_kl_div(s, t, 2.0, reduction="sum", dim=dim, **options)  # type: ignore[arg-type]
        grads = torch.autograd.grad(loss, (s, t), torch.tensor(upstream, device=s.device))
    assert set(counts) == {KERNEL}
    return loss.detach(), *grads


#: Rows of a launch: far apart; KL too small for the first read's difference; nearly equal; masked, and NaN.
APART = torch.tensor([3.0, 0.2, 1e-3, 1.0, 0.1])[:, None]


def rows(num_classes: int, dtype: torch.dtype) -> tuple[TENSOR, TENSOR]:
    t, noise = pair(len(APART), num_classes)
    s = t + APART * noise
    s[:, 7] = t[:, 7] = float("-inf")
    s[0, -300:] = float("-inf")  # here the student has a class fewer than the teacher
    t[0, -300:] = float("-inf")
    s[3, 5] = t[3, 9000] = float("nan")
    return s.to(dtype), t.to(dtype)


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(
    ("num_classes", "dtype"),
    [(20_001, torch.float32), (17_408, torch.bfloat16)],  # narrow loads and a ragged part; wide loads
)
def test_tickets_compute_the_definition(target: Target, num_classes: int, dtype: torch.dtype) -> None:
    if target.backend == "reference":
        pytest.skip("tickets belong to kernels")
    s, t = rows(num_classes, dtype)
    weight, mask = torch.linspace(0.5, 2, len(s)), torch.tensor([True, True, True, False, True])
    exact = [x.double().masked_fill(x.isnan(), 0).clamp_min(-1e5).requires_grad_() for x in (s, t)]
    want = oracle(*exact, 2.0, reduction="sum", row_weight=weight.double(), mask=mask)
    want_grads = torch.autograd.grad(want, exact)
    options = {"row_weight": weight.to(target.device), "mask": mask.to(target.device)}
    tolerance = 1e-4 if dtype == torch.float32 else 1.6e-2
    for upstream in (1.0, 1.5):
        loss, *grads = run(s.to(target.device), t.to(target.device), upstream, **options)
        assert_verbose_allclose(loss, want, rtol=2e-5, atol=1e-9)
        for got, exactly in zip(grads, want_grads, strict=True):
            assert bool((got[3] == 0).all())
            for row in (0, 1, 2, 4):
                size = float(exactly[row].abs().max())
                assert_verbose_allclose(
                    got[row] / size, upstream * exactly[row] / size, rtol=tolerance, atol=tolerance
                )


@pytest.mark.usefixtures("few")
def test_a_loss_alone_reads_its_rows_once(target: Target) -> None:
    if target.backend == "reference":
        pytest.skip("tickets belong to kernels")
    s, t = (x[:3].to(target.device) for x in rows(17_408, torch.bfloat16))
    with count_launches() as counts:
        kd_kl_div(s, t, 2.0, reduction="sum")
    assert set(counts) == {"kd_kl_two_pass_kernel"}


@pytest.mark.usefixtures("few")
def test_each_row_has_its_loss(target: Target) -> None:
    if target.backend == "reference":
        pytest.skip("tickets belong to kernels")
    s, t = rows(20_001, torch.float32)
    scale, wanted = kl.Scale(2.0, 1.0, None, None), kl.Wanted(True, False)
    given = s.to(target.device), t.to(target.device)
    got = kl.PLAIN(given, (torch.empty_like(given[0]), None), 1, scale, wanted)
    want = oracle(s.double().clamp_min(-1e5), t.double().clamp_min(-1e5), 2.0, reduction="none")
    assert bool(got[3].isnan())
    for row in (0, 1, 2, 4):
        assert_verbose_allclose(got[row], want[row], rtol=2e-5, atol=1e-9)


@pytest.mark.usefixtures("few")
def test_a_gradient_may_go_over_its_logits(target: Target) -> None:
    """No program reads what another has written, also where a row is read once more."""
    if target.backend == "reference":
        pytest.skip("tickets belong to kernels")
    s, t = (x[:3].to(target.device) for x in rows(17_408, torch.bfloat16))
    _, want, _ = run(s, t)
    scale, wanted = kl.Scale(2.0, 1.0, None, None), kl.Wanted(False, True)
    kl.PLAIN((s, t), (s, None), 1, scale, wanted)
    assert_verbose_allclose(s, want, rtol=1e-2, atol=1e-9)


@pytest.mark.interpreter
@pytest.mark.skipif(not INTERPRETING, reason="a GPU's order of programs is its own")
@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("most", [32, 1], ids=["as many programs as items", "two programs"])
def test_no_order_of_programs_changes_a_bit(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    from triton.runtime import interpreter

    import kdfast

    kdfast.set_backend("triton")
    s, t = rows(17_408, torch.bfloat16)
    s, t = s[:3], t[:3]
    first = run(s, t)
    monkeypatch.setattr(launching, "TICKET_PROGRAMS", most)
    begun: list[int] = []
    plain = interpreter.interpreter_builder.set_grid_idx

    def backwards(x: int, y: int, z: int) -> None:
        begun.append(interpreter.interpreter_builder.grid_dim[0] - 1 - x)
        plain(begun[-1], y, z)

    monkeypatch.setattr(interpreter.interpreter_builder, "set_grid_idx", backwards)
    for one, other in zip(first, run(s, t), strict=True):
        assert torch.equal(one, other)
    programs = (3 + 1) * 2 if most == 32 else 2
    assert begun[:programs] == list(range(programs))[::-1]


@pytest.mark.usefixtures("few")
def test_classes_may_lie_across(target: Target) -> None:
    if target.backend == "reference":
        pytest.skip("tickets belong to kernels")
    s, t = (x[[0, 1, 2, 4]].to(target.device) for x in rows(17_408, torch.bfloat16))
    plain = run(s, t)
    across = run(*(x.view(2, 2, -1).transpose(1, 2).contiguous() for x in (s, t)), dim=1)
    assert_verbose_allclose(across[0], plain[0], rtol=1e-5, atol=1e-9)
    for one, other in zip(across[1:], plain[1:], strict=True):
        size = float(other.abs().max())
        got = one.transpose(1, 2).reshape(other.shape) / size
        assert_verbose_allclose(got, other / size, rtol=1e-2, atol=1e-3)

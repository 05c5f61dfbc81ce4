"""Which launch plan each shape takes, and that each plan computes what the definition says."""

from __future__ import annotations

import math

import pytest
import torch

from kdfast.functional import kd_kl_div
from tests.conftest import INTERPRETING, Target
from tests.kernels.kl.test_kl import oracle, pair
from tests.support.conformance import assert_verbose_allclose

triton = pytest.importorskip("triton")

from kdfast.kernels.kl import launch as launching  # noqa: E402
from kdfast.kernels.kl import plan as planning  # noqa: E402
from kdfast.kernels.kl.plan import kl_plan  # noqa: E402
from kdfast.kernels.machine import Machine, machine_of  # noqa: E402

H100 = Machine(90, 132, (3, 8))
H100_36 = Machine(90, 132, (3, 6))
A100 = Machine(80, 108, (3, 8))


@pytest.mark.parametrize(
    "num_classes, inner, class_stride, itemsize, options, regime",
    [
        (10, 1, 1, 4, {}, "rows"),  # CIFAR-10
        (1000, 1, 1, 2, {}, "rows"),  # ImageNet
        (16384, 1, 1, 2, {}, "rows"),  # the longest row one program holds
        (19, 512, 512, 4, {}, "class_tuple"),  # Cityscapes
        (40, 512, 512, 2, {}, "class_tuple"),  # NYUv2
        (150, 512, 512, 4, {}, "classes"),  # ADE20K: a tuple would not fit in registers
        (19, 512, 512, 4, {"plain": False}, "classes"),
        (1271, 1, 1, 2, {"unaligned": True}, "chunks"),
        (19, 1, 1, 2, {"unaligned": True}, "rows"),  # too short for a window
        (1271, 1, 1, 2, {"unaligned": True, "plain": False}, "rows"),
        (32000, 1, 1, 2, {}, "cluster"),
        (128256, 1, 1, 2, {}, "cluster"),
        (65536, 1, 1, 2, {"both": True}, "cluster"),
        (128256, 1, 1, 2, {"both": True}, "tickets"),  # would take a cluster of 16, which is not portable
        (128256, 1, 1, 2, {"num_rows": 8}, "split"),  # clusters pay where rows fill the machine
        (128256, 1, 1, 2, {"num_rows": 8, "machine": A100}, "split"),
        (128256, 1, 1, 2, {"num_rows": 8, "plain": False}, "two_pass"),
        (128256, 1, 1, 2, {"plain": False}, "two_pass"),
        (128256, 1, 1, 2, {"machine": A100}, "tickets"),
        (128256, 1, 1, 2, {"machine": H100_36}, "tickets"),  # clusters do not compile there
        (128256, 1, 1, 2, {"machine": H100_36, "in_place": True, "num_rows": 8}, "tickets"),
        (32000, 1, 1, 2, {"machine": H100_36}, "two_pass"),  # 264 of them are 34 MB: in the cache
        (32000, 1, 1, 4, {"machine": H100_36}, "two_pass"),
        (65536, 1, 1, 2, {"machine": A100}, "two_pass"),
        (151936, 1, 1, 2, {}, "tickets"),  # outgrows a cluster of 8
        (151936, 1, 1, 2, {"machine": Machine(0, 304, (3, 8))}, "two_pass"),  # ROCm: no such cache is known
    ],
)
def test_regime_of_a_shape(
    num_classes: int, inner: int, class_stride: int, itemsize: int, options: dict, regime: str
) -> None:
    plan = kl_plan(
        num_classes, inner, class_stride, itemsize, **{"num_rows": 4096, "machine": H100, **options}
    )
    assert plan.regime == regime
    assert (plan.num_ctas > 1) == (regime == "cluster")


def test_triton_3_6_takes_its_own_tile_order() -> None:
    orders = [
        kl_plan(100, 1, 1, 4, num_rows=4096, machine=Machine(90, 132, version)).layout
        for version in ((3, 6), (3, 8))
    ]
    assert orders == [planning.ROW_CHUNK_LANE, planning.CHUNK_ROW_LANE]


@pytest.fixture
def regimes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The regimes that launches took."""
    taken: list[str] = []

    def spy(*args: object, **kwargs: object) -> object:
        plan = kl_plan(*args, **kwargs)  # type: ignore[arg-type]
        taken.append(plan.regime)
        return plan

    monkeypatch.setattr(launching, "kl_plan", spy)
    return taken


@pytest.mark.parametrize(
    "shape, dim, dtype, regime",
    [
        ((2, 5, 3, 5), 1, torch.float32, "class_tuple"),
        ((1, 40, 2, 3), 1, torch.bfloat16, "class_tuple"),
        ((2, 41, 2, 3), 1, torch.float32, "classes"),
        ((5, 1271), -1, torch.bfloat16, "chunks"),  # shifts 0, 7, 6, 5, 4; 5 rows in programs of 4
        ((3, 519), -1, torch.float32, "chunks"),  # shifts 0, 3, 2
        ((3, 4001), -1, torch.float32, "chunks"),  # one row a program
        ((2, 20_001), -1, torch.float32, "split"),  # three parts with classes, one without
        ((2, 20_001), -1, torch.float32, "two_pass"),
    ],
)
@pytest.mark.parametrize("apart", [3.0, 1e-3])
def test_a_plan_computes_the_definition(
    target: Target,
    regimes: list[str],
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, ...],
    dim: int,
    dtype: torch.dtype,
    regime: str,
    apart: float,
) -> None:
    """Far apart and nearly equal, both gradients, with a mask, weights and a class that is absent."""
    if target.backend == "reference":
        pytest.skip("plans belong to kernels")
    if regime == "split":
        monkeypatch.setattr(launching, "machine_of", lambda device: A100)
    elif machine_of(torch.device(target.device)).multiprocessors > shape[0] and regime == "two_pass":
        pytest.skip("this machine splits so few rows")
    dim %= len(shape)
    rows = shape[:dim] + shape[dim + 1 :]
    t, noise = pair(*shape)
    s = (t + apart * noise).to(dtype)
    t = t.to(dtype)
    t.select(dim, 2).fill_(-1e4)
    s.select(dim, 2).fill_(-1e4)
    weight = torch.linspace(0.5, 2, math.prod(rows)).view(rows)
    mask = weight < 1.9
    inputs = [x.to(target.device).requires_grad_() for x in (s, t)]
    options = {"dim": dim, "reduction": "sum"}
    loss = kd_kl_div(
        *inputs, 2.0, row_weight=weight.to(target.device), mask=mask.to(target.device), **options
    )
    hidden = torch.autograd.grad(loss, inputs, torch.tensor(1.5, device=target.device), retain_graph=True)
    unit = torch.autograd.grad(loss, inputs)
    exact = [x.detach().double().requires_grad_() for x in (s, t)]
    want = oracle(*exact, 2.0, row_weight=weight.double(), mask=mask, **options)
    want_grads = torch.autograd.grad(want, exact)
    assert set(regimes) == {regime}
    assert_verbose_allclose(loss, want, rtol=2e-4, atol=1e-9)
    tolerance = 1e-4 if dtype == torch.float32 else 1.6e-2
    for scaled, plain, exactly in zip(hidden, unit, want_grads, strict=True):
        size = float(exactly.abs().max())
        assert_verbose_allclose(plain / size, exactly / size, rtol=tolerance, atol=tolerance)
        assert_verbose_allclose(scaled / size, 1.5 * exactly / size, rtol=tolerance, atol=tolerance)


@pytest.mark.interpreter
@pytest.mark.skipif(not INTERPRETING, reason="host memory is what the interpreter reads")
def test_a_window_leaves_the_neighbouring_rows_alone(regimes: list[str]) -> None:
    """Shared 16-byte groups: NaN in the next row may not reach this one, nor its gradient the next."""
    import kdfast

    kdfast.set_backend("triton")
    s, t = pair(4, 517)
    s[1] = t[1] = float("nan")
    s, t = s.requires_grad_(), t.requires_grad_()
    mask = torch.tensor([True, False, True, True])
    kd_kl_div(s, t, reduction="sum", mask=mask).backward()
    assert set(regimes) == {"chunks"}
    assert s.grad is not None
    assert s.grad.isfinite().all()
    assert bool((s.grad[1] == 0).all())
    assert bool((s.grad[[0, 2, 3]] != 0).any(dim=1).all())

"""The grids of other libraries' own suites, as parameters here, with float64 oracles.

Liger-Kernel 0.8 (test_kl_div, test_jsd, test_fused_linear_jsd) and TRL 1.16 (generalized_jsd_loss): their vocabularies,
dtypes, betas, temperatures and ignored labels. Rows do not know of each other, so there are fewer of them.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kdfast.adapters import generalized_jsd_loss
from kdfast.functional import divergence_loss, fused_linear_kd_loss, jsd_loss, kd_kl_div
from tests.conftest import Target

DTYPES = [(torch.float32, 2e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)]
#: Rows for (2, 4096, 32000), (1, 4096, 128256) and the odd (41, 401, 1271).
SHAPES = [*(pytest.param(*shape, marks=pytest.mark.slow) for shape in [(2, 32000), (1, 128_256)]), (41, 1271)]
BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]


def drawn(rows: int, classes: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(42)
    return tuple(
        torch.randn(rows, classes, generator=generator).log_softmax(-1).to(dtype).to(device) for _ in range(2)
    )  # type: ignore[return-value]


def jsd64(s: torch.Tensor, t: torch.Tensor, beta: float) -> torch.Tensor:
    """A value a row, from logits in float64; the KL divergences at the ends."""
    q, p = s.log_softmax(-1), t.log_softmax(-1)
    if beta in (0.0, 1.0):
        first, second = (q, p) if beta == 0.0 else (p, q)
        return F.kl_div(first, second, reduction="none", log_target=True).sum(-1)
    m = torch.logaddexp(p + math.log(beta), q + math.log(1 - beta))
    parts = (F.kl_div(m, x, reduction="none", log_target=True).sum(-1) for x in (p, q))
    return beta * next(parts) + (1 - beta) * next(parts)


def close(got: torch.Tensor, want: torch.Tensor, share: float) -> None:
    """To a share of the largest, which is what is left of an element among many."""
    limit = share * float(want.detach().abs().max())
    assert float((got.detach().double().cpu() - want.detach()).abs().max()) <= limit


@pytest.mark.parametrize("dtype, share", DTYPES)
@pytest.mark.parametrize("rows, classes", SHAPES)
@pytest.mark.parametrize("upstream", [1.0, 2.0], ids=["last", "not last"])
def test_ligers_kl_grid(
    target: Target, rows: int, classes: int, dtype: torch.dtype, share: float, upstream: float
) -> None:
    s, t = drawn(rows, classes, dtype, target.device)
    s.requires_grad_()
    loss = kd_kl_div(s, t) * upstream
    wide = s.detach().double().cpu().requires_grad_()
    want = jsd64(wide, t.double().cpu(), 0.0).mean() * upstream
    close(loss, want, share)
    close(torch.autograd.grad(loss, s)[0], torch.autograd.grad(want, wide)[0], share)


@pytest.mark.parametrize("dtype, share", DTYPES)
@pytest.mark.parametrize("rows, classes", SHAPES)
@pytest.mark.parametrize("beta", BETAS)
def test_ligers_jsd_grid(
    target: Target, rows: int, classes: int, beta: float, dtype: torch.dtype, share: float
) -> None:
    s, t = drawn(rows, classes, dtype, target.device)
    s.requires_grad_()
    loss = jsd_loss(s, t, beta=beta)
    wide = s.detach().double().cpu().requires_grad_()
    want = jsd64(wide, t.double().cpu(), beta).mean()
    close(loss, want, share)
    close(torch.autograd.grad(loss, s)[0], torch.autograd.grad(want, wide)[0], share)
    if beta == 0.5:  # symmetry
        torch.testing.assert_close(jsd_loss(t, s, beta=0.5), loss, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("dtype, share", [(torch.float32, 1e-4), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize(
    "rows, hidden, classes, scalar",
    [
        pytest.param(6, 1024, 4096, 1.0, marks=pytest.mark.slow),
        (5, 167, 1423, 1.0),
        (4, 8, 8, 0.5),
        pytest.param(63, 41, 41, 0.5, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("temperature, beta", [(1.0, 0.5), (2.0, 0.1), (1.0, 0.0), (1.0, 1.0)])
@pytest.mark.parametrize("ignored", ["none", "some", "all"])
def test_ligers_fused_linear_jsd_grid(
    target: Target, rows: int, hidden: int, classes: int, scalar: float, temperature: float, beta: float,
    ignored: str, dtype: torch.dtype, share: float,
) -> None:  # fmt: skip
    """Liger has no factor T²; its mean is over the labels that count."""
    generator = torch.Generator().manual_seed(42)

    def draw(*size: int, by: float = 1.0) -> torch.Tensor:
        return (by * torch.rand(size, generator=generator)).to(dtype).to(target.device)

    x, w = draw(rows, hidden // 2, by=scalar).requires_grad_(), draw(classes, hidden // 2).requires_grad_()
    y, u = draw(rows, hidden, by=scalar), draw(classes, hidden)
    counts = torch.ones(rows, dtype=torch.bool)
    if ignored != "none":
        counts = torch.rand(rows, generator=generator) > (0.4 if ignored == "some" else 2.0)
    loss = fused_linear_kd_loss(
        x, w, y, u, kind="jsd", beta=beta, temperature=temperature, mask=counts.to(target.device), reduction="rowmean",
        chunk_rows=4,
    ) / temperature**2  # fmt: skip
    grads = torch.autograd.grad(loss, (x, w))
    wide = [z.detach().double().cpu().requires_grad_() for z in (x, w)]
    s = wide[0] @ wide[1].T / temperature
    t = y.double().cpu() @ u.double().cpu().T / temperature
    want = jsd64(s, t, beta)[counts].sum() / max(1, int(counts.sum()))
    close(loss, want, share)
    # A logit is a product of `hidden` terms in float32, of which a gradient keeps the absolute error: with logits of
    # 256, 2.0e-4 at most over five seeds, without AVX, with AVX2 and with AVX-512, which add in other orders.
    rounding = float(t.abs().max()) * 2**-24 * math.sqrt(hidden)
    for got, exact in zip(grads, torch.autograd.grad(want, wide), strict=True):
        close(got, exact, max(share, rounding))


UNIFORM = torch.full((1, 1, 3), 1 / 3).log()
PEAKED = torch.log(torch.tensor([[[0.9, 0.05, 0.05]]]))


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("kind", ["uniform", "identical"])
def test_trls_losses_of_equal_distributions_are_zero(target: Target, beta: float, kind: str) -> None:
    given = (UNIFORM if kind == "uniform" else PEAKED).to(target.device)
    assert generalized_jsd_loss(given, given.clone(), beta=beta).abs() < 1e-9


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean"])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("labelled", [False, True])
def test_trls_generalized_jsd_grid(
    target: Target, beta: float, temperature: float, reduction: Any, labelled: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    s, t = (torch.randn(2, 3, 5, generator=generator) for _ in range(2))
    labels = torch.tensor([[-100, 1, 2], [3, -100, -100]]) if labelled else None
    got = generalized_jsd_loss(
        s.to(target.device), t.to(target.device), None if labels is None else labels.to(target.device), beta,
        temperature, reduction,
    )  # fmt: skip
    rows = jsd64(s.double() / temperature, t.double() / temperature, beta)
    rows = rows if labels is None else rows[labels != -100]
    count = {"sum": 1, "mean": rows.numel() * 5, "batchmean": len(rows)}[reduction]
    torch.testing.assert_close(got.double().cpu(), rows.sum() / count, rtol=1e-5, atol=1e-8)


def test_trls_temperature_softens_and_half_is_symmetric(target: Target) -> None:
    """test_temperature_scaling and test_symmetry of its suite."""
    s, t = UNIFORM.to(target.device), PEAKED.to(target.device)
    losses = [generalized_jsd_loss(s, t, temperature=x) for x in (1.0, 2.0, 4.0)]
    assert losses[0] > losses[1] > losses[2] > 0
    torch.testing.assert_close(generalized_jsd_loss(s, t, beta=0.5), generalized_jsd_loss(t, s, beta=0.5))
    assert not torch.isclose(generalized_jsd_loss(s, t, beta=0.1), generalized_jsd_loss(t, s, beta=0.1))


@pytest.mark.parametrize(
    "kind", ["forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "triangular", "ab"]
)
@pytest.mark.parametrize("rows, classes", [(2, 32000), (41, 1271)])
def test_the_other_kinds_on_the_same_grid(target: Target, kind: Any, rows: int, classes: int) -> None:
    """DistillKit's and orda-kernel's kinds, at α = β = ½, from the same draws."""
    s, t = drawn(rows, classes, torch.float32, target.device)
    q, p = (x.double().cpu().log_softmax(-1) for x in (s, t))
    mixed = (0.5 * p.exp() + 0.5 * q.exp()).log()

    def to(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a.exp() * (a - b)).sum(-1).mean()

    want = {
        "forward_kl": to(p, q),
        "reverse_kl": to(q, p),
        "jsd": (to(p, mixed) + to(q, mixed)) / 2,
        "skew_forward_kl": to(p, mixed),
        "skew_reverse_kl": to(q, mixed),
        "triangular": 2 * (1 - (p + q - mixed).exp().sum(-1)).mean(),
        "ab": 4 * (1 - ((p + q) / 2).exp().sum(-1)).mean(),  # four times the squared Hellinger distance
    }[kind]
    torch.testing.assert_close(divergence_loss(s, t, kind=kind).double().cpu(), want, rtol=1e-5, atol=1e-9)

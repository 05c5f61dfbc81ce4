"""Every loss of logits on edge inputs: both backends give the same, NaN included; and what autograd may hand them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import kdfast
from kdfast.functional import (
    dist_loss,
    distillation_loss,
    divergence_loss,
    dkd_loss,
    fused_linear_kd_loss,
    jsd_loss,
    kd_kl_div,
    topk_kd_loss,
)
from kdfast.functional.divergence import Kind
from tests.conftest import INTERPRETING, Target

# All that have bodies of their own; the other two are tested by kd_kl_div and jsd_loss.
KINDS = tuple(kind for kind in get_args(Kind) if kind not in ("forward_kl", "jsd"))
REDUCTIONS = ("batchmean", "mean", "sum", "rowmean", "none")
SHAPES = [(0, 5), (1, 5), (3, 1), (4, 7), (2, 33), (2, 0, 4)]

Loss = Callable[..., torch.Tensor]


def _labelled(
    loss: Loss, s: torch.Tensor, t: torch.Tensor, target: torch.Tensor, **options: Any
) -> torch.Tensor:
    return loss(s, t, target, **options)


def _plain(
    loss: Loss, s: torch.Tensor, t: torch.Tensor, target: torch.Tensor, **options: Any
) -> torch.Tensor:
    return loss(s, t, **options)


def _topk(
    s: torch.Tensor, t: torch.Tensor, target: torch.Tensor, temperature: float, known: bool, **options: Any
) -> torch.Tensor:
    """Indices as a server may give them: the label too, which may be there already; padded."""
    k = min(3, s.shape[-1])
    at = t.nan_to_num(0.0).topk(k, -1).indices
    kept = t.gather(-1, at)
    own = target.clamp(min=-1)
    at = torch.cat([at, own[..., None]], -1)
    kept = torch.cat([kept, t.gather(-1, own.clamp(min=0)[..., None])], -1)
    if known:
        options["log_normalizer"] = torch.logsumexp(t.float() / temperature, -1)
    return topk_kd_loss(s, at, kept, temperature=temperature, **options)


def _linear(s: torch.Tensor, t: torch.Tensor, target: torch.Tensor, **options: Any) -> torch.Tensor:
    one = torch.eye(s.shape[-1])
    return fused_linear_kd_loss(s, one, t, one, chunk_rows=2, **options)


def _complete(
    kind: str, s: torch.Tensor, t: torch.Tensor, target: torch.Tensor, **options: Any
) -> torch.Tensor:
    one = torch.eye(s.shape[-1])
    labels = {"target": target, "ce_weight": 0.5, "label_smoothing": 0.1}
    return fused_linear_kd_loss(s, one, teacher_logits=t, kind=kind, chunk_rows=2, **labels, **options)  # type: ignore[arg-type]


def _dist(
    s: torch.Tensor, t: torch.Tensor, target: torch.Tensor, temperature: float, **_: Any
) -> torch.Tensor:
    return dist_loss(s, t, temperature=temperature)


LOSSES: dict[str, Any] = {
    "kd_kl_div": partial(_plain, kd_kl_div),
    "distillation": partial(_labelled, partial(distillation_loss, ce_weight=0.5, label_smoothing=0.1)),
    "jsd": partial(_plain, partial(jsd_loss, beta=0.3)),
    "dkd": partial(_labelled, dkd_loss),
    "dist": _dist,
    "topk": partial(_topk, known=False),
    "topk_normalizer": partial(_topk, known=True),
    "topk_renormalize": partial(_topk, known=False, tail="renormalize"),
    "linear": _linear,
    "linear_complete": partial(_complete, "forward_kl"),
    "linear_jeffreys": partial(_complete, "jeffreys"),
    **{kind: partial(_plain, partial(divergence_loss, kind=kind, alpha=0.3)) for kind in KINDS},
}


def _holes(generator: torch.Generator, shape: tuple[int, ...], share: float) -> torch.Tensor:
    return torch.rand(shape, generator=generator) < share


def edge_case(name: str, seed: int) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]] | None:
    """Random logits, labels and options; None where the loss refuses them."""
    generator = torch.Generator().manual_seed(seed)

    def pick(values: Any) -> Any:
        return values[int(torch.randint(len(values), (), generator=generator))]

    shape = pick(SHAPES)
    s, t = (3 * torch.randn(shape, generator=generator) for _ in range(2))
    kind = pick(["plain", "huge", "equal", "-inf teacher", "-inf student", "-inf both", "NaN s", "NaN t"])
    if kind == "huge":
        s, t = (torch.where(_holes(generator, shape, 0.4), 1e4 * x.sign(), x) for x in (s, t))
    elif kind == "equal":
        t = s.clone()
    elif kind.startswith("-inf"):
        hole = _holes(generator, shape, 0.3)
        hole[..., :1] = False  # a row without any class is NaN in some formulas of torch's and 0 in others
        s = s.masked_fill(hole, -math.inf) if kind != "-inf teacher" else s
        t = t.masked_fill(hole, -math.inf) if kind != "-inf student" else t
    elif kind.startswith("NaN"):
        bad = s if kind == "NaN s" else t
        bad.masked_fill_(_holes(generator, shape, 0.1), math.nan)
    target = torch.randint(shape[-1], shape[:-1], generator=generator)
    target = target.masked_fill(_holes(generator, shape[:-1], pick([0.0, 0.3, 1.1])), -100)
    # A class that only the student rules out is infinitely far; whether a probability that underflows meets it there is
    # a matter of rounding.
    options: dict[str, Any] = {
        "temperature": pick([0.05, 1.0, 4.0] if kind != "-inf student" else [1.0, 4.0])
    }
    options["reduction"] = pick(REDUCTIONS if not name.startswith("linear") else REDUCTIONS[:-1])
    if pick([True, False]):
        options["mask"] = ~_holes(generator, shape[:-1], pick([0.4, 1.1]))
    if pick([True, False]):
        options["row_weight"] = torch.rand(shape[:-1], generator=generator)
    if name == "dkd" and shape[-1] < 2:
        return None
    if name == "dist" and (0 in shape or kind == "huge"):
        return None
    if name.startswith("linear") and kind not in ("plain", "equal"):
        return None  # a product with a NaN or an infinity spreads it over its row in an order of its own
    return (s, t, target), options


@pytest.mark.skipif(not INTERPRETING, reason="both backends on the CPU: in the interpreter")
@pytest.mark.interpreter
@pytest.mark.parametrize("name", LOSSES)
def test_backends_agree_on_edges(name: str) -> None:
    """The value, and where it is finite the student's gradient."""
    seen = 0
    for seed in range(60):
        case = edge_case(name, seed)
        if case is None:
            continue
        (s, t, target), options = case
        found = []
        for backend in ("reference", "triton"):
            leaf = s.clone().requires_grad_()
            with kdfast.use_backend(backend):  # type: ignore[arg-type]
                loss = LOSSES[name](leaf, t, target, **options)
            finite = bool(loss.isfinite().all())
            found.append((loss, torch.autograd.grad(loss.sum(), leaf)[0] if finite else loss))
        said = f"seed {seed}: {tuple(s.shape)}, {options}\nstudent {s}\nteacher {t}\ntarget {target}\n"
        for want, got in zip(*found, strict=True):
            scale = float(want.detach().nan_to_num(0.0, 0.0, 0.0).abs().max()) if want.numel() else 0.0
            torch.testing.assert_close(
                got,
                want,
                rtol=2e-3,
                atol=1e-5 + 2e-3 * scale,
                equal_nan=True,
                msg=lambda m, said=said: said + m,
            )
        seen += 1
    assert seen > 10


@pytest.mark.parametrize("name", LOSSES)
def test_a_teacher_of_inference_mode(target: Target, name: str) -> None:
    """As vLLM and others hand them over: plain torch takes such logits, too."""
    (s, t, labels), _ = edge_case("kd_kl_div", 0) or ((), {})
    generator = torch.Generator().manual_seed(1)
    s, t = (torch.randn(4, 7, generator=generator, device="cpu").to(target.device) for _ in range(2))
    labels = torch.tensor([0, 3, 2, 6], device=target.device)
    grads = []
    for _ in range(2):
        leaf = s.clone().requires_grad_()
        LOSSES[name](leaf, t, labels, temperature=2.0).backward()
        grads.append(leaf.grad)
        with torch.inference_mode():
            t = t * 1.0
    assert t.is_inference()
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("name", LOSSES)
def test_labels_masks_and_weights_of_inference_mode(target: Target, name: str) -> None:
    """As they come from a teacher: which tokens it is sure of, what it would have said."""
    generator = torch.Generator().manual_seed(1)
    s, t = (torch.randn(4, 7, generator=generator, device="cpu").to(target.device) for _ in range(2))
    labels = torch.tensor([0, 3, 2, 6], device=target.device)
    options = {"mask": labels != 2, "row_weight": labels.float() + 0.5}
    grads = []
    for _ in range(2):
        leaf = s.clone().requires_grad_()
        LOSSES[name](leaf, t, labels, temperature=2.0, **options).backward()
        grads.append(leaf.grad)
        with torch.inference_mode():
            labels, options = labels * 1, {key: value.clone() for key, value in options.items()}
    assert labels.is_inference()
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    "loss, torchs",
    [
        (kd_kl_div, lambda s, t: F.kl_div(F.log_softmax(s, -1), F.softmax(t, -1), reduction="batchmean")),
        (jsd_loss, None),
    ],
)
def test_the_mean_of_no_rows_is_torchs(target: Target, loss: Any, torchs: Any) -> None:
    s, t = torch.zeros(0, 5, device=target.device), torch.zeros(0, 5, device=target.device)
    assert loss(s, t).isnan()
    if torchs is not None:
        assert torchs(s, t).isnan()
    assert loss(s, t, reduction="sum") == 0
    assert loss(s, t, reduction="rowmean") == 0


def test_vmap_of_a_gradient_with_labels(target: Target) -> None:
    s, t = (torch.randn(3, 4, 5, device=target.device) for _ in range(2))
    y = torch.randint(5, (3, 4), device=target.device)

    def call(a: torch.Tensor, b: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss = distillation_loss(a, b, labels, temperature=2.0, ce_weight=0.5)
        return loss + dkd_loss(a, b, labels, temperature=2.0)

    got = torch.func.vmap(torch.func.grad(call))(s, t, y)
    want = torch.stack([torch.func.grad(call)(a, b, labels) for a, b, labels in zip(s, t, y, strict=True)])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(INTERPRETING, reason="traces of the reference")
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_and_fake_tensors_take_labels(mode: str) -> None:
    def call(a: torch.Tensor, b: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss = distillation_loss(a, b, labels, temperature=2.0, ce_weight=0.5)
        at = labels[:, None].expand(4, 2)
        return (
            loss + dkd_loss(a, b, labels, temperature=2.0) + topk_kd_loss(a, at, b[:, :2]) + kd_kl_div(a, b)
        )

    args = torch.randn(4, 5), torch.randn(4, 5), torch.randint(5, (4,))
    traced = make_fx(call, tracing_mode=mode)(*args)
    torch.testing.assert_close(traced(*args), call(*args), rtol=1e-5, atol=1e-6)
    with FakeTensorMode() as fake:
        assert call(*(fake.from_tensor(x) for x in args)).shape == ()


NUMBERS = [
    np.float32(2),
    np.float64(2),
    np.int64(2),
    np.array(2.0),
    torch.tensor(2.0),
    torch.tensor(2),
    2,
    2.0,
]


@pytest.mark.parametrize("two", NUMBERS, ids=lambda x: f"{type(x).__name__}-{getattr(x, 'dtype', '')}")
def test_whatever_is_a_number_is_taken(target: Target, two: Any) -> None:
    s, t = (torch.randn(3, 4, device=target.device) for _ in range(2))
    y = torch.tensor([0, 1, 2], device=target.device)
    torch.testing.assert_close(kd_kl_div(s, t, two), kd_kl_div(s, t, 2.0))
    got = distillation_loss(s, t, y, temperature=two, kd_weight=two, ce_weight=two)
    torch.testing.assert_close(got, distillation_loss(s, t, y, temperature=2.0, kd_weight=2.0, ce_weight=2.0))
    got = dkd_loss(s, t, y, alpha=two, beta=two, temperature=two)
    torch.testing.assert_close(got, dkd_loss(s, t, y, alpha=2.0, beta=2.0, temperature=2.0))


@pytest.mark.parametrize("wrong", ["2", True, None, np.bool_(True), torch.tensor(True), 2j])
def test_what_is_no_number_is_refused_by_name(wrong: Any) -> None:
    s, y = torch.randn(3, 4), torch.tensor([0, 1, 2])
    for options, name in [
        ({"temperature": wrong}, "temperature"),
        ({"temperature": 2.0, "alpha": wrong}, "alpha"),
    ]:
        with pytest.raises((TypeError, ValueError), match=rf"^{name}: got"):
            dkd_loss(s, s, y, **options)
    with pytest.raises((TypeError, ValueError), match=r"^kd_weight: got"):
        distillation_loss(s, s, temperature=2.0, kd_weight=wrong)


def test_a_factor_that_requires_grad_is_refused() -> None:
    s, y = torch.randn(3, 4), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match="alpha: got a tensor"):
        dkd_loss(s, s, y, alpha=torch.tensor(1.0, requires_grad=True))

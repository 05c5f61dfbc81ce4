"""fused_linear_kd_loss with every divergence, labels, teachers and caps: equal to the losses of the logits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kdfast.functional import divergence_loss, fused_linear_kd_loss
from kdfast.nn import FusedLinearKDLoss
from tests.conftest import INTERPRETING, Target
from tests.support.conformance import assert_verbose_allclose

ROWS, V = (2, 5), 24
KINDS: list[dict[str, Any]] = [
    {"kind": "forward_kl"},
    {"kind": "reverse_kl"},
    {"kind": "jeffreys"},
    {"kind": "jsd", "beta": 0.3},
    {"kind": "skew_forward_kl", "alpha": 0.1},
    {"kind": "skew_reverse_kl", "alpha": 0.1},
    {"kind": "total_variation"},
    {"kind": "alpha", "alpha": 0.4},
    {"kind": "triangular"},
    {"kind": "ab", "alpha": 0.3, "beta": 0.6},
    {"kind": "forward_kl", "teacher_temperature": 1.3},
]


def made(seed: int = 0, classes: int = V) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    target = torch.randint(classes, ROWS, generator=generator)
    target[0, 1] = target[1, 3] = -100
    return {
        "student_hidden": draw(*ROWS, 6),
        "student_weight": draw(classes, 6),
        "student_bias": draw(classes),
        "teacher_hidden": draw(*ROWS, 9),
        "teacher_weight": draw(classes, 9),
        "teacher_bias": draw(classes),
        "row_weight": torch.rand(ROWS, generator=generator) + 0.5,
        "mask": torch.rand(ROWS, generator=generator) > 0.3,
        "target": target,
    }


def divergence64(s: torch.Tensor, t: torch.Tensor, kind: str, beta: float, alpha: float) -> torch.Tensor:
    """Each row's divergence by its definition, from log-probabilities in float64."""
    p, q = t.exp(), s.exp()

    def to(a: torch.Tensor, log_a: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        return (a * (log_a - m.log())).sum(-1)

    mixed, both = beta * p + (1 - beta) * q, alpha + beta
    powers = (alpha * p**both + beta * q**both) / both
    return {
        "forward_kl": lambda: to(p, t, q),
        "reverse_kl": lambda: to(q, s, p),
        "jeffreys": lambda: to(p, t, q) + to(q, s, p),
        "jsd": lambda: beta * to(p, t, mixed) + (1 - beta) * to(q, s, mixed),
        "skew_forward_kl": lambda: to(p, t, alpha * p + (1 - alpha) * q),
        "skew_reverse_kl": lambda: to(q, s, (1 - alpha) * p + alpha * q),
        "total_variation": lambda: (p - q).abs().sum(-1) / 2,
        "alpha": lambda: ((p**alpha * q ** (1 - alpha)).sum(-1) - 1) / (alpha * (alpha - 1)),
        "triangular": lambda: ((p - q) ** 2 / (p + q)).sum(-1),
        "ab": lambda: (powers - p**alpha * q**beta).sum(-1) / (alpha * beta),
    }[kind]()


def oracle(
    x: dict[str, torch.Tensor],
    *,
    kind: str = "forward_kl",
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    beta: float = 0.5,
    alpha: float = 0.5,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    reduction: str = "batchmean",
) -> torch.Tensor:
    """All logits at once, in the tensors' own float64."""

    def logits(role: str, cap: float | None) -> torch.Tensor:
        out = F.linear(x[f"{role}_hidden"], x[f"{role}_weight"], x.get(f"{role}_bias"))
        return out if cap is None else cap * torch.tanh(out / cap)

    s = logits("student", softcap)
    total = s.new_zeros(ROWS)
    if kd_weight:
        t = x["teacher_logits"] if "teacher_logits" in x else logits("teacher", teacher_softcap)
        t = (t / (teacher_temperature or temperature)).log_softmax(-1)
        rows = divergence64((s / temperature).log_softmax(-1), t, kind, beta, alpha)
        total = kd_weight * temperature**2 * rows
    weight = x.get("row_weight", torch.ones(ROWS)).double()
    mask = x.get("mask", torch.ones(ROWS, dtype=torch.bool))
    sizes = {"batchmean": ROWS[0], "sum": 1, "mean": s.numel(), "rowmean": max(1, int(mask.sum()))}
    loss = torch.where(mask, total * weight, 0.0).sum() / sizes[reduction]
    if ce_weight:
        ce = F.cross_entropy(
            s.flatten(0, 1), x["target"].flatten(), reduction="none", label_smoothing=label_smoothing
        )
        counted = x["target"] != -100
        counted = counted & mask if reduction == "rowmean" else counted
        count = 1 if reduction == "sum" else max(1, int(counted.sum()))
        loss = loss + ce_weight * torch.where(mask, ce.view(ROWS) * weight, 0.0).sum() / count
    return loss


STUDENT = ("student_hidden", "student_weight", "student_bias")


def check(target: Target, x: dict[str, torch.Tensor], given: dict[str, Any], **options: Any) -> None:
    """Loss and gradients against the oracle, for several chunk sizes."""
    wide = {key: value.double() if value.is_floating_point() else value for key, value in x.items()}
    leaves = [wide[key].requires_grad_() for key in STUDENT]
    want = oracle(wide, **options)
    grads = torch.autograd.grad(want, leaves)
    for chunk_rows in (3, None):
        moved = {key: value.to(target.device) for key, value in (given or x).items()}
        own = [moved[key].requires_grad_() for key in STUDENT]
        loss = fused_linear_kd_loss(**moved, **options, chunk_rows=chunk_rows)
        assert_verbose_allclose(loss, want.float(), rtol=1e-4, atol=1e-5)
        for got, exact in zip(torch.autograd.grad(loss, own), grads, strict=True):
            assert_verbose_allclose(got, exact.float(), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("labels", [False, True], ids=["", "labels"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda o: "-".join(map(str, o.values())))
def test_every_kind_is_its_definition(target: Target, kind: dict[str, Any], labels: bool) -> None:
    x = made()
    options = {"temperature": 2.0, **kind}
    if labels:
        options |= {"ce_weight": 0.7, "kd_weight": 0.4, "label_smoothing": 0.1, "reduction": "rowmean"}
    else:
        x.pop("target")
    check(target, x, {}, **options)


@pytest.mark.parametrize("classes", [V, 19])
@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
def test_softcaps(target: Target, kind: str, classes: int) -> None:
    options = {"kind": kind, "softcap": 3.0, "teacher_softcap": 2.0, "ce_weight": 0.5, "reduction": "mean"}
    check(target, made(classes=classes), {}, **options)


@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean", "rowmean"])
def test_reductions_with_labels(target: Target, reduction: str) -> None:
    check(target, made(1), {}, ce_weight=0.7, temperature=1.5, reduction=reduction)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("ce_weight", [0.0, 0.5])
def test_precomputed_teacher_logits(target: Target, kind: str, ce_weight: float) -> None:
    x = made(2)
    for part in ("hidden", "weight", "bias"):
        x.pop(f"teacher_{part}")
    x["teacher_logits"] = torch.randn(*ROWS, V, generator=torch.Generator().manual_seed(9))
    check(target, x, {}, kind=kind, ce_weight=ce_weight)


@pytest.mark.parametrize("given", ["none", "the same", "detached"])
def test_a_tied_head_is_the_students_own_and_gets_the_students_gradient_alone(
    target: Target, given: str
) -> None:
    x = made(3)
    x["teacher_hidden"] = torch.randn(*ROWS, 6, generator=torch.Generator().manual_seed(4))
    x["teacher_weight"], x["teacher_bias"] = x["student_weight"].clone(), x["student_bias"].clone()
    wide = {key: value.double() if value.is_floating_point() else value for key, value in x.items()}
    leaves = [wide[key].requires_grad_() for key in STUDENT]
    want = torch.autograd.grad(oracle(wide), leaves)
    moved = {key: value.to(target.device) for key, value in x.items()}
    own = [moved[key].requires_grad_() for key in STUDENT]
    for part in ("weight", "bias"):
        moved.pop(f"teacher_{part}")
        if given != "none":
            tensor = moved[f"student_{part}"]
            moved[f"teacher_{part}"] = tensor if given == "the same" else tensor.detach()
    for got, exact in zip(torch.autograd.grad(fused_linear_kd_loss(**moved), own), want, strict=True):
        assert_verbose_allclose(got, exact.float(), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@pytest.mark.parametrize("ce_weight", [0.0, 0.5])
def test_a_stored_top_k_teacher(target: Target, tail: Any, ce_weight: float) -> None:
    from kdfast.functional import topk_kd_loss

    x = {key: value.to(target.device) for key, value in made(4).items() if not key.startswith("teacher")}
    x.pop("row_weight")
    t = torch.randn(*ROWS, V, generator=torch.Generator().manual_seed(5)).to(target.device)
    kept, index = t.topk(4, -1)
    stored = (index, kept) if tail == "renormalize" else (index, kept, t.div(2.0).logsumexp(-1))
    own = [x[key].requires_grad_() for key in STUDENT]
    logits = F.linear(*own)
    want = topk_kd_loss(logits, index, kept, temperature=2.0, tail=tail, mask=x["mask"], reduction="rowmean",
                        log_normalizer=None if tail == "renormalize" else stored[2])  # fmt: skip
    if ce_weight:
        counted = x["mask"] & (x["target"] != -100)
        want = want + ce_weight * F.cross_entropy(logits[counted], x["target"][counted])
    got = fused_linear_kd_loss(**x, teacher_topk=stored, tail=tail, temperature=2.0, ce_weight=ce_weight,
                               reduction="rowmean", chunk_rows=3)  # fmt: skip
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    for one, other in zip(torch.autograd.grad(got, own), torch.autograd.grad(want, own), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("teacher", [False, True])
def test_cross_entropy_alone(target: Target, teacher: bool) -> None:
    x = made(6)
    given = {key: value for key, value in x.items() if teacher or not key.startswith("teacher")}
    check(target, x, given, kd_weight=0.0, ce_weight=1.0, label_smoothing=0.2)


def test_rows_that_do_not_count_are_never_multiplied(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor may what they hold reach a gradient of the weight."""
    from kdfast.ops.linear import chunks as op

    seen: list[int] = []
    logits = op.Products.logits

    def counting(self: Any, hidden: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(len(hidden))
        return logits(self, hidden, *rest)

    monkeypatch.setattr(op.Products, "logits", counting)
    x = {key: value.to(target.device) for key, value in made(7).items()}
    x["student_hidden"][~x["mask"]] = math.nan
    x["teacher_hidden"][~x["mask"]] = math.inf
    own = [x[key].requires_grad_() for key in STUDENT]
    grads = torch.autograd.grad(fused_linear_kd_loss(**x, chunk_rows=2, ce_weight=1.0), own)
    assert sum(seen) == 2 * int(x["mask"].sum())
    assert all(grad.isfinite().all() for grad in grads)
    assert not grads[0][~x["mask"]].any()


@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean", "rowmean"])
@pytest.mark.parametrize("ce_weight", [0.0, 1.0])
@pytest.mark.parametrize("empty", ["no rows", "all masked"])
def test_nothing_to_compute_is_zero(target: Target, reduction: Any, ce_weight: float, empty: str) -> None:
    x = {key: value.to(target.device) for key, value in made().items()}
    if empty == "no rows":
        x = {key: value[:0] if value.shape[:2] == ROWS else value for key, value in x.items()}
    else:
        x["mask"] = torch.zeros_like(x["mask"])
    own = [x[key].requires_grad_() for key in STUDENT]
    loss = fused_linear_kd_loss(**x, reduction=reduction, ce_weight=ce_weight)
    assert loss == 0
    for grad, tensor in zip(torch.autograd.grad(loss, own), own, strict=True):
        assert torch.equal(grad, torch.zeros_like(tensor))


@pytest.mark.parametrize("kind", ["forward_kl", "jeffreys"])
def test_half_precision_weights(target: Target, kind: Any) -> None:
    """Their gradient is summed in float32 over the chunks, and rounded once."""
    x = made(8)
    x = {
        key: value.bfloat16() if key.endswith(("hidden", "weight", "bias")) else value
        for key, value in x.items()
    }
    x["row_weight"] = x["row_weight"].float()
    wide = {key: value.double() if value.is_floating_point() else value for key, value in x.items()}
    leaves = [wide[key].requires_grad_() for key in STUDENT]
    want = torch.autograd.grad(oracle(wide, kind=kind, ce_weight=0.5), leaves)
    moved = {key: value.to(target.device) for key, value in x.items()}
    own = [moved[key].requires_grad_() for key in STUDENT]
    loss = fused_linear_kd_loss(**moved, kind=kind, ce_weight=0.5, chunk_rows=1)
    for got, exact in zip(torch.autograd.grad(loss, own), want, strict=True):
        assert got.dtype == torch.bfloat16
        assert float((got.double().cpu() - exact).norm() / exact.norm()) < 4e-3


def test_a_second_backward_computes_anew(target: Target) -> None:
    """The first gives its memory away; a later one may not find it changed."""
    x = {key: value.to(target.device) for key, value in made().items()}
    own = [x[key].requires_grad_() for key in STUDENT]
    loss = fused_linear_kd_loss(**x, kind="jsd", chunk_rows=3, ce_weight=0.5)
    first = torch.autograd.grad(loss, own, retain_graph=True)
    kept = [grad.clone() for grad in first]
    for grad in first:
        grad.zero_()
    second = torch.autograd.grad(loss * 3, own)
    for got, want in zip(second, kept, strict=True):
        torch.testing.assert_close(got, 3 * want)


@pytest.mark.skipif(INTERPRETING, reason="traces of the reference")
def test_vmap_and_grad_and_make_fx(target: Target) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    x = made()
    heads = x["student_weight"], x["teacher_weight"], x["student_bias"]

    def call(
        hidden: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, *heads: torch.Tensor
    ) -> torch.Tensor:
        options: dict[str, Any] = {
            "target": labels,
            "kind": "jsd",
            "ce_weight": 0.5,
            "student_bias": heads[2],
        }
        return fused_linear_kd_loss(hidden, heads[0], teacher, heads[1], **options)

    args = x["student_hidden"], x["teacher_hidden"], x["target"]
    got = torch.func.vmap(torch.func.grad(lambda *some: call(*some, *heads)))(*args)
    for at in range(2):
        hidden = args[0][at].clone().requires_grad_()
        (want,) = torch.autograd.grad(call(hidden, args[1][at], args[2][at], *heads), hidden)
        torch.testing.assert_close(got[at], want, rtol=1e-4, atol=1e-6)
    traced = make_fx(call, tracing_mode="fake")(*args, *heads)
    torch.testing.assert_close(traced(*args, *heads), call(*args, *heads))


def test_the_module_hands_everything_on(target: Target) -> None:
    x = {key: value.to(target.device) for key, value in made().items()}
    student = torch.nn.Linear(6, V).to(target.device)
    teacher = torch.nn.Linear(9, V).to(target.device)
    options: dict[str, Any] = {"kind": "jsd", "beta": 0.2, "ce_weight": 0.5, "kd_weight": 0.5, "softcap": 5.0}
    module = FusedLinearKDLoss(2.0, **options)
    got = module(
        x["student_hidden"], student, x["teacher_hidden"], teacher, target=x["target"], mask=x["mask"]
    )
    want = fused_linear_kd_loss(
        x["student_hidden"], student.weight, x["teacher_hidden"], teacher.weight.detach(), target=x["target"],
        student_bias=student.bias, teacher_bias=teacher.bias.detach(), temperature=2.0, mask=x["mask"], **options,
    )  # fmt: skip
    torch.testing.assert_close(got, want)
    assert "kind='jsd'" in repr(module)


H, W, G, U = torch.zeros(4, 6), torch.zeros(8, 6), torch.zeros(4, 9), torch.zeros(8, 9)
T = torch.zeros(4, 8)
LABELS = torch.zeros(4, dtype=torch.int64)
TOPK = torch.zeros(4, 2, dtype=torch.int64), torch.zeros(4, 2)


@pytest.mark.parametrize(
    "error, match, args, options",
    [
        (ValueError, "kind: got 'kl'; accepted: forward_kl", (H, W, G, U), {"kind": "kl"}),
        (ValueError, "teacher_hidden: got None; a teacher is needed", (H, W), {}),
        (ValueError, "teacher_hidden: got None; it is needed together", (H, W, None, U), {}),
        (ValueError, "teacher_logits: got one beside teacher_hidden", (H, W, G, U), {"teacher_logits": T}),
        (ValueError, r"teacher_logits: got shape \(4, 7\)", (H, W), {"teacher_logits": torch.zeros(4, 7)}),
        (ValueError, "teacher_logits: requires grad", (H, W), {"teacher_logits": torch.zeros(4, 8).requires_grad_()}),
        (TypeError, "teacher_topk: got list of 2", (H, W), {"teacher_topk": list(TOPK)}),
        (TypeError, r"teacher_topk\[0\]: got dtype", (H, W), {"teacher_topk": (TOPK[1], TOPK[1])}),
        (ValueError, r"teacher_topk\[1\]: got shape", (H, W), {"teacher_topk": (TOPK[0], TOPK[1][:3])}),
        (ValueError, "teacher_topk: got one with kind='jsd'", (H, W), {"teacher_topk": TOPK, "kind": "jsd"}),
        (ValueError, "teacher_softcap: got one without", (H, W), {"teacher_topk": TOPK, "teacher_softcap": 2.0}),
        (ValueError, "teacher_bias: got one without", (H, W), {"teacher_topk": TOPK, "teacher_bias": torch.zeros(8)}),
        (ValueError, "softcap: got 0", (H, W, G, U), {"softcap": 0.0}),
        (ValueError, "softcap: got -1", (H, W, G, U), {"softcap": -1.0}),
        (ValueError, "target: got None", (H, W, G, U), {"ce_weight": 1.0}),
        (TypeError, "target: got dtype", (H, W, G, U), {"ce_weight": 1.0, "target": LABELS.int()}),
        (ValueError, "target: got class 8", (H, W, G, U), {"ce_weight": 1.0, "target": LABELS + 8}),
        (ValueError, "kd_weight: got -1", (H, W, G, U), {"kd_weight": -1.0}),
        (ValueError, "label_smoothing: got 2", (H, W, G, U), {"label_smoothing": 2.0}),
        (ValueError, "teacher_temperature: got 0", (H, W, G, U), {"teacher_temperature": 0.0}),
        (ValueError, r"teacher_weight: got shape \(8, 6\)", (H, W, G), {}),
    ],
)  # fmt: skip
def test_refusals_name_the_argument(error: type[Exception], match: str, args: Any, options: Any) -> None:
    with pytest.raises(error, match=match):
        fused_linear_kd_loss(*args, **options)


@pytest.mark.skipif(INTERPRETING, reason="no kernel takes part")
@pytest.mark.parametrize(
    "at", ["student_hidden", "student_weight", "student_bias", "teacher_weight", "teacher_logits"]
)
def test_sharded_tensors_are_refused_by_name(at: str, tmp_path: Any) -> None:
    """FSDP2's parameters outside the forward that gathers them."""
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor, Replicate, init_device_mesh

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        given: dict[str, Any] = {
            "student_hidden": H,
            "student_weight": W,
            "teacher_hidden": G,
            "teacher_weight": U,
        }
        given["student_bias"] = torch.zeros(8)
        if at == "teacher_logits":
            given = {key: given[key] for key in ("student_hidden", "student_weight")} | {
                at: torch.zeros(4, 8)
            }
        given[at] = DTensor.from_local(given[at], mesh, [Replicate()])
        with pytest.raises(TypeError, match=rf"{at}: got a DTensor.*full_tensor"):
            fused_linear_kd_loss(**given)
    finally:
        dist.destroy_process_group()


def test_divergences_of_given_logits_agree(target: Target) -> None:
    """The same numbers as divergence_loss's, whose definition test_divergence.py holds."""
    x = {key: value.to(target.device) for key, value in made().items()}
    s = F.linear(x["student_hidden"], x["student_weight"])
    t = F.linear(x["teacher_hidden"], x["teacher_weight"])
    heads = x["student_hidden"], x["student_weight"], x["teacher_hidden"], x["teacher_weight"]
    for options in KINDS:
        got = fused_linear_kd_loss(*heads, **options, chunk_rows=4)
        torch.testing.assert_close(got, divergence_loss(s, t, **options), rtol=1e-4, atol=1e-6)

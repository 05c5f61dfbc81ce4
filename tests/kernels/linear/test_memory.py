"""What fused_linear_kd_loss has alive at its peak is what its docstring says, byte for byte."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kdfast.functional import fused_linear_kd_loss
from kdfast.ops.linear import chunks as op
from kdfast.ops.linear import chunks_alive
from tests.conftest import INTERPRETING

pytestmark = pytest.mark.skipif(
    INTERPRETING, reason="kernels are replaced: bytes are counted, on meta tensors too"
)

H, HT, N = 16, 24, 8  # hidden sizes, rows a chunk


class Peak(TorchDispatchMode):
    """The most bytes that were alive at a time of what operators made; what was there before does not count."""

    def __init__(self, *inputs: Any) -> None:
        super().__init__()
        self.old = [
            StorageWeakRef(x.untyped_storage()) for x in tree_leaves(inputs) if isinstance(x, torch.Tensor)
        ]
        self.alive: dict[StorageWeakRef, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            ref = StorageWeakRef(x.untyped_storage()) if isinstance(x, torch.Tensor) else None
            if ref is not None and ref not in self.old:
                self.alive[ref] = x.untyped_storage().nbytes()
        self.alive = {ref: size for ref, size in self.alive.items() if not ref.expired()}
        self.peak = max(self.peak, sum(self.alive.values()))
        return out


@pytest.fixture
def kernels_that_write_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a launch allocates is its rows; what a reference allocates is another matter."""

    def launcher(student: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return student.new_empty(len(student))

    monkeypatch.setattr(op, "resolve", lambda *_: "triton")
    for name in ("kl", "distillation", "jsd", "divergence", "topk"):
        monkeypatch.setattr(op, name, dataclasses.replace(getattr(op, name), launcher=launcher))


def problem(rows: int, classes: int, dtype: torch.dtype, device: str, teacher: str) -> dict[str, Any]:
    def empty(*size: int) -> torch.Tensor:
        return torch.zeros(size, dtype=dtype, device=device)

    made: dict[str, Any] = {"student_hidden": empty(rows, H), "student_weight": empty(classes, H)}
    if teacher == "head":
        made |= {"teacher_hidden": empty(rows, HT), "teacher_weight": empty(classes, HT)}
    elif teacher == "logits":
        made["teacher_logits"] = empty(rows, classes)
    elif teacher == "topk":
        made["teacher_topk"] = torch.zeros(rows, 2, dtype=torch.int64, device=device), empty(rows, 2)
    return made


def measured(
    rows: int,
    classes: int,
    dtype: torch.dtype,
    device: str,
    teacher: str,
    chunk_rows: int = N,
    **options: Any,
) -> int:
    """Bytes at the peak of a forward and a backward whose upstream gradient is 1, beside inputs and gradients."""
    given = problem(rows, classes, dtype, device, teacher)
    if options.get("ce_weight"):
        given["target"] = torch.zeros(rows, dtype=torch.int64, device=device)
    own = [given[key].requires_grad_() for key in ("student_hidden", "student_weight")]
    with Peak(given) as peak:
        loss = fused_linear_kd_loss(**given, **options, chunk_rows=chunk_rows, reduction="sum")
        torch.autograd.grad(loss, own)
    return peak.peak - sum(x.numel() * x.element_size() for x in own)


CASES: list[tuple[int, str, dict[str, Any], int]] = [
    (64, "head", {}, 2),
    (64, "head", {"ce_weight": 1.0}, 2),
    (60, "head", {}, 3),
    (64, "head", {"softcap": 2.0}, 3),
    (64, "head", {"kind": "jsd"}, 3),
    (64, "head", {"kind": "jeffreys", "ce_weight": 1.0}, 3),
    (64, "logits", {}, 1),
    (64, "logits", {"kind": "jsd"}, 2),
    (64, "logits", {"kind": "jsd", "ce_weight": 1.0}, 3),
    (64, "topk", {}, 2),
    (64, "topk", {"ce_weight": 1.0}, 3),
    (64, "none", {"kd_weight": 0.0, "ce_weight": 1.0}, 2),
]


@pytest.mark.usefixtures("kernels_that_write_nothing")
@pytest.mark.parametrize("rows", [4 * N, 16 * N])
@pytest.mark.parametrize("classes, teacher, options, chunks", CASES)
def test_float32_needs_the_chunks_and_their_products(
    classes: int, teacher: str, options: dict[str, Any], chunks: int, rows: int
) -> None:
    """c·n·V·4 + 2·n·H·4, and a few numbers a row, however many the rows."""
    forward_kl = options.get("kind", "forward_kl") == "forward_kl" and teacher != "topk"
    assert chunks == chunks_alive(
        classes,
        ("forward_kl" if forward_kl else "another") if options.get("kd_weight", 1.0) else None,
        labels="ce_weight" in options,
        head=teacher == "head",
        softcap="softcap" in options,
    )
    got = measured(rows, classes, torch.float32, "cpu", teacher, **options)
    said = chunks * N * classes * 4 + 2 * N * H * 4
    a_row = (8 + 4 + 4) * rows if "ce_weight" in options else 0  # labels' factors
    assert chunks * N * classes * 4 <= got <= said + a_row + 128


@pytest.mark.usefixtures("kernels_that_write_nothing")
@pytest.mark.parametrize("rows", [4 * N, 16 * N])
def test_a_half_precision_gradient_is_summed_once(rows: int) -> None:
    """As a GPU runs it: 2·n·V·4 + 2·n·H·4 + 4·V·H for the sum + 2·n·V for the rounded gradient; no product [V, H]."""
    got = measured(rows, 64, torch.bfloat16, "meta", "head")
    said = 2 * N * 64 * 4 + 2 * N * H * 4 + 4 * 64 * H + 2 * N * 64
    assert got <= said + 128
    assert (
        got >= 2 * N * 64 * 4 + 4 * 64 * H - 2 * 64 * H
    )  # the rounded gradient, at the end, is one that is returned


@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
def test_the_references_peak_does_not_grow_with_the_rows_either(kind: str) -> None:
    few, many = (measured(rows, 64, torch.float32, "cpu", "head", kind=kind) for rows in (4 * N, 32 * N))
    assert many == few


@pytest.mark.usefixtures("kernels_that_write_nothing")
def test_the_instrument_sees_a_product_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it was before: a fresh float32 [V, H] for each chunk."""

    def fresh(self: Any, total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        total += self.multiply(a, b)

    before = measured(4, 64, torch.float32, "cpu", "head", 1)
    monkeypatch.setattr(op.Products, "add", fresh)
    assert measured(4, 64, torch.float32, "cpu", "head", 1) >= before + 4 * 64 * H - 2 * 64 * 4


class Launched(TorchDispatchMode):
    """How many operators ran that compute or copy something; views do not."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        idle = (
            "view",
            "expand",
            "detach",
            "t",
            "transpose",
            "slice",
            "empty",
            "empty_like",
            "new_empty",
            "select",
        )
        self.count += func.overloadpacket.__name__.removeprefix("_") not in idle
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("kernels_that_write_nothing")
@pytest.mark.parametrize(
    "dtype, options, launches",
    [
        (torch.float32, {}, 3),
        (torch.bfloat16, {}, 4),
        (torch.float32, {"ce_weight": 1.0}, 3),
        (torch.float32, {"kind": "jsd"}, 3),
        (torch.float32, {"kind": "jsd", "ce_weight": 1.0}, 6),
    ],
)
def test_launches_a_chunk_are_as_the_table_says(
    dtype: torch.dtype, options: dict[str, Any], launches: int
) -> None:
    """Beside four products and the divergence's kernel (which is replaced, and not counted)."""
    counts = []
    for chunks in (2, 3):
        given = problem(chunks * N, 64, dtype, "meta", "head")
        if "ce_weight" in options:
            given["target"] = torch.zeros(chunks * N, dtype=torch.int64, device="meta")
        own = [given[key].requires_grad_() for key in ("student_hidden", "student_weight")]
        with Launched() as launched:
            torch.autograd.grad(fused_linear_kd_loss(**given, **options, chunk_rows=N, reduction="sum"), own)
        counts.append(launched.count)
    assert counts[1] - counts[0] == 4 + launches

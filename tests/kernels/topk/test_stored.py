"""TopKTeacher: what comes back is the teacher, to float16's precision, in the bytes that are stated."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from kdfast.functional import TopKTeacher, fused_linear_kd_loss, kd_kl_div, topk_kd_loss
from tests.conftest import Target


def logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_loss_is_that_of_the_exact_top_k(target: Target, temperature: float) -> None:
    t, s = logits(2, 5, 40).to(target.device), logits(2, 5, 40, seed=1).to(target.device)
    kept, index = t.topk(6, -1)
    stored = TopKTeacher.compress(t, 6, temperature=temperature)
    leaf = s.clone().requires_grad_()
    got = stored.loss(leaf, reduction="rowmean")
    normalizer = torch.logsumexp(t / temperature, -1)
    want = topk_kd_loss(
        leaf, index, kept, temperature=temperature, log_normalizer=normalizer, reduction="rowmean"
    )
    torch.testing.assert_close(got, want, rtol=5e-3, atol=1e-4)
    grads = (torch.autograd.grad(x, leaf)[0] for x in (got, want))
    torch.testing.assert_close(*grads, rtol=2e-2, atol=2e-3)


def test_all_classes_are_the_whole_teacher(target: Target) -> None:
    t, s = logits(4, 9).to(target.device), logits(4, 9, seed=1).to(target.device)
    got = TopKTeacher.compress(t, 9, temperature=2.0).loss(s)
    torch.testing.assert_close(got, kd_kl_div(s, t, 2.0), rtol=5e-3, atol=1e-4)


@pytest.mark.parametrize(
    "classes, k, size", [(100, 8, 34), (65536, 64, 258), (65537, 64, 386), (128_256, 3, 20)]
)
def test_bytes_a_token_are_as_stated(classes: int, k: int, size: int, tmp_path: Path) -> None:
    stored = TopKTeacher.compress(logits(20, classes), k)
    assert stored.bytes_per_row == size == (4 if classes <= 65536 else 6) * k + 2
    parts = (stored.indices, stored.log_probs, stored.log_tail)
    assert sum(x.numel() * x.element_size() for x in parts) == 20 * size
    stored.save(tmp_path / "t.pt")
    assert (tmp_path / "t.pt").stat().st_size < 20 * size + 4096


@pytest.mark.parametrize("classes", [300, 40_000, 65536, 65537])
def test_indices_come_back(classes: int, tmp_path: Path) -> None:
    """40000 and more have a bit that int16 takes for a sign."""
    t = torch.zeros(2, classes)
    t[0, classes - 1] = t[1, min(classes - 2, 32768)] = 9.0
    TopKTeacher.compress(t, 1, temperature=2.0).save(tmp_path / "t.pt")
    back = TopKTeacher.load(tmp_path / "t.pt")
    indices, kept, everything = back.read()
    assert indices.tolist() == [[classes - 1], [min(classes - 2, 32768)]]
    assert (back.num_classes, back.temperature) == (classes, 2.0)
    exact = torch.log_softmax(t.double() / 2.0, -1).gather(-1, indices)
    assert ((kept.double() / 2.0 - exact).abs() <= exact.abs() * 2**-11 + 1e-7).all()
    assert (everything.abs() < 0.01).all()


def test_a_small_tail_keeps_its_digits() -> None:
    """1 minus what is kept would be 0."""
    t = torch.tensor([[20.0, 0.0, 0.0, 1.0]])
    stored = TopKTeacher.compress(t, 1)
    want = math.log(sum(math.exp(x - 20) for x in (0.0, 0.0, 1.0)))
    assert float(stored.log_tail) == pytest.approx(want, rel=1e-3)


def test_classes_that_are_ruled_out_are_padding(target: Target) -> None:
    t = torch.full((3, 8), -math.inf)
    t[:, :2] = logits(3, 2)
    s = logits(3, 8, seed=2).to(target.device).requires_grad_()
    stored = TopKTeacher.compress(t.to(target.device), 5)
    assert (stored.log_tail == -math.inf).all()
    loss = stored.loss(s)
    torch.testing.assert_close(loss, kd_kl_div(s, t.to(target.device)), rtol=5e-3, atol=1e-4)
    assert torch.autograd.grad(loss, s)[0].isfinite().all()


def test_rows_are_taken_and_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    from kdfast.functional import stored as module

    t = logits(3, 7, 20)
    whole = TopKTeacher.compress(t, 4)
    monkeypatch.setattr(module, "CHUNK", 45)
    for got, want in zip(TopKTeacher.compress(t, 4)[:3], whole[:3], strict=True):
        assert torch.equal(got, want)
    mask = torch.rand(3, 7, generator=torch.Generator().manual_seed(0)) > 0.5
    some = TopKTeacher.compress(t[mask], 4)
    assert torch.equal(whole.rows(mask).log_probs, some.log_probs)
    assert TopKTeacher.compress(logits(0, 20), 4).indices.shape == (0, 4)
    assert TopKTeacher.compress(logits(20), 4).log_tail.shape == ()


def test_the_fused_heads_take_it(target: Target) -> None:
    hidden, weight, t = (
        x.to(target.device) for x in (logits(6, 5), logits(24, 5, seed=1), logits(6, 24, seed=2))
    )
    stored = TopKTeacher.compress(t, 6, temperature=2.0)
    got = fused_linear_kd_loss(hidden, weight, teacher_topk=stored.read(), temperature=2.0, chunk_rows=4)
    torch.testing.assert_close(got, stored.loss(hidden @ weight.T), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "error, match, call",
    [
        (ValueError, "k: got 0; 1 to 8", lambda: TopKTeacher.compress(logits(2, 8), 0)),
        (ValueError, "k: got 9; 1 to 8", lambda: TopKTeacher.compress(logits(2, 8), 9)),
        (TypeError, "k: got float", lambda: TopKTeacher.compress(logits(2, 8), 2.0)),  # type: ignore[arg-type]
        (ValueError, "temperature: got 0", lambda: TopKTeacher.compress(logits(2, 8), 2, temperature=0.0)),
        (TypeError, "logits: got dtype", lambda: TopKTeacher.compress(torch.zeros(2, 8).int(), 2)),
        (
            ValueError,
            "student: got 7 classes",
            lambda: TopKTeacher.compress(logits(2, 8), 2).loss(logits(2, 7)),
        ),
    ],
)
def test_refusals_name_the_argument(error: type[Exception], match: str, call: Any) -> None:
    with pytest.raises(error, match=match):
        call()


def test_another_file_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "t.pt").write_bytes(b"no such thing")
    with pytest.raises(ValueError, match=r"path: .*t\.pt is no stored teacher"):
        TopKTeacher.load(tmp_path / "t.pt")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "u.pt")
    with pytest.raises(ValueError, match=r"path: .*u\.pt is no stored teacher"):
        TopKTeacher.load(tmp_path / "u.pt")
    with pytest.raises(FileNotFoundError):
        TopKTeacher.load(tmp_path / "none.pt")

"""The denoising step's loop on a CPU: float64's numbers, and whatever it cannot take left to the definition."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException

from kdfast.ops.denoise import denoise_step, native
from kdfast.reference.denoise import Guidance
from kdfast.reference.native import extension
from tests.support.watched import Watched

pytestmark = pytest.mark.skipif(extension() is None, reason="the C++ extension is not built")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which loops ran."""
    watched = Watched(extension())
    monkeypatch.setattr(native, "extension", lambda: watched)
    return watched.ran


def _step(
    dtype: torch.dtype, shape: tuple[int, ...], guided: str | None, past: int, noisy: bool, **options: Any
) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(1)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    table, sample = draw(3, 10), draw(*shape)
    extra = 2 if guided else 0
    output = draw(shape[0] * (2 if guided in ("first", "second") else 1), shape[1] + extra, *shape[2:])
    guidance = Guidance(None if guided is None else 3.5, guided != "second")
    found = denoise_step(
        sample,
        output,
        table,
        1,
        guidance=guidance,
        history=[draw(*shape) for _ in range(past)],
        noise=draw(*shape) if noisy else None,
        **options,
    )
    return found.y, found.x0


@pytest.mark.parametrize("shape", [(2, 3), (4, 3, 5, 7), (2, 1, 23, 31)])
@pytest.mark.parametrize("guided", [None, "first", "second", "doubled"])
@pytest.mark.parametrize(("clip", "want_x0"), list(itertools.product([None, 0.5], [False, True])))
def test_results_are_those_of_float64(
    shape: tuple[int, ...], guided: str | None, clip: float | None, want_x0: bool, calls: list[str]
) -> None:
    for past, noisy in ((0, False), (2, True), (3, False)):
        given = (shape, guided, past, noisy)
        found = _step(torch.float32, *given, clip=clip, want_x0=want_x0)
        assert calls, "the loop did not run"
        for got, want in zip(found, _step(torch.float64, *given, clip=clip, want_x0=want_x0), strict=True):
            assert (got is None) == (want is None)
            if got is not None and want is not None:
                torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_threads_change_no_bit() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone, _ = _step(torch.float32, (64, 4, 64, 64), "first", 1, True)
        torch.set_num_threads(3)
        shared, _ = _step(torch.float32, (64, 4, 64, 64), "first", 1, True)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(alone, shared)


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("want_x0", [False, True])
def test_with_gradients_the_numbers_are_the_same(clip: float | None, want_x0: bool, calls: list[str]) -> None:
    sample, output = torch.randn(2, 2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    table = torch.linspace(-1, 1, 20).view(2, 10)
    options = {"clip": clip, "want_x0": want_x0}
    want = denoise_step(sample, output, table, 1, **options)
    sample.requires_grad_()
    got = denoise_step(sample, output, table, 1, **options)
    assert torch.equal(got.y, want.y)
    assert not want_x0 or torch.equal(got.x0, want.x0)
    assert len(calls) > 1, "with gradients the loop did not run"
    exact = sample.detach().double().requires_grad_()
    whole = denoise_step(exact, output.double(), table.double(), 1, **options)
    for found, wanted in ((got.y, whole.y), (got.x0, whole.x0)):
        if found is not None:
            (grad,) = torch.autograd.grad(found.square().sum(), sample, retain_graph=True)
            (exactly,) = torch.autograd.grad(wanted.square().sum(), exact, retain_graph=True)
            torch.testing.assert_close(grad.double(), exactly, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        lambda s, o: (s.bfloat16(), o.bfloat16()),
        lambda s, o: (s.to(memory_format=torch.channels_last), o),
        lambda s, o: (s.double(), o),
    ],
)
def test_what_the_loop_does_not_take_is_left_to_the_definition(change: Any, calls: list[str]) -> None:
    sample, output = torch.randn(2, 2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    sample, output = change(sample, output)
    table = torch.linspace(-1, 1, 20, dtype=torch.promote_types(sample.dtype, torch.float32)).view(2, 10)
    assert denoise_step(sample, output, table, 1).y.stride() == sample.stride()
    assert calls == []


def test_not_a_number_stays_through_a_clamp() -> None:
    sample = torch.full((1, 1, 2, 2), float("nan"))
    out = denoise_step(sample, torch.zeros(1, 1, 2, 2), torch.ones(1, 10), 0, clip=1.0)
    assert bool(out.y.isnan().all())


@pytest.mark.parametrize("fake", [0, 1, 3])
def test_a_tensor_without_memory_is_never_read(fake: int) -> None:
    """A fake tensor stays one when the mode that made it is over; reading its address ends the process."""
    given = [torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5), torch.ones(1, 10), torch.randn(2, 3, 4, 5)]
    with FakeTensorMode(allow_non_fake_inputs=True):
        given[fake] = torch.empty_like(given[fake])
    assert isinstance(denoise_step(*given[:3], 0, noise=given[3]).y, FakeTensor)


def test_a_table_without_memory_is_not_read(calls: list[str]) -> None:
    with FakeTensorMode():
        table = torch.ones(1, 10)
    with pytest.raises(DataDependentOutputException):
        denoise_step(torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5), table, 0)
    assert calls == []

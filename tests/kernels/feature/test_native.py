"""The loops of branches and noise on a CPU: the definition's numbers in float64, for any layout and any gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode

from kdfast.functional import add_noise_embed, reparam_middle_loss
from kdfast.ops.feature import native
from kdfast.reference.native import extension
from kdfast.reference.philox import noised as noised_latent
from tests.support.watched import Watched

pytestmark = pytest.mark.skipif(extension() is None, reason="the C++ extension is not built")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which of the loops ran; they take all sizes."""
    monkeypatch.setattr(native, "SMALLEST", 0)
    watched = Watched(extension())
    monkeypatch.setattr(native, "extension", lambda: watched)
    return watched.ran


def _operands(m: int, shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(m)
    branches = torch.randn(m, *shape, generator=generator)
    if layout == "stacked":  # as one convolution for all branches writes them
        branches = branches.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "sliced":
        branches = torch.stack([branches, branches], 2)[:, :, 0]
    elif layout == "channels_last":
        branches = branches.movedim(2, -1).contiguous().movedim(-1, 2)
    target = torch.randn(shape, generator=generator)
    u, v = torch.rand(2, m, generator=generator)
    return [branches.to(dtype), target.to(dtype), u.to(dtype), v.to(dtype)]


def _both_ways(
    m: int, shape: tuple[int, ...], dtype: torch.dtype, layout: str = "dense", **options: Any
) -> list[Tensor]:
    branches, target, u, v = _operands(m, shape, dtype, layout)
    order = torch.randperm(m, generator=torch.Generator().manual_seed(0))
    if options.pop("noisy", False):
        options["noise_scale"] = torch.linspace(0.1, 1, m, dtype=dtype)
    branches.requires_grad_()
    loss, mean = reparam_middle_loss(branches, target, u, v, order, seed=5, **options)
    outputs, upstream = [loss], [torch.tensor(1.5, dtype=dtype)]
    if mean.requires_grad:
        outputs, upstream = [loss, mean], [upstream[0], target.cos()]
    return [loss.detach(), mean.detach(), *torch.autograd.grad(outputs, branches, upstream)]


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (3, 300), (1, 1, 17, 31), (2, 512)])
@pytest.mark.parametrize("carry", [True, False])
@pytest.mark.parametrize("noisy", [True, False])
@pytest.mark.parametrize("free", [True, False])
def test_loss_mean_and_gradient_are_those_of_float64(
    shape: tuple[int, ...], carry: bool, noisy: bool, free: bool, calls: list[str]
) -> None:
    options = {"carry_gradient": carry, "noisy": noisy, "mean_needs_grad": free}
    found = _both_ways(5, shape, torch.float32, **options)
    assert calls, "the loops did not run"
    for got, want in zip(found, _both_ways(5, shape, torch.float64, **options), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(("layout", "fits"), [("stacked", True), ("sliced", True), ("channels_last", False)])
def test_layouts(layout: str, fits: bool, calls: list[str]) -> None:
    found = _both_ways(4, (3, 6, 8, 8), torch.float32, layout)
    assert bool(calls) == fits
    for got, want in zip(found, _both_ways(4, (3, 6, 8, 8), torch.float32), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_threads_change_no_bit() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = _both_ways(6, (16, 64, 16, 16), torch.float32, noisy=True)
        torch.set_num_threads(3)
        shared = _both_ways(6, (16, 64, 16, 16), torch.float32, noisy=True)
    finally:
        torch.set_num_threads(before)
    for one, other in zip(alone, shared, strict=True):
        assert torch.equal(one, other)


def test_many_upstream_gradients_at_once(calls: list[str]) -> None:
    branches, target, u, v = _operands(3, (2, 40), torch.float32, "dense")
    branches.requires_grad_()
    loss, _ = reparam_middle_loss(branches, target, u, v, torch.arange(3))
    (found,) = torch.autograd.grad(
        loss, branches, torch.tensor([1.0, -2.0]), is_grads_batched=True, retain_graph=True
    )
    (want,) = torch.autograd.grad(loss, branches)
    torch.testing.assert_close(found, torch.stack([want, -2 * want]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 5), (4, 3, 7, 7), (2, 1, 300), (300, 2), (1, 1024)])
def test_noise_is_added_as_it_is_drawn(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    latent, bars = torch.randn(shape, generator=generator), torch.rand(10, generator=generator)
    timesteps = torch.randint(10, shape[:1], generator=generator)
    got = add_noise_embed(latent, timesteps, bars, seed=2**62 + 3)
    want = add_noise_embed(latent.double(), timesteps, bars.double(), seed=2**62 + 3)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=2e-6)


def test_noise_of_many_threads_is_that_of_one() -> None:
    before, latent = torch.get_num_threads(), torch.zeros(5, 8, 200, 200)
    given = (latent, torch.arange(5), torch.linspace(0, 1, 5))
    try:
        torch.set_num_threads(1)
        alone = add_noise_embed(*given, seed=4)
        torch.set_num_threads(3)
        shared = add_noise_embed(*given, seed=4)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(alone, shared)


def test_noise_is_added_under_vmap() -> None:
    latents = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    steps, bars = torch.arange(3), torch.linspace(0.1, 0.9, 3)

    def noised(latent: Tensor) -> Tensor:
        return noised_latent(latent, bars[steps].sqrt(), (1 - bars[steps]).sqrt(), 7)

    found = torch.func.vmap(noised)(latents)
    for got, latent in zip(found, latents, strict=True):
        torch.testing.assert_close(got, noised(latent), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("fake", [0, 1])
def test_a_tensor_without_memory_is_never_read(fake: int) -> None:
    """A fake tensor stays one when the mode that made it is over; reading its address ends the process."""
    given = [torch.randn(4, 8, 16, 16), torch.rand(4), torch.rand(4)]
    with FakeTensorMode(allow_non_fake_inputs=True):
        given[fake] = torch.empty_like(given[fake])
    found = noised_latent(*given, seed=3)
    assert isinstance(found, FakeTensor)
    assert found.shape == (4, 8, 16, 16)


@pytest.mark.parametrize("fake", range(6))
def test_branches_without_memory_are_never_read(fake: int) -> None:
    branches, target, u, v = _operands(3, (2, 3, 16, 16), torch.float32, "dense")
    given = [branches, target, u, v, torch.arange(3), torch.rand(3)]
    with FakeTensorMode(allow_non_fake_inputs=True):
        given[fake] = torch.empty_like(given[fake])
    loss, _ = reparam_middle_loss(*given[:5], noise_scale=given[5])
    assert isinstance(loss, FakeTensor)

"""Noising with the time embedding, and the error in ε: conformance, the same noise in both, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kdfast.functional import add_noise_embed, noise_mix, noise_mse
from kdfast.reference.philox import normal
from tests.conftest import INTERPRETING, Target
from tests.support.conformance import ConformanceSuite, OpCase, assert_verbose_allclose

SEED = 7
BARS = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)


def make(generator: torch.Generator, shape: tuple[int, ...]) -> dict[str, Tensor]:
    # Few timesteps, so that several samples share one.
    return {
        "latent": torch.randn(shape, generator=generator),
        "timesteps": torch.randint(0, 3, shape[:1], generator=generator) * 300,
        "embedding": torch.randn(1000, shape[1], generator=generator),
    }


def run(latent: Tensor, timesteps: Tensor, embedding: Tensor | None) -> Tensor:
    return add_noise_embed(latent, timesteps, BARS.float().to(latent.device), embedding, seed=SEED)


def oracle(latent: Tensor, timesteps: Tensor, embedding: Tensor) -> Tensor:
    each = []
    noise = normal(SEED, 0, tuple(latent.shape))
    for at, t in enumerate(timesteps.tolist()):
        bar = BARS.float().double()[t]  # the table as it is handed over
        shift = embedding[t].view(-1, *[1] * (latent.dim() - 2))
        each.append(bar.sqrt() * latent[at] + (1 - bar).sqrt() * noise[at] + shift)
    return torch.stack(each) if each else latent


class TestConformance(ConformanceSuite):
    cases = (
        OpCase(
            name="add_noise_embed",
            make=make,
            run=run,
            oracle=oracle,
            # 49 a channel is odd; [B, C] latents; more than one program a sample.
            shapes=[(3, 4, 7, 7), (9, 10), (2, 4, 32, 40), (4, 70, 3)],
            small_shapes=[(3, 4, 3, 3), (6, 10), (2, 4, 8, 10)],
            differentiable=["embedding"],
            cast=["latent", "embedding"],
            launches=1,
            opcheck=lambda i: (
                torch.ops.kdfast.add_noise_embed.default,
                (i["latent"], i["timesteps"], BARS.float(), i["embedding"].requires_grad_(), SEED, None),
            ),
            tolerances={torch.bfloat16: (1.6e-2, 8e-3), torch.float16: (2e-3, 1e-3)},
        ),
        OpCase(
            name="noise_mse",
            make=lambda generator, shape: {"prediction": torch.randn(shape, generator=generator)},
            run=lambda prediction: noise_mse(prediction, seed=SEED),
            oracle=lambda prediction: (prediction - normal(SEED, 0, tuple(prediction.shape))).square().mean(),
            shapes=[(3, 4, 7, 7), (9, 10), (2, 4, 32, 40), (5,)],
            small_shapes=[(3, 4, 3, 3), (6, 10), (2, 4, 8, 10), (5,)],
            differentiable=["prediction"],
            cast=["prediction"],
            launches=1,
            opcheck=lambda i: (
                torch.ops.kdfast.noise_mse.default,
                (i["prediction"].requires_grad_(), SEED, None),
            ),
            tolerances={torch.bfloat16: (1.6e-2, 8e-3), torch.float16: (2e-3, 1e-3)},
        ),
    )


def inputs(target: Target, *shape: int) -> list[Tensor]:
    made = make(torch.Generator().manual_seed(3), shape)
    return [made[key].to(target.device) for key in ("latent", "timesteps", "embedding")]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_error_meets_the_noise_that_was_added(target: Target, layout: torch.memory_format) -> None:
    """Noise taken out of x_t again is the ε of the loss, whatever the layout: the error is rounding."""
    latent, timesteps, embedding = inputs(target, 2, 4, 3, 3)
    timesteps = timesteps + 100
    bars = BARS.float().to(latent.device)
    latent = latent.contiguous(memory_format=layout)
    noised = add_noise_embed(latent, timesteps, bars, embedding, seed=SEED)
    bar = bars[timesteps].view(-1, 1, 1, 1)
    shift = embedding[timesteps].view(2, 4, 1, 1)
    noise = (noised - shift - bar.sqrt() * latent) / (1 - bar).sqrt()
    assert noise_mse(noise, seed=SEED) < 1e-10
    assert noise_mse(noise, seed=SEED + 1) > 0.5
    # The same numbering as the γ-mix, too.
    gamma = torch.zeros(2, device=latent.device)
    torch.testing.assert_close(noise_mix(latent, gamma, seed=SEED), noise, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "shape",
    [
        (2, 48, 7, 7),  # tiles of whole channels, the last one ragged; 49 a channel is odd
        (3, 5, 3, 7),  # an odd channel count, samples that begin anywhere
        (2, 20, 15, 15),  # more positions than a tile has, channels that begin anywhere
        (2, 64, 8, 8),
        (1, 4, 32, 36),
        (1, 17, 1, 2),
        (2, 24, 300, 1),
    ],
)
def test_channels_last_draws_the_same_bits(target: Target, shape: tuple[int, ...]) -> None:
    zeros = torch.zeros(shape, device=target.device)
    last = zeros.contiguous(memory_format=torch.channels_last)
    gamma, bars = zeros.new_zeros(shape[0]), zeros.new_zeros(1)
    steps = torch.zeros(shape[0], dtype=torch.int64, device=target.device)
    want = noise_mix(zeros, gamma, seed=SEED)
    assert torch.equal(noise_mix(last, gamma, seed=SEED), want)
    assert torch.equal(add_noise_embed(last, steps, bars, seed=SEED), want)
    assert noise_mse(want.contiguous(memory_format=torch.channels_last), seed=SEED) == 0
    # A slice of channels: neighbours in memory still, a sample of which begins elsewhere.
    wide = torch.zeros(shape[0], 2 * shape[1], *shape[2:], device=target.device)
    part = wide.contiguous(memory_format=torch.channels_last)[:, shape[1] :]
    assert torch.equal(noise_mix(part, gamma, seed=SEED), want)


def test_without_an_embedding_it_is_the_schedulers_add_noise(target: Target) -> None:
    latent, timesteps, embedding = inputs(target, 3, 4, 3, 3)
    bars = BARS.float().to(latent.device)
    plain = add_noise_embed(latent, timesteps, bars, seed=SEED)
    shifted = add_noise_embed(latent, timesteps, bars, embedding, seed=SEED)
    shift = embedding[timesteps].view(3, 4, 1, 1).expand_as(latent)
    torch.testing.assert_close(shifted - plain, shift, rtol=1e-5, atol=1e-5)
    diffusers = pytest.importorskip("diffusers") if target.device == "cpu" else None
    if diffusers is not None:
        noise = normal(SEED, 0, (3, 4, 3, 3)).float()
        want = diffusers.DDPMScheduler(beta_schedule="linear").add_noise(latent, noise, timesteps)
        torch.testing.assert_close(plain, want, rtol=1e-5, atol=1e-5)


def test_a_device_seed_is_the_number_it_holds(target: Target) -> None:
    latent, timesteps, embedding = inputs(target, 2, 4, 3)
    bars, held = BARS.float().to(latent.device), torch.tensor(SEED, device=latent.device)
    noised = [add_noise_embed(latent, timesteps, bars, embedding, seed=s) for s in (SEED, held, held + 1)]
    errors = [noise_mse(latent, seed=s) for s in (SEED, held, held + 1)]
    for found in (noised, errors):
        assert torch.equal(found[0], found[1])
        assert not torch.equal(found[0], found[2])


def test_rows_that_no_sample_has_get_no_gradient(target: Target) -> None:
    latent, timesteps, embedding = inputs(target, 5, 4, 3)
    embedding.requires_grad_()
    out = run(latent, timesteps, embedding)
    (grad,) = torch.autograd.grad(out.sum(), embedding)
    want = torch.zeros_like(embedding).index_add(0, timesteps, torch.full((5, 4), 3.0, device=latent.device))
    torch.testing.assert_close(grad, want)


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        (
            (6, 16, 7, 7),
            torch.contiguous_format,
        ),  # 49 values from any boundary on: read from the 16 bytes before
        ((6, 16, 7, 7), torch.channels_last),
        ((5, 3, 3, 3), torch.contiguous_format),  # 27 elements of a sample: no boundary is kept
        ((3, 2, 18, 18), torch.contiguous_format),  # more positions than a tile has
        ((1100, 3), torch.contiguous_format),  # more samples than a program reads timesteps at once
    ],
)
def test_the_embedding_gets_every_sample_of_its_timestep(
    target: Target, shape: tuple[int, ...], layout: torch.memory_format
) -> None:
    generator = torch.Generator().manual_seed(5)
    upstream = torch.randn(shape, generator=generator).to(target.device)
    upstream = upstream.contiguous(memory_format=layout)
    # One that every second sample has, and some that few have.
    timesteps = torch.randint(0, 9, shape[:1], generator=generator).to(target.device)
    timesteps[::2] = 4
    embedding = torch.zeros(9, shape[1], device=target.device, requires_grad=True)
    (grad,) = torch.autograd.grad(run(upstream, timesteps, embedding), embedding, upstream)
    each = upstream.double().flatten(2).sum(2) if len(shape) > 2 else upstream.double()
    want = torch.zeros(9, shape[1], dtype=torch.float64, device=target.device)
    want.index_add_(0, timesteps, each)
    torch.testing.assert_close(grad.double(), want, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_a_second_backward_finds_the_gradient_again(target: Target, factor: float) -> None:
    prediction = torch.randn(2, 3, 4, device=target.device, requires_grad=True)
    loss = noise_mse(prediction, seed=SEED)
    noise = normal(SEED, 0, (2, 3, 4), prediction.device).float()
    want = factor * 2 * (prediction.detach() - noise) / prediction.numel()
    for _ in range(2):
        (got,) = torch.autograd.grad(loss * factor, prediction, retain_graph=True)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


def test_gradients_can_be_differentiated_again(target: Target) -> None:
    latent, timesteps, embedding = inputs(target, 3, 4, 3)

    def second(dtype: torch.dtype) -> list[Tensor]:
        p = latent.detach().to(dtype).requires_grad_()
        (first,) = torch.autograd.grad(noise_mse(p, seed=SEED) ** 2, p, create_graph=True)
        e = embedding.detach().to(dtype).requires_grad_()
        noised = latent.detach().to(dtype)
        out = add_noise_embed(noised, timesteps, BARS.float().to(e.device), e, seed=SEED)
        (other,) = torch.autograd.grad(out.pow(3).sum(), e, create_graph=True)
        leaves = ((first, p), (other, e))
        return [torch.autograd.grad(g.square().sum(), leaf)[0] for g, leaf in leaves]

    for got, want in zip(second(torch.float32), second(torch.float64), strict=True):
        assert_verbose_allclose(got, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))


@pytest.mark.skipif(INTERPRETING, reason="float64 takes the reference")
def test_gradcheck_in_float64() -> None:
    latent, timesteps, embedding = inputs(Target("reference", "cpu"), 3, 2, 2)
    latent, embedding = latent.double(), embedding[:601].double().requires_grad_()
    rows = embedding[timesteps.unique()].detach().requires_grad_()
    at = torch.bucketize(timesteps, timesteps.unique())
    bars = BARS[timesteps.unique()]
    assert torch.autograd.gradcheck(lambda e: add_noise_embed(latent, at, bars, e, seed=SEED), (rows,))
    assert torch.autograd.gradcheck(lambda p: noise_mse(p, seed=SEED), (latent.requires_grad_(),))


def test_compiled_is_eager(target: Target) -> None:
    latent, timesteps, embedding = inputs(target, 3, 4, 3, 3)
    embedding.requires_grad_()
    seed = torch.tensor([SEED], device=latent.device)

    def call(e: Tensor) -> Tensor:
        out = add_noise_embed(latent, timesteps, BARS.float().to(e.device), e, seed=seed)
        return noise_mse(out * 1.5, seed=seed)

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    got, want = compiled(embedding), call(embedding)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    grads = [torch.autograd.grad(loss, embedding)[0] for loss in (got, want)]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-7)


X, T, A, E = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), torch.ones(4), torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (TypeError, "prediction: got dtype", lambda: noise_mse(X.int(), seed=0)),
        (ValueError, "mean of no elements", lambda: noise_mse(X[:0], seed=0)),
        (ValueError, "seed: got -1", lambda: noise_mse(X, seed=-1)),
        (TypeError, "seed: got float", lambda: add_noise_embed(X, T, A, E, seed=0.5)),  # type: ignore[arg-type]
        (TypeError, "latent: got dtype", lambda: add_noise_embed(X.int(), T, A, E, seed=0)),
        (ValueError, r"latent: got shape \(2,\)", lambda: add_noise_embed(X[:, 0], T, A, E, seed=0)),
        (
            ValueError,
            "latent: requires grad",
            lambda: add_noise_embed(X.clone().requires_grad_(), T, A, E, seed=0),
        ),
        (TypeError, "timesteps: got torch.int32", lambda: add_noise_embed(X, T.int(), A, E, seed=0)),
        (ValueError, r"timesteps: got shape \(1,\)", lambda: add_noise_embed(X, T[:1], A, E, seed=0)),
        (ValueError, "timesteps: got 4; accepted: 0 to 3", lambda: add_noise_embed(X, T + 4, A, E, seed=0)),
        (
            ValueError,
            "timesteps: got 2; accepted: 0 to 1",
            lambda: add_noise_embed(X, T + 2, A, E[:2], seed=0),
        ),
        (ValueError, "timesteps: is on meta", lambda: add_noise_embed(X, T.to("meta"), A, E, seed=0)),
        (
            TypeError,
            "alphas_cumprod: got torch.bfloat16",
            lambda: add_noise_embed(X, T, A.bfloat16(), E, seed=0),
        ),
        (ValueError, "alphas_cumprod: got shape", lambda: add_noise_embed(X, T, A[:0], E, seed=0)),
        (ValueError, r"embedding: got shape \(4, 2\)", lambda: add_noise_embed(X, T, A, E[:, :2], seed=0)),
        (ValueError, "embedding: is on meta", lambda: add_noise_embed(X, T, A, E.to("meta"), seed=0)),
    ],
)
def test_refusals_name_the_argument(error: type[Exception], match: str, call: Any) -> None:
    with pytest.raises(error, match=match):
        call()

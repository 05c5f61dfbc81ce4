"""Branch recursion and γ-mix: conformance, gradients, identities, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kdfast.functional import noise_mix, reparam_middle_loss
from kdfast.ops.feature import mix as ops
from kdfast.reference.philox import normal
from tests.conftest import INTERPRETING, Target
from tests.support.conformance import ConformanceSuite, OpCase, assert_verbose_allclose

SEED = 7


def make_branches(generator: torch.Generator, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """``shape`` is [m, …]; every tensor that π does not touch is generic."""
    m = shape[0]
    return {
        "branches": torch.randn(shape, generator=generator),
        "target": torch.randn(shape[1:], generator=generator),
        "u": torch.rand(m, generator=generator),
        "v": torch.rand(m, generator=generator),
        "permutation": torch.randperm(m, generator=generator),
        "noise_scale": torch.rand(m, generator=generator),
    }


def recursion(
    branches: Tensor, target: Tensor, u: Tensor, v: Tensor, permutation: Tensor, noise: Any = None
) -> tuple[Tensor, Tensor]:
    """T, X and P written out as the paper has them, with an X_0 that must not matter."""
    x = p = 0.3 * target + 1.0
    loss = branches.new_zeros(())
    for k, j in enumerate(permutation.tolist()):
        t = u[k] * x + v[k] * target
        p = u[k] * p + v[k] * branches[j]
        loss = loss + ((t - p) ** 2).mean()
        x = t if noise is None else t + noise(k)
    return loss, branches.mean(0)


def chain(branches: Tensor, target: Tensor, u: Tensor, v: Tensor, permutation: Tensor, **_: Tensor) -> Any:
    return reparam_middle_loss(branches, target, u, v, permutation)


def chain_oracle(
    branches: Tensor, target: Tensor, u: Tensor, v: Tensor, permutation: Tensor, **_: Tensor
) -> Any:
    return recursion(branches, target, u, v, permutation)


def sampled(noise_scale: Tensor, **rest: Tensor) -> Any:
    return reparam_middle_loss(**rest, noise_scale=noise_scale, seed=SEED)  # type: ignore[arg-type]


def sampled_oracle(noise_scale: Tensor, **rest: Tensor) -> Any:
    shape = tuple(rest["target"].shape)
    return recursion(**rest, noise=lambda k: noise_scale[k] * normal(SEED, k, shape))


def make_mix(generator: torch.Generator, shape: tuple[int, ...]) -> dict[str, Tensor]:
    return {"x": torch.randn(shape, generator=generator), "gamma": torch.rand(shape[0], generator=generator)}


def mix_oracle(x: Tensor, gamma: Tensor) -> Tensor:
    g = gamma.view(-1, *[1] * (x.dim() - 1))
    return g * x + (1 - g) * normal(SEED, 0, tuple(x.shape))


def branch_case(name: str, run: Any, oracle: Any) -> OpCase:
    def args(inputs: dict[str, Tensor]) -> tuple[Any, ...]:
        s = inputs["branches"].requires_grad_()
        noise = inputs["noise_scale"] if name == "sampled" else None
        call = (inputs["u"], inputs["v"], inputs["permutation"], noise, SEED, None, True)
        return torch.ops.kdfast.reparam_middle.default, (s, inputs["target"], *call)

    return OpCase(
        name=name,
        make=make_branches,
        run=run,
        oracle=oracle,
        # (3, 5) rows odd and short; m = 10 as in the paper; more than one program, with a tail.
        shapes=[(4, 2, 6, 3, 3), (1, 3, 5), (10, 2, 8, 4, 4), (2, 1300)],
        small_shapes=[(3, 2, 4, 3, 3), (1, 3, 5), (2, 300)],
        differentiable=["branches"],
        cast=["branches", "target"],
        launches=1,
        opcheck=args,
        # float16's mean of squares meets branches that were rounded to 11 bits first: both sides see those.
        tolerances={torch.float16: (2e-3, 5e-4), torch.bfloat16: (1.6e-2, 4e-3)},
    )


class TestConformance(ConformanceSuite):
    cases = (
        branch_case("chain", chain, chain_oracle),
        branch_case("sampled", sampled, sampled_oracle),
        OpCase(
            name="noise_mix",
            make=make_mix,
            run=lambda x, gamma: noise_mix(x, gamma, seed=SEED),
            oracle=mix_oracle,
            # 49 a channel is odd; [B, C] logits; more than one program a sample.
            shapes=[(3, 4, 7, 7), (4, 10), (2, 4, 32, 40), (5,)],
            small_shapes=[(3, 4, 3, 3), (4, 10), (2, 4, 8, 10), (5,)],
            differentiable=["x", "gamma"],
            cast=["x", "gamma"],
            launches=1,
            opcheck=lambda inputs: (
                torch.ops.kdfast.noise_mix.default,
                (inputs["x"].requires_grad_(), inputs["gamma"].requires_grad_(), SEED, None),
            ),
            empty_shape=(0, 4, 7),
            tolerances={torch.bfloat16: (1.6e-2, 8e-3), torch.float16: (2e-3, 1e-3)},
        ),
    )


def inputs_of(*shape: int, device: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    made = make_branches(torch.Generator().manual_seed(3), shape)
    keys = ("branches", "target", "u", "v", "permutation")
    return [made[k].to(device, dtype if k in ("branches", "target") else None) for k in keys]


def gradient(loss: Tensor, of: Tensor) -> Tensor:
    return torch.autograd.grad(loss, of, retain_graph=True)[0]


def test_one_branch_is_the_mean_squared_error(target: Target) -> None:
    s, x0, *_ = inputs_of(1, 2, 3, device=target.device)
    zero, one = torch.zeros(1, device=s.device), torch.ones(1, device=s.device)
    loss, mean = reparam_middle_loss(s, x0, zero, one, torch.zeros(1, dtype=torch.int64, device=s.device))
    torch.testing.assert_close(loss, torch.nn.functional.mse_loss(s[0], x0))
    assert torch.equal(mean, s[0])


def test_branches_equal_to_the_target_cost_nothing(target: Target) -> None:
    s, x0, u, v, pi = inputs_of(4, 2, 3, device=target.device)
    assert reparam_middle_loss(x0.expand_as(s), x0, u, v, pi)[0] == 0


def test_permuting_the_branches_back_leaves_the_loss_unchanged(target: Target) -> None:
    s, x0, u, v, pi = inputs_of(5, 2, 3, device=target.device)
    identity = torch.arange(5, device=s.device)
    loss, mean = reparam_middle_loss(s, x0, u, v, pi)
    other, other_mean = reparam_middle_loss(s[pi], x0, u, v, identity)
    assert torch.equal(loss, other)
    assert torch.equal(mean, other_mean) or torch.allclose(mean, other_mean)
    assert not torch.equal(loss, reparam_middle_loss(s, x0, u, v, identity)[0])


def test_a_stacked_convolution_needs_no_copy(target: Target) -> None:
    stacked = torch.randn(2, 3 * 4, 3, 3, device=target.device)  # [B, m·C, H, W]
    view = stacked.unflatten(1, (3, 4)).transpose(0, 1)
    _, x0, u, v, pi = inputs_of(3, 2, 4, 3, 3, device=target.device)
    view = view.detach().requires_grad_()
    dense = view.detach().contiguous().requires_grad_()
    got, want = (reparam_middle_loss(s, x0, u, v, pi) for s in (view, dense))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(gradient(got[0], view), gradient(want[0], dense))


def test_without_carrying_each_step_is_on_its_own(target: Target) -> None:
    s, x0, u, v, pi = inputs_of(3, 2, 5, device=target.device)
    s = s.requires_grad_()
    loss, _ = reparam_middle_loss(s, x0, u, v, pi, carry_gradient=False)
    carried, _ = reparam_middle_loss(s, x0, u, v, pi)
    assert torch.equal(loss, carried)
    assert not torch.allclose(gradient(loss, s), gradient(carried, s))
    behind, want = torch.zeros_like(x0), torch.zeros_like(s)
    for k, j in enumerate(pi.tolist()):
        behind = (u[k] * behind + v[k] * (s[j] - x0)).detach()
        want[j] = v[k] * 2 * behind / x0.numel()
    torch.testing.assert_close(gradient(loss, s), want)


@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_gradients_made_in_forward_are_the_same(target: Target, factor: float) -> None:
    s, x0, u, v, pi = inputs_of(3, 2, 5, device=target.device)
    s = s.requires_grad_()
    loss, mean = reparam_middle_loss(s, x0, u, v, pi, mean_needs_grad=False)
    later, with_grad = reparam_middle_loss(s, x0, u, v, pi)
    assert not mean.requires_grad
    assert with_grad.requires_grad
    want = gradient(later, s) * factor
    for _ in range(2):  # the second backward finds the stored gradients spent
        torch.testing.assert_close(gradient(loss * factor, s), want)


def test_the_mean_alone_has_its_own_gradient(target: Target) -> None:
    s, x0, u, v, pi = inputs_of(4, 2, 3, device=target.device)
    s = s.requires_grad_()
    _, mean = reparam_middle_loss(s, x0, u, v, pi)
    torch.testing.assert_close(gradient(mean.sum(), s), torch.full_like(s, 0.25))


def test_a_device_seed_is_the_number_it_holds(target: Target) -> None:
    s, x0, u, v, pi = inputs_of(3, 2, 5, device=target.device)
    held = torch.tensor(SEED, device=s.device)
    other = held + 1
    losses = [reparam_middle_loss(s, x0, u, v, pi, noise_scale=u, seed=k)[0] for k in (SEED, held, other)]
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[0], losses[2])
    gamma = torch.rand(3, device=s.device)
    mixed = [noise_mix(s, gamma, seed=k) for k in (SEED, held, other)]
    assert torch.equal(mixed[0], mixed[1])
    assert not torch.equal(mixed[0], mixed[2])


def test_gamma_of_one_adds_no_noise_and_zero_leaves_nothing_else(target: Target) -> None:
    x = torch.randn(2, 3, 5, device=target.device)
    gamma = torch.tensor([1.0, 0.0], device=x.device)
    z = noise_mix(x, gamma.view(2, 1, 1), seed=SEED)
    assert torch.equal(z[0], x[0])
    torch.testing.assert_close(z[1].cpu(), normal(SEED, 0, (2, 3, 5))[1].float(), rtol=1e-5, atol=1e-6)


def test_gradients_only_where_they_are_needed(target: Target) -> None:
    x, gamma = torch.randn(2, 5, device=target.device), torch.rand(2, device=target.device)
    both = [t.clone().requires_grad_() for t in (x, gamma)]
    wanted = torch.autograd.grad(noise_mix(both[0], both[1], seed=SEED).square().sum(), both)
    for at in (0, 1):
        leaves = [x, gamma]
        leaves[at] = leaves[at].clone().requires_grad_()
        out = noise_mix(*leaves, seed=SEED).square().sum()
        torch.testing.assert_close(torch.autograd.grad(out, leaves[at])[0], wanted[at])


@pytest.mark.parametrize("op", ["recursion", "mix"])
def test_gradients_can_be_differentiated_again(target: Target, op: str) -> None:
    made = inputs_of(3, 2, 3, device=target.device)
    gamma = torch.rand(3, device=target.device)

    def second(dtype: torch.dtype) -> Tensor:
        s, x0, u, v = (t.detach().to(dtype) for t in made[:4])
        s = s.requires_grad_()
        mixed = op == "mix"
        out = (
            noise_mix(s, gamma.to(dtype), seed=SEED)
            if mixed
            else reparam_middle_loss(s, x0, u, v, made[4])[0]
        )
        (first,) = torch.autograd.grad(out.pow(3).sum(), s, create_graph=True)
        return torch.autograd.grad(first.square().sum(), s)[0]

    assert_verbose_allclose(second(torch.float32), second(torch.float64), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(INTERPRETING, reason="float64 takes the reference")
def test_gradcheck_in_float64() -> None:
    s, x0, u, v, pi = inputs_of(3, 2, 2, device="cpu", dtype=torch.float64)
    s = s.requires_grad_()
    gamma = torch.rand(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: reparam_middle_loss(a, x0, u, v, pi), (s,))
    assert torch.autograd.gradcheck(lambda a, g: noise_mix(a, g, seed=SEED), (s, gamma))
    assert torch.autograd.gradgradcheck(lambda a, g: noise_mix(a, g, seed=SEED), (s, gamma))


def test_compiled_is_eager(target: Target) -> None:
    s, x0, u, v, pi = inputs_of(3, 2, 5, device=target.device)
    s, gamma = s.requires_grad_(), torch.rand(3, device=s.device, requires_grad=True)

    def call(a: Tensor, g: Tensor) -> Tensor:
        loss, mean = reparam_middle_loss(noise_mix(a, g, seed=SEED) * 1.5, x0, u, v, pi, noise_scale=u)
        return loss + mean.square().sum()

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    got, want = (torch.autograd.grad(f(s, gamma), (s, gamma)) for f in (compiled, call))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_many_branches_take_the_reference(target: Target) -> None:
    s, x0, u, v, pi = inputs_of(ops.MAX_BRANCHES + 1, 2, device=target.device)
    got = reparam_middle_loss(s, x0, u * 0.5, v, pi)
    torch.testing.assert_close(got, recursion(s, x0, u * 0.5, v, pi))
    if target.backend == "triton":
        from kdfast.kernels import feature as kernels

        assert kernels.MAX_BRANCHES == ops.MAX_BRANCHES


S, X0, U = torch.zeros(2, 3), torch.zeros(3), torch.ones(2)
PI = torch.arange(2)


@pytest.mark.parametrize(
    "error, match, call",
    [
        (TypeError, "branches: got dtype", lambda: reparam_middle_loss(S.int(), X0, U, U, PI)),
        (TypeError, "target: got list", lambda: reparam_middle_loss(S, [0.0] * 3, U, U, PI)),  # type: ignore[arg-type]
        (ValueError, "m of at least 1", lambda: reparam_middle_loss(S[:0], X0, U[:0], U[:0], PI[:0])),
        (ValueError, "target: got shape", lambda: reparam_middle_loss(S, X0[:2], U, U, PI)),
        (ValueError, "no elements", lambda: reparam_middle_loss(S[:, :0], X0[:0], U, U, PI)),
        (ValueError, r"u: got shape \(1,\)", lambda: reparam_middle_loss(S, X0, U[:1], U, PI)),
        (ValueError, "v: is on meta", lambda: reparam_middle_loss(S, X0, U, U.to("meta"), PI)),
        (TypeError, "noise_scale: got dtype", lambda: reparam_middle_loss(S, X0, U, U, PI, noise_scale=PI)),
        (TypeError, "permutation: got dtype", lambda: reparam_middle_loss(S, X0, U, U, PI.int())),
        (ValueError, r"permutation: got \[0, 0\]", lambda: reparam_middle_loss(S, X0, U, U, PI * 0)),
        (
            ValueError,
            "target: requires grad",
            lambda: reparam_middle_loss(S, X0.clone().requires_grad_(), U, U, PI),
        ),
        (ValueError, "seed: got -1", lambda: reparam_middle_loss(S, X0, U, U, PI, seed=-1)),
        (TypeError, "seed: got float", lambda: noise_mix(S, U, seed=0.5)),  # type: ignore[arg-type]
        (TypeError, "seed: got dtype", lambda: noise_mix(S, U, seed=U[:1])),
        (ValueError, "seed: got shape", lambda: noise_mix(S, U, seed=PI)),
        (ValueError, "seed: is on meta", lambda: noise_mix(S, U, seed=PI[:1].to("meta"))),
        (TypeError, "x: got dtype", lambda: noise_mix(S.int(), U, seed=0)),
        (TypeError, "gamma: got float", lambda: noise_mix(S, 0.5, seed=0)),  # type: ignore[arg-type]
        (ValueError, "0-d", lambda: noise_mix(S.sum(), U, seed=0)),
        (ValueError, "gamma: got shape", lambda: noise_mix(S, U[:1], seed=0)),
        (ValueError, "gamma: got shape", lambda: noise_mix(S, S, seed=0)),
        (ValueError, "gamma: is on meta", lambda: noise_mix(S, U.to("meta"), seed=0)),
    ],
)
def test_refusals_name_the_argument(error: type[Exception], match: str, call: Any) -> None:
    with pytest.raises(error, match=match):
        call()

"""Feature distillation, forward and backward: the pieces of DiffKD and Kdiffusion, each against eager PyTorch.

Traffic in moves of one feature (X bytes, read or written once), forward and backward together, in training:

    noise_mix          eager 18X    ε written, γ·x 2, (1 − γ)·ε 2, sum 3; back γ·g 2, two products summed 8
                       compiled 7X  ε is kept: x, z, ε; g, x, ε, gx            kdfast 5X  ε is drawn again
    branch recursion   eager 26m·X (about), m = 10                             kdfast (3m + 4)X
    BN + ReLU          eager 13X    BN 3, ReLU 2; back 3 and 5                  compiled 8X, kdfast 8X
    BN + DDIM step     eager 19X    BN 3, two products 4, sum 3; back 4 and 5   compiled 10X, kdfast 10X
    BN + squared error eager 15X    BN 3, error 4; back 3 and 5                 compiled 8X, kdfast 5X
    noising and its error
                       eager 18X    ε, two products 4, two sums 5; error 4; back 3 and 1          kdfast 5X

The recursion's loss has the mean of the branches beside it, with a gradient of its own, as when the cross-entropy's
goes through it. Eager noise comes from torch's generator, so that its check is one of size and spread only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kdfast.backend import triton_available
from kdfast.benchmarks.case import Case, Provider, Settings, Traffic, Work, compiled
from kdfast.benchmarks.environment import turns_for
from kdfast.functional import (
    add_noise_embed,
    bn_ddim_step,
    bn_mse,
    bn_relu,
    noise_mix,
    noise_mse,
    reparam_middle_loss,
)
from kdfast.reference.philox import normal

SEED = 7
BRANCHES = 10
#: The first step of DiffKD's five.
C1, C2 = 1.426701, -0.502744


@dataclass(frozen=True)
class _Piece:
    """One fused piece, and the same as people write it.

    Attributes:
        name: Of the case.
        eager, ours: Take the operands; return one tensor or a tuple.
        make: Operands ``(generator, shape) -> tensors``; those that require grad get one.
        moves: Of eager, torch.compile (None: not counted) and kdfast.
        random: The eager noise is another one: only its size can be checked.
    """

    name: str
    eager: Callable[..., Any]
    ours: Callable[..., Any]
    make: Callable[[torch.Generator, tuple[int, ...]], list[Tensor]]
    moves: tuple[float, float | None, float]
    random: bool = False


def cases(settings: Settings) -> Iterator[Case]:
    """All rows of the suite for this device and size of run."""
    latents, branches = (256, 1024, 7, 7), (128, 256, 8, 8)
    if settings.tiny:
        latents = branches = (2, 4, 3, 3)
    elif settings.device == "cpu":
        latents, branches = (8, 256, 7, 7), (8, 64, 8, 8)
    dtypes = [torch.float32] if settings.device == "cpu" else [torch.bfloat16, torch.float32]
    for dtype in dtypes if not settings.quick else dtypes[:1]:
        for piece in _PIECES:
            shape = branches if piece.name == "branch recursion" else latents
            yield _case(piece, shape, dtype, settings)


# --- as people write them ------------------------------------------------------------------------------------


def eager_mix(x: Tensor, gamma: Tensor) -> Tensor:
    """DiffKD's noise adapter, after the factor."""
    factor = gamma.view(-1, 1, 1, 1)
    return factor * x + (1 - factor) * torch.randn_like(x)


def eager_recursion(
    branches: Tensor, x0: Tensor, u: Tensor, v: Tensor, order: Tensor
) -> tuple[Tensor, Tensor]:
    """Kdiffusion's Eqs. 8 to 11 and the branches' mean, step by step."""
    target = state = x0
    loss = x0.new_zeros((), dtype=torch.float32)
    shuffled = branches[order]
    for k in range(branches.shape[0]):
        target = u[k] * target + v[k] * x0
        state = u[k] * state + v[k] * shuffled[k]
        loss = loss + F.mse_loss(state.float(), target.float())
    return loss, branches.mean(0)


def eager_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Batch norm, then ReLU."""
    return F.relu(F.batch_norm(x, None, None, weight, bias, True))


def eager_step(x: Tensor, sample: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The denoiser's last batch norm, then c₁·x + c₂·ε̂."""
    return C1 * sample + C2 * F.batch_norm(x, None, None, weight, bias, True)


def eager_error(x: Tensor, target: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The projection's batch norm, then the mean squared error."""
    return F.mse_loss(F.batch_norm(x, None, None, weight, bias, True).float(), target.float())


def eager_diffusion(
    latent: Tensor, timesteps: Tensor, bars: Tensor, embedding: Tensor
) -> tuple[Tensor, Tensor]:
    """Noising with the time embedding, and the loss of a denoiser that returns its input."""
    noise = torch.randn_like(latent)
    bar = bars[timesteps].view(-1, 1, 1, 1)
    noised = (bar.sqrt() * latent + (1 - bar).sqrt() * noise).to(latent.dtype)
    noised = noised + embedding[timesteps].view(*latent.shape[:2], 1, 1).to(latent.dtype)
    return noised, F.mse_loss(noised.float(), noise.float())


# --- the same in kdfast --------------------------------------------------------------------------------------


def _diffusion(latent: Tensor, timesteps: Tensor, bars: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
    noised = add_noise_embed(latent, timesteps, bars, embedding, seed=SEED)
    return noised, noise_mse(noised, seed=SEED)


def _affine(generator: torch.Generator, channels: int) -> list[Tensor]:
    weight = torch.rand(channels, generator=generator, device=generator.device) + 0.5
    return [t.requires_grad_() for t in (weight, torch.zeros_like(weight))]


def _draw(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device)


def _mix_operands(generator: torch.Generator, shape: tuple[int, ...]) -> list[Tensor]:
    gamma = torch.rand(shape[0], generator=generator, device=generator.device)
    return [_draw(generator, *shape).requires_grad_(), gamma.requires_grad_()]


def _recursion_operands(generator: torch.Generator, shape: tuple[int, ...]) -> list[Tensor]:
    u, v = torch.rand(2, BRANCHES, generator=generator, device=generator.device).unbind()
    order = torch.randperm(BRANCHES, generator=generator, device=generator.device)
    return [_draw(generator, BRANCHES, *shape).requires_grad_(), _draw(generator, *shape), u, v, order]


def _norm_operands(generator: torch.Generator, shape: tuple[int, ...]) -> list[Tensor]:
    return [_draw(generator, *shape).requires_grad_(), *_affine(generator, shape[1])]


def _step_operands(generator: torch.Generator, shape: tuple[int, ...]) -> list[Tensor]:
    x, *affine = _norm_operands(generator, shape)
    return [x, _draw(generator, *shape).requires_grad_(), *affine]


def _error_operands(generator: torch.Generator, shape: tuple[int, ...]) -> list[Tensor]:
    x, *affine = _norm_operands(generator, shape)
    return [x, _draw(generator, *shape), *affine]


def _diffusion_operands(generator: torch.Generator, shape: tuple[int, ...]) -> list[Tensor]:
    device = generator.device
    bars = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0).float().to(device)
    timesteps = torch.randint(1000, shape[:1], generator=generator, device=device)
    return [_draw(generator, *shape), timesteps, bars, _draw(generator, 1280, shape[1]).requires_grad_()]


_PIECES = (
    _Piece(
        "noise_mix",
        eager_mix,
        lambda x, g: noise_mix(x, g, seed=SEED),
        _mix_operands,
        (18, 7, 5),
        random=True,
    ),
    _Piece(
        "branch recursion",
        eager_recursion,
        reparam_middle_loss,
        _recursion_operands,
        (26 * BRANCHES, None, 3 * BRANCHES + 4),
    ),
    _Piece(
        "BN + ReLU",
        eager_relu,
        lambda x, w, b: bn_relu(x, None, None, w, b, True),
        _norm_operands,
        (13, 8, 8),
    ),
    _Piece(
        "BN + DDIM step",
        eager_step,
        lambda x, s, w, b: bn_ddim_step(s, x, None, None, w, b, True, c1=C1, c2=C2),
        _step_operands,
        (19, 10, 10),
    ),
    _Piece(
        "BN + squared error",
        eager_error,
        lambda x, t, w, b: bn_mse(x, t, None, None, w, b, True),
        _error_operands,
        (15, 8, 5),
    ),
    _Piece(
        "noising and its error", eager_diffusion, _diffusion, _diffusion_operands, (18, None, 5), random=True
    ),
)
#: What takes the features' dtype; coefficients, weights and tables stay in float32.
_WIDE = 2


def _case(piece: _Piece, shape: tuple[int, ...], dtype: torch.dtype, settings: Settings) -> Case:
    size = int(torch.Size(shape).numel()) * dtype.itemsize
    turns = turns_for(4 * size, settings.device)
    generator = torch.Generator(settings.device).manual_seed(0)
    inputs: list[list[Tensor]] = []  # made when the first provider is, shared by all

    def operands() -> list[list[Tensor]]:
        while len(inputs) < turns:
            drawn = piece.make(generator, shape)
            inputs.append([_cast(t, dtype) if t.dim() > _WIDE else t for t in drawn])
        return inputs

    def work(function: Callable[..., Any]) -> Work:
        rows = operands()
        return lambda turn: _both_ways(function, rows[turn % turns])

    def check(provider: str, result: tuple[Tensor, ...]) -> None:
        exact = [_cast(t, torch.float64) if t.is_floating_point() else t for t in operands()[0]]
        if piece.random and provider != "kdfast":
            wanted = _both_ways(piece.ours, exact)
            for got, want in zip(result, wanted, strict=True):
                assert got.shape == want.shape
                assert bool(got.isfinite().all())
            return
        wanted = _both_ways(_with_the_same_noise(piece), exact)
        loose = dtype != torch.float32
        limit = 6e-2 if loose and provider != "kdfast" else 1e-2 if loose else 1e-4
        for at, (got, want) in enumerate(zip(result, wanted, strict=True)):
            error = float((got.double() - want).norm() / want.norm().clamp_min(1e-30))
            assert error < limit, f"result {at} is off by {error:.2e} of its norm; limit {limit:.0e}"

    fused = settings.device == "cuda" and triton_available()
    eager, traced, ours = piece.moves
    providers = (
        Provider("eager", lambda: work(piece.eager), _moves(eager, size)),
        Provider(
            "torch.compile",
            lambda: work(compiled(piece.eager)),
            _moves(traced, size) if traced is not None and settings.device == "cuda" else None,
        ),
        Provider("kdfast", lambda: work(piece.ours), _moves(ours, size) if fused else None),
    )
    params = {"shape": "x".join(map(str, shape)), "dtype": str(dtype).removeprefix("torch.")}
    return Case(
        "feature",
        piece.name,
        params,
        turns,
        providers,
        check,
        shape[0],
        "samples",
        working_set=4 * size,
        family="norm" if piece.name.startswith("BN") else "feature",
    )


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(dtype).requires_grad_(tensor.requires_grad)


def _both_ways(function: Callable[..., Any], operands: list[Tensor]) -> tuple[Tensor, ...]:
    """Results, and the gradients of what requires one; a result's upstream gradient is itself, a loss's 1.

    One of 1 everywhere would be lost on a batch norm, whose gradient sums to 0.
    """
    found = function(*operands)
    results = found if isinstance(found, tuple) else (found,)
    leaves = [t for t in operands if t.requires_grad]
    grads = torch.autograd.grad(
        results, leaves, [r.detach() if r.dim() else torch.ones_like(r) for r in results]
    )
    return (*(r.detach() for r in results), *grads)


def _with_the_same_noise(piece: _Piece) -> Callable[..., Any]:
    """The eager form; where it draws noise, with kdfast's own."""
    if not piece.random:
        return piece.eager

    def run(x: Tensor, *rest: Tensor) -> Any:
        noise = normal(SEED, 0, tuple(x.shape), x.device).to(x.dtype)
        if piece.name == "noise_mix":
            factor = rest[0].view(-1, 1, 1, 1)
            return factor * x + (1 - factor) * noise
        timesteps, bars, embedding = rest
        bar = bars[timesteps].view(-1, 1, 1, 1)
        noised = bar.sqrt() * x + (1 - bar).sqrt() * noise + embedding[timesteps].view(*x.shape[:2], 1, 1)
        return noised, F.mse_loss(noised, noise)

    return run


def _moves(count: float, size: int) -> Traffic:
    return Traffic(f"{count:g}X", count * size)

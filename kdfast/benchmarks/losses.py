"""Losses from logits to the student's gradient: the KL divergence, and its kin.

Traffic in moves of one logit tensor (N elements, each read or written once):

    eager       26N   two softmaxes with a division each, kl_div, and the way back
    compiled    5N    where the class dimension fits a persistent reduction; up to 8N elsewhere, so not given there
    kdfast      3N    on the Triton backend; above 16384 classes 3N or 5N, by launch plan, and so not given
                      (the CPU runs the reference, which is not counted)

DIST, in the same moves: eager 76N (two softmaxes, centred and correlated along both dimensions, and back), kdfast 7N.
A cached top-k teacher, of whose V logits k ≪ V are read: eager 13N, kdfast 2N (3N where a row leaves the cache).
Compiled, neither is counted. Two heads without their logits are a suite of their own, linear.py.

Liger's KL starts from log-probabilities: its row has PyTorch's softmaxes before it, since a distillation has, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from kdfast.backend import triton_available
from kdfast.benchmarks.case import Absent, Case, Provider, Settings, Traffic, Work, compiled, peer
from kdfast.benchmarks.environment import turns_for
from kdfast.functional import (
    dist_loss,
    dkd_loss,
    jsd_loss,
    kd_kl_div,
    topk_kd_loss,
)

TEMPERATURE = 4.0
#: Logits a row that a cache keeps of the teacher's.
KEPT = 64
Loss = Callable[..., torch.Tensor]


class _Shape(NamedTuple):
    """One tensor of logits."""

    dims: tuple[int, ...]
    dtype: torch.dtype
    dim: int = -1


Draw = Callable[[torch.Generator, _Shape], list[torch.Tensor]]


class _Moves(NamedTuple):
    """Moves of one logit tensor that a provider makes; None where nobody counted."""

    eager: float | None = None
    compiled: float | None = None
    ours: float | None = None


class _Loss(NamedTuple):
    """One loss, as people write it and as kdfast has it.

    Attributes:
        name, family: Of the case.
        eager, ours: Take the operands, the one that is trained first.
        draw: Makes one turn's operands.
        operands: Logit tensors' worth that one turn touches.
    """

    name: str
    family: str
    eager: Loss
    ours: Loss
    draw: Draw
    operands: int = 3


def eager_kl(student: torch.Tensor, teacher: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """What people write."""
    log_q = F.log_softmax(student / TEMPERATURE, dim=dim)
    p = F.softmax(teacher / TEMPERATURE, dim=dim)
    return F.kl_div(log_q, p, reduction="batchmean") * TEMPERATURE**2


def eager_jsd(student: torch.Tensor, teacher: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """Jensen-Shannon at β = 1/2, with log-probabilities as people mix them."""
    log_q, log_p = F.log_softmax(student / TEMPERATURE, dim), F.log_softmax(teacher / TEMPERATURE, dim)
    log_m = torch.logsumexp(torch.stack((log_p, log_q)), 0) - math.log(2)
    both = F.kl_div(log_m, log_p, reduction="batchmean", log_target=True) + F.kl_div(
        log_m, log_q, reduction="batchmean", log_target=True
    )
    return 0.5 * both * TEMPERATURE**2


def eager_dkd(student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Decoupled KD (Zhao et al. 2022, Eq. 7) at α = 1, β = 8, in the form of the authors' listing."""
    hit = F.one_hot(target, student.shape[-1]).bool()
    q, p = F.softmax(student / TEMPERATURE, -1), F.softmax(teacher / TEMPERATURE, -1)
    q_hit, p_hit = (q * hit).sum(-1), (p * hit).sum(-1)
    log_pair = torch.log(torch.stack((q_hit, 1 - q_hit), -1))
    tckd = F.kl_div(log_pair, torch.stack((p_hit, 1 - p_hit), -1), reduction="batchmean")
    least = torch.finfo(student.dtype).min / 4
    log_q_rest = F.log_softmax((student / TEMPERATURE).masked_fill(hit, least), -1)
    p_rest = F.softmax((teacher / TEMPERATURE).masked_fill(hit, least), -1)
    nckd = F.kl_div(log_q_rest.masked_fill(hit, 0.0), p_rest.masked_fill(hit, 0.0), reduction="batchmean")
    return (tckd + 8.0 * nckd) * TEMPERATURE**2


def eager_dist(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """DIST (Huang et al. 2022, Eq. 9) at β = γ = 1, in the form of the authors' listing."""

    def correlation(a: torch.Tensor, b: torch.Tensor, dim: int) -> torch.Tensor:
        a, b = a - a.mean(dim, keepdim=True), b - b.mean(dim, keepdim=True)
        rho: torch.Tensor = (a * b).sum(dim) / (a.norm(dim=dim) * b.norm(dim=dim) + 1e-8)
        return rho.mean()

    q, p = F.softmax(student / TEMPERATURE, -1), F.softmax(teacher / TEMPERATURE, -1)
    return (2 - correlation(q, p, 1) - correlation(q, p, 0)) * TEMPERATURE**2


def eager_topk(
    student: torch.Tensor, index: torch.Tensor, kept: torch.Tensor, normalizer: torch.Tensor
) -> torch.Tensor:
    """KL over the kept classes and one bucket for all others."""
    log_q = F.log_softmax(student / TEMPERATURE, -1).gather(-1, index)
    p = (kept / TEMPERATURE - normalizer.unsqueeze(-1)).exp()
    rest_q, rest_p = (1 - log_q.exp().sum(-1)).clamp_min(1e-7), (1 - p.sum(-1)).clamp_min(0)
    total = F.kl_div(log_q, p, reduction="sum") + F.kl_div(rest_q.log(), rest_p, reduction="sum")
    return total / student.shape[0] * TEMPERATURE**2


def cases(settings: Settings) -> Iterator[Case]:
    """All rows of the suite for this device and size of run."""
    for shape in _kl_shapes(settings):
        persistent = shape.dim == -1 and shape.dims[-1] <= 1024
        moves = _Moves(26, 5 if persistent else None, _kl_moves(shape))
        yield _case(_Loss("kd_kl_div", "kl", eager_kl, _kl, _pair), shape, settings, moves)
    kin = _Shape(*settings.pick(((8, 10), torch.float32), *2 * (_kin_shape(settings),)))
    three = _Moves(ours=3)
    yield _case(_Loss("jsd_loss", "pair", eager_jsd, _jsd, _pair), kin, settings, three)
    yield _case(_Loss("dkd_loss", "pair", eager_dkd, _dkd, _pair_and_target), kin, settings, three)
    yield _case(_Loss("dist_loss", "dist", eager_dist, _dist, _pair), kin, settings, _Moves(76, None, 7))
    cached = _Loss("topk_kd_loss", "topk", eager_topk, _topk, _cache, operands=2)
    yield _case(cached, _vocabulary(settings), settings, _Moves(13, None, 2))


def _kl_shapes(settings: Settings) -> list[_Shape]:
    if settings.tiny:
        return [_Shape((8, 10), torch.float32)]
    if settings.device == "cpu":
        # CIFAR-100 and ImageNet at the papers' batch.
        quick = [_Shape((64, 100), torch.float32), _Shape((256, 1000), torch.float32)]
        return quick if settings.quick else [*quick, _Shape((64, 32000), torch.float32)]
    # In the order in which one wants them: ImageNet in a large batch and in a usual one, CIFAR-100, language models'
    # vocabularies, Cityscapes' 19 classes.
    quick = [
        _Shape((65536, 1000), torch.bfloat16),
        _Shape((256, 1000), torch.float32),
        _Shape((128, 100), torch.float32),
        _Shape((4096, 32000), torch.bfloat16),
        _Shape((1024, 128256), torch.bfloat16),
        _Shape((8, 19, 256, 512), torch.float32, 1),
        _Shape((8, 19, 256, 512), torch.bfloat16, 1),
        _Shape((8192, 16384), torch.bfloat16),
        _Shape((65536, 1000), torch.float32),
    ]
    more = [(1024, 1000), (8192, 8192), (8192, 32000)]
    return quick if settings.quick else [*quick, *(_Shape(dims, torch.bfloat16) for dims in more)]


def _kin_shape(settings: Settings) -> tuple[tuple[int, int], torch.dtype]:
    return ((65536, 1000), torch.bfloat16) if settings.device == "cuda" else ((256, 1000), torch.float32)


def _vocabulary(settings: Settings) -> _Shape:
    """A language model's last layer: rows of tokens over many classes."""
    if settings.tiny:
        return _Shape((8, 128), torch.float32)
    if settings.device == "cpu":
        return _Shape((128, 8192), torch.float32)
    return _Shape((4096, 32000), torch.bfloat16)


def _kl_moves(shape: _Shape) -> float | None:
    return None if shape.dim == -1 and shape.dims[-1] > 16384 else 3.0


def _kl(student: torch.Tensor, teacher: torch.Tensor, dim: int = -1) -> torch.Tensor:
    return kd_kl_div(student, teacher, TEMPERATURE, dim=dim)


def _jsd(student: torch.Tensor, teacher: torch.Tensor, dim: int = -1) -> torch.Tensor:
    return jsd_loss(student, teacher, temperature=TEMPERATURE, dim=dim)


def _dkd(student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return dkd_loss(student, teacher, target, alpha=1.0, beta=8.0, temperature=TEMPERATURE)


def _dist(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return dist_loss(student, teacher, temperature=TEMPERATURE)


def _topk(
    student: torch.Tensor, index: torch.Tensor, kept: torch.Tensor, normalizer: torch.Tensor
) -> torch.Tensor:
    return topk_kd_loss(student, index, kept, temperature=TEMPERATURE, log_normalizer=normalizer)


def _normal(
    generator: torch.Generator, dims: tuple[int, ...], dtype: torch.dtype, scale: float
) -> torch.Tensor:
    return (scale * torch.randn(dims, generator=generator, device=generator.device)).to(dtype)


def _pair(generator: torch.Generator, shape: _Shape) -> list[torch.Tensor]:
    return [_normal(generator, shape.dims, shape.dtype, 3.0) for _ in range(2)]


def _pair_and_target(generator: torch.Generator, shape: _Shape) -> list[torch.Tensor]:
    pair = _pair(generator, shape)
    target = torch.randint(shape.dims[-1], shape.dims[:-1], generator=generator, device=generator.device)
    return [*pair, target]


def _cache(generator: torch.Generator, shape: _Shape) -> list[torch.Tensor]:
    student, teacher = _pair(generator, shape)
    kept = teacher.float().topk(KEPT, -1)
    return [student, kept.indices, kept.values, torch.logsumexp(teacher.float() / TEMPERATURE, -1)]


def _case(loss: _Loss, shape: _Shape, settings: Settings, moves: _Moves) -> Case:
    elements = int(torch.Size(shape.dims).numel())
    size = elements * shape.dtype.itemsize
    turns = turns_for(loss.operands * size, settings.device)
    generator = torch.Generator(settings.device).manual_seed(0)
    inputs: list[list[torch.Tensor]] = []  # made when the first provider is, shared by all

    def operands() -> list[list[torch.Tensor]]:
        while len(inputs) < turns:
            drawn = loss.draw(generator, shape)
            inputs.append([x.requires_grad_(i == 0) for i, x in enumerate(drawn)])
        return inputs

    extra = {} if shape.dim == -1 else {"dim": shape.dim}

    def work(function: Loss) -> Work:
        rows = operands()

        def step(turn: int) -> tuple[torch.Tensor, ...]:
            drawn = rows[turn % turns]
            value = function(*drawn, **extra)
            return (value, *torch.autograd.grad(value, drawn[:1]))

        return step

    def check(provider: str, result: tuple[torch.Tensor, ...]) -> None:
        exact = [x.detach().double() if x.is_floating_point() else x for x in operands()[0]]
        leaves = [x.requires_grad_() for x in exact[:1]]
        want = loss.eager(*exact, **extra)
        # Eager half-precision arithmetic rounds after every operation; kdfast in float32 has to do better.
        half = shape.dtype != torch.float32
        loose = half and provider != "kdfast"
        value_rtol = 5e-2 if loose else 1e-4
        torch.testing.assert_close(result[0].double(), want, rtol=value_rtol, atol=1e-6)
        limit = 5e-2 if loose else 5e-3 if half else 1e-4
        for got, want_grad in zip(result[1:], torch.autograd.grad(want, leaves), strict=True):
            error = float((got.double() - want_grad).norm() / want_grad.norm())
            assert error < limit, f"the gradient is off by {error:.2e} of its norm; limit {limit:.0e}"

    on_triton = settings.device == "cuda" and triton_available()
    providers = [
        Provider("eager", lambda: work(loss.eager), _moves(moves.eager, size)),
        Provider(
            "torch.compile",
            lambda: work(compiled(loss.eager)),
            _moves(moves.compiled, size) if settings.device == "cuda" else None,
        ),
        Provider("kdfast", lambda: work(loss.ours), _moves(moves.ours, size) if on_triton else None),
    ]
    if loss.family == "kl":
        liger = Provider(
            "Liger", lambda: work(_liger_kl(settings, shape)), config="PyTorch's softmaxes before it"
        )
        providers.insert(2, liger)
    params = {"shape": "x".join(map(str, shape.dims)), "dtype": str(shape.dtype).removeprefix("torch.")}
    if shape.dim != -1:
        params["dim"] = str(shape.dim)
    if loss.family == "topk":
        params["kept"] = str(KEPT)
    return Case(
        "losses",
        loss.name,
        params,
        turns,
        tuple(providers),
        check,
        elements // shape.dims[shape.dim],
        "rows",
        working_set=loss.operands * size,
        family=loss.family,
    )


def _moves(count: float | None, size: int) -> Traffic | None:
    return None if count is None else Traffic(f"{count:g}N", count * size)


def _liger_kl(settings: Settings, shape: _Shape) -> Loss:
    if settings.device != "cuda":
        raise Absent("Liger's kernels are Triton's alone: they need a GPU")
    if shape.dim != -1:
        raise Absent("Liger takes the class dimension last")
    module: Any = peer("liger_kernel.transformers.kl_div").LigerKLDIVLoss(reduction="batchmean")

    def loss(student: torch.Tensor, teacher: torch.Tensor, dim: int = -1) -> torch.Tensor:
        log_q = F.log_softmax(student / TEMPERATURE, dim=dim)
        p = F.softmax(teacher / TEMPERATURE, dim=dim)
        value: torch.Tensor = module(log_q, p) * TEMPERATURE**2
        return value

    return loss

"""Losses from logits to the student's gradient: the KL divergence, and its kin where they differ.

Traffic in moves of one logit tensor (N elements, each read or written once):

    eager       26N   two softmaxes with a division each, kl_div, and the way back
    compiled    5N    where the class dimension fits a persistent reduction; up to 8N elsewhere, so not given there
    kdfast      3N    on the Triton backend; above 16384 classes 3N or 5N, by launch plan, and so not given
                      (the CPU runs the reference, which is not counted)

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
from kdfast.functional import dkd_loss, jsd_loss, kd_kl_div

TEMPERATURE = 4.0
Loss = Callable[..., torch.Tensor]


class _Shape(NamedTuple):
    """One tensor of logits."""

    dims: tuple[int, ...]
    dtype: torch.dtype
    dim: int = -1


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


def cases(settings: Settings) -> Iterator[Case]:
    """All rows of the suite for this device and size of run."""
    for shape in _kl_shapes(settings):
        yield _case("kd_kl_div", shape, settings, eager_kl, _kl, kernel_moves=_kl_moves(shape))
    kin = _Shape(*settings.pick(((8, 10), torch.float32), *2 * (_kin_shape(settings),)))
    yield _case("jsd_loss", kin, settings, eager_jsd, _jsd, kernel_moves=3.0)
    yield _case("dkd_loss", kin, settings, eager_dkd, _dkd, kernel_moves=3.0, with_target=True)


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


def _kl_moves(shape: _Shape) -> float | None:
    return None if shape.dim == -1 and shape.dims[-1] > 16384 else 3.0


def _kl(student: torch.Tensor, teacher: torch.Tensor, dim: int = -1) -> torch.Tensor:
    return kd_kl_div(student, teacher, TEMPERATURE, dim=dim)


def _jsd(student: torch.Tensor, teacher: torch.Tensor, dim: int = -1) -> torch.Tensor:
    return jsd_loss(student, teacher, temperature=TEMPERATURE, dim=dim)


def _dkd(student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return dkd_loss(student, teacher, target, alpha=1.0, beta=8.0, temperature=TEMPERATURE)


def _case(
    name: str,
    shape: _Shape,
    settings: Settings,
    eager: Loss,
    ours: Loss,
    *,
    kernel_moves: float | None,
    with_target: bool = False,
) -> Case:
    elements = int(torch.Size(shape.dims).numel())
    size = elements * shape.dtype.itemsize
    turns = turns_for(3 * size, settings.device)
    generator = torch.Generator(settings.device).manual_seed(0)

    def draw() -> tuple[torch.Tensor, ...]:
        pair = [
            (3 * torch.randn(shape.dims, generator=generator, device=settings.device)).to(shape.dtype)
            for _ in range(2)
        ]
        if not with_target:
            return pair[0], pair[1]
        target = torch.randint(shape.dims[-1], shape.dims[:-1], generator=generator, device=settings.device)
        return pair[0], pair[1], target

    inputs: list[tuple[torch.Tensor, ...]] = []  # made when the first provider is, shared by all

    def operands() -> list[tuple[torch.Tensor, ...]]:
        if not inputs:
            inputs.extend(draw() for _ in range(turns))
            for student, *_ in inputs:
                student.requires_grad_()
        return inputs

    extra = {} if with_target else {"dim": shape.dim}

    def work(loss: Loss) -> Work:
        rows = operands()

        def step(turn: int) -> tuple[torch.Tensor, torch.Tensor]:
            student, *rest = rows[turn % turns]
            value = loss(student, *rest, **extra)
            (grad,) = torch.autograd.grad(value, student)
            return value, grad

        return step

    def liger() -> Work:
        return work(_liger_kl(settings, shape))

    def check(provider: str, result: tuple[torch.Tensor, torch.Tensor]) -> None:
        student, teacher, *rest = operands()[0]
        exact = student.detach().double().requires_grad_()
        want = eager(exact, teacher.detach().double(), *rest, **extra)
        (want_grad,) = torch.autograd.grad(want, exact)
        # Eager half-precision arithmetic rounds after every operation; kdfast in float32 has to do better.
        half = shape.dtype != torch.float32
        loose = half and provider != "kdfast"
        value_rtol = 5e-2 if loose else 1e-4
        torch.testing.assert_close(result[0].double(), want, rtol=value_rtol, atol=1e-6)
        error = (result[1].double() - want_grad).norm() / want_grad.norm()
        limit = 5e-2 if loose else 5e-3 if half else 1e-4
        assert float(error) < limit, (
            f"the gradient is off by {float(error):.2e} of its norm; limit {limit:.0e}"
        )

    on_triton = settings.device == "cuda" and triton_available()
    counted = name == "kd_kl_div"
    persistent = shape.dim == -1 and shape.dims[-1] <= 1024
    providers = [
        Provider("eager", lambda: work(eager), _moves(26, size) if counted else None),
        Provider(
            "torch.compile",
            lambda: work(compiled(eager)),
            _moves(5, size) if counted and persistent and settings.device == "cuda" else None,
        ),
        Provider(
            "kdfast", lambda: work(ours), _moves(kernel_moves, size) if on_triton and kernel_moves else None
        ),
    ]
    if counted:
        providers.insert(2, Provider("Liger", liger, config="PyTorch's softmaxes before it"))
    dims = "x".join(map(str, shape.dims))
    params = {"shape": dims, "dtype": str(shape.dtype).removeprefix("torch.")}
    if shape.dim != -1:
        params["dim"] = str(shape.dim)
    rows = elements // shape.dims[shape.dim]
    return Case("losses", name, params, turns, tuple(providers), check, rows, "rows", working_set=3 * size)


def _moves(count: float, size: int) -> Traffic:
    return Traffic(f"{count:g}N", count * size)


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

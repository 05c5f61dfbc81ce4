"""The calls whose cost on the host has a target: what a training or sampling step makes of each family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bench.hostbench import Case
from kdfast import functional as F
from kdfast.functional.divergence import Kind

Call = Callable[[], object]


def _logits() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(128, 100, requires_grad=True), torch.randn(128, 100)


def _loss(loss: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[[], Call]:
    """Forward and backward of a loss of student, teacher and labels."""

    def make() -> Call:
        student, teacher = _logits()
        labels = torch.randint(0, 100, (128,))
        return lambda: torch.autograd.grad(loss(student, teacher, labels), student)

    return make


def _no_grad(call: Callable[[torch.Tensor, torch.Tensor], object]) -> Callable[[], Call]:
    def make() -> Call:
        student, teacher = (x.detach() for x in _logits())
        return lambda: call(student, teacher)

    return make


def _step() -> Call:
    sample, output, table = torch.randn(4, 4, 32, 32), torch.randn(8, 4, 32, 32), torch.rand(50, 10)
    return lambda: F.denoise_step(sample, output, table, 3, guidance_scale=4.0)


def _step_cfg() -> Call:
    from kdfast.diffusion import DDIMScheduler

    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(50)
    sample, output, timestep = (
        torch.randn(4, 4, 32, 32),
        torch.randn(8, 4, 32, 32),
        int(scheduler.timesteps[3]),
    )
    return lambda: scheduler.step_cfg(output, timestep, sample, 4.0, return_dict=False)


def _buffer() -> Any:
    from kdfast.replay import PrioritizedReplayBuffer

    buffer = PrioritizedReplayBuffer(1024, (3, 8, 8), device="cpu")
    buffer.extend(torch.zeros(512, 3, 8, 8, dtype=torch.uint8))
    return buffer


def _sample() -> Call:
    buffer = _buffer()
    return lambda: buffer.sample(256)


def _update() -> Call:
    buffer, index, priority = _buffer(), torch.arange(256), torch.rand(256)
    return lambda: buffer.update_priority(index, priority)


def _noise_mix() -> Call:
    x, gamma = torch.randn(32, 64, 8, 8, requires_grad=True), torch.rand(32)
    up = torch.ones(32, 64, 8, 8)
    return lambda: torch.autograd.grad(F.noise_mix(x, gamma, seed=3), x, up)


def _noise_mse() -> Call:
    x = torch.randn(32, 64, 8, 8, requires_grad=True)
    return lambda: torch.autograd.grad(F.noise_mse(x, seed=3), x)


def _bn(call: Callable[..., torch.Tensor], **options: Any) -> Callable[[], Call]:
    def make() -> Call:
        x, other = torch.randn(32, 64, 8, 8, requires_grad=True), torch.randn(32, 64, 8, 8)
        norm = torch.nn.BatchNorm2d(64)
        held = (norm.running_mean, norm.running_var, norm.weight, norm.bias, True, 0.1, 1e-5)
        inputs = (x, norm.weight, norm.bias)
        count = norm.num_batches_tracked

        def run() -> object:
            if call is F.bn_relu:
                out = call(x, *held, num_batches_tracked=count)
            elif call is F.bn_mse:
                out = call(x, other, *held, num_batches_tracked=count)
            else:
                out = call(other, x, *held, num_batches_tracked=count, **options)
            return torch.autograd.grad(out, inputs, other if out.dim() else None)

        return run

    return make


def _reparam() -> Call:
    branches, target = torch.randn(10, 32, 64, 4, 4, requires_grad=True), torch.randn(32, 64, 4, 4)
    u, v, permutation = torch.rand(10), torch.rand(10), torch.randperm(10)
    return lambda: torch.autograd.grad(
        F.reparam_middle_loss(branches, target, u, v, permutation)[0], branches
    )


def _bn_statistics() -> Call:
    x = torch.randn(32, 64, 8, 8, requires_grad=True)
    mean, var = torch.zeros(64), torch.ones(64)
    return lambda: torch.autograd.grad(F.bn_statistics_loss(x, mean, var)[0], x)


def _crop() -> Call:
    images = torch.zeros(64, 3, 32, 32, dtype=torch.uint8)
    offsets, flips = F.draw_crop_flip(images)
    return lambda: F.crop_flip_normalize(images, offsets, flips, 0.5, 0.25)


def _shaders() -> Call:
    codes, values = torch.zeros(4, 8, dtype=torch.int32), torch.zeros(4, 8, 16)
    program, time = torch.zeros(16, dtype=torch.int64), torch.zeros(16)
    return lambda: F.render_shaders(codes, values, values, program, time, (32, 32))


def _divergence(kind: Kind, **options: Any) -> Callable[[], Call]:
    return _loss(lambda s, t, y: F.divergence_loss(s, t, kind=kind, temperature=2.0, **options))


def _topk() -> Call:
    student, teacher = _logits()
    kept = teacher.topk(16)
    return lambda: torch.autograd.grad(
        F.topk_kd_loss(student, kept.indices, kept.values, temperature=2.0), student
    )


def _linear(**options: Any) -> Callable[[], Call]:
    """A head of one chunk: what stands on the host beside its products."""

    def make() -> Call:
        hidden, weight = (torch.randn(128, 32, requires_grad=True), torch.randn(100, 32, requires_grad=True))
        known = torch.randn(128, 48), torch.randn(100, 48)
        return lambda: torch.autograd.grad(
            F.fused_linear_kd_loss(hidden, weight, *known, temperature=2.0, **options), (hidden, weight)
        )

    return make


CASES = (
    Case("kd_kl_div f+b", 35, 2, _loss(lambda s, t, y: F.kd_kl_div(s, t, 4.0))),
    Case("jsd_loss f+b", 35, 2, _loss(lambda s, t, y: F.jsd_loss(s, t, temperature=2.0))),
    Case("dkd_loss f+b", 35, 2, _loss(lambda s, t, y: F.dkd_loss(s, t, y))),
    Case("kd_kl_div without grad", 15, 1, _no_grad(lambda s, t: F.kd_kl_div(s, t, 4.0))),
    Case("kd_statistics", 15, 1, _no_grad(lambda s, t: F.kd_statistics(s, t, 4.0))),
    Case(
        "distillation_loss f+b",
        50,
        2,
        _loss(lambda s, t, y: F.distillation_loss(s, t, y, temperature=4.0, ce_weight=0.5)),
    ),
    Case("denoise_step, guided", 15, 1, _step),
    Case("DDIMScheduler.step_cfg", 25, 1, _step_cfg),
    Case("replay.sample", 20, 1, _sample),
    Case("replay.update_priority", 12, 1, _update),
    Case("noise_mix f+b", 40, 2, _noise_mix),
    Case("noise_mse f+b", 40, 2, _noise_mse),
    Case("bn_relu f+b", 60, 4, _bn(F.bn_relu)),
    Case("bn_mse f+b", 60, 3, _bn(F.bn_mse)),
    Case("bn_ddim_step f+b", 60, 4, _bn(F.bn_ddim_step, c1=0.9, c2=0.1)),
    Case("reparam_middle_loss f+b", 45, 2, _reparam),
    Case("bn_statistics_loss f+b", 45, 2, _bn_statistics),
    Case("dist_loss f+b", 60, 5, _loss(lambda s, t, y: F.dist_loss(s, t))),
    Case("divergence_loss forward_kl f+b", 35, 2, _divergence("forward_kl")),
    Case("divergence_loss reverse_kl f+b", 35, 2, _divergence("reverse_kl")),
    Case("divergence_loss alpha f+b", 35, 2, _divergence("alpha")),
    Case("divergence_loss, T of the teacher f+b", 35, 2, _divergence("reverse_kl", teacher_temperature=3.0)),
    Case("topk_kd_loss f+b", 35, 2, _topk),
    Case("fused_linear_kd_loss f+b", None, 1, _linear()),
    Case("fused_linear_kd_loss reverse_kl f+b", None, 1, _linear(kind="reverse_kl")),
    Case("crop_flip_normalize", 15, 1, _crop),
    Case("render_shaders", 15, 1, _shaders),
)

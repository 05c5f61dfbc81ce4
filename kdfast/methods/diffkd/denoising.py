"""One pair: everything between a student's feature, a teacher's, and their loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from kdfast.functional import add_noise_embed, noise_mix, noise_mse
from kdfast.methods.diffkd import fused
from kdfast.methods.diffkd.blocks import Autoencoder, FeatureDenoiser, LogitDenoiser, NoiseAdapter
from kdfast.methods.diffkd.config import DiffKDConfig, Distance
from kdfast.methods.diffkd.distance import distance
from kdfast.methods.diffkd.schedule import Schedule, student_steps

__all__ = ["Denoising", "Terms"]


@dataclass(frozen=True)
class Terms:
    """What a pair adds to the loss, 0-d tensors.

    Attributes:
        diffusion: mean((ε̂ − ε)²), Eq. 4.
        autoencoder: mean((dec(enc(f)) − f)²), Eq. 6; 0 without an autoencoder.
        kd: d(proj(ẑ), enc(f)), Eq. 7.
        gamma: Mean of γ over the batch, detached; 1 without an adapter.
    """

    diffusion: Tensor
    autoencoder: Tensor
    kd: Tensor
    gamma: Tensor


class Denoising(nn.Module):
    """The method for one pair of maps ``[B, C, H, W]`` (vectors are 1×1 maps).

    Args:
        student_channels: Cs.
        teacher_channels: Ct.
        dense: Maps, or vectors, for which denoiser and adapter are perceptrons.
        latent: Width of the autoencoder, None for none.
        distance: d.
        config: Of the method.
    """

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        *,
        dense: bool,
        latent: int | None,
        distance: Distance,
        config: DiffKDConfig,
    ) -> None:
        super().__init__()
        width = latent or teacher_channels
        self.config, self.distance = config, distance
        self.trans = nn.Conv2d(student_channels, width, 1)
        self.autoencoder = Autoencoder(teacher_channels, latent) if latent else None
        self.denoiser = FeatureDenoiser(width) if dense else LogitDenoiser(width)
        self.adapter = NoiseAdapter(width, dense=dense) if config.adapter else None
        self.proj = nn.Conv2d(width, width, 1) if config.proj else None
        self.proj_norm = nn.BatchNorm2d(width) if config.proj else None
        self.schedule = Schedule(config.train_steps, config.beta_start, config.beta_end)
        self.steps = tuple(
            student_steps(
                config.steps,
                train_steps=config.train_steps,
                beta_start=config.beta_start,
                beta_end=config.beta_end,
            )
        )

    def forward(self, student: Tensor, teacher: Tensor, weight: Tensor | None = None) -> Terms:
        """The terms of a batch.

        Args:
            student: ``[B, Cs, H, W]``; gets gradients from ``kd`` alone.
            teacher: ``[B, Ct, H, W]``, without gradient.
            weight: ``[B, 1, H, W]``, how much each place counts in ``kd``; None for all alike.

        Raises:
            ValueError: One value a channel, which batch norm cannot normalise in training.
        """
        if self.training and teacher.numel() == teacher.shape[1]:
            raise ValueError(
                f"batch: got {teacher.shape[0]} sample of {teacher.shape[2]}×{teacher.shape[3]}; batch norm needs at "
                "least 2 values a channel in training (a larger batch, or drop_last in the loader)"
            )
        target, reconstruction = self.encode(teacher)
        start, gamma = self.start(student)
        kd = self._compare(self.clean(start), target, weight)
        return Terms(self.diffusion(target), reconstruction, kd, gamma.detach().mean())

    def encode(self, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's latent ``[B, L, H, W]``, detached, and the autoencoder's loss."""
        if self.autoencoder is None:
            return teacher.detach(), teacher.new_zeros((), dtype=torch.float32)
        latent, decoded = self.autoencoder(teacher)
        return latent.detach(), distance("mse", decoded, teacher, self.config)

    def start(self, student: Tensor) -> tuple[Tensor, Tensor]:
        """z_T of Eq. 8 ``[B, L, H, W]``, and γ ``[B]``."""
        feature = self.trans(student)
        if self.adapter is None:
            return feature, torch.ones(feature.shape[0], device=feature.device)
        gamma = self.adapter(feature)
        return noise_mix(feature, gamma, seed=_seed(feature)), gamma

    def clean(self, z: Tensor) -> Tensor:
        """The denoising steps: ẑ, before ``proj``."""
        for step in self.steps:
            if self.config.checkpoint and torch.is_grad_enabled():
                # Nothing random happens in a step, so that no generator has to be kept, which would mean to wait.
                z = checkpoint(
                    self._step,
                    z,
                    *step,
                    use_reentrant=False,
                    preserve_rng_state=False,
                    context_fn=self._contexts,
                )
            else:
                z = self._step(z, *step)
        return z

    def _step(self, z: Tensor, t: int, c1: float, c2: float) -> Tensor:
        # All samples stand at one t, and what would be added for it the next batch norms of training cancel. Nor is it
        # added in evaluation: their running statistics are of passes without it, but for one in `steps` + 1.
        return fused.bn_step(self.denoiser(z), self.denoiser.norm, z, c1, c2)

    def _contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _on_copies(self.denoiser)

    def project(self, z: Tensor) -> Tensor:
        """What is compared with the teacher's latent."""
        return z if self.proj is None or self.proj_norm is None else fused.bn(self.proj(z), self.proj_norm)

    def _compare(self, z: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        if self.distance == "mse" and weight is None and self.proj is not None and self.proj_norm is not None:
            return fused.bn_mse(self.proj(z), self.proj_norm, target)
        return distance(self.distance, self.project(z), target, self.config, weight)

    def diffusion(self, latent: Tensor) -> Tensor:
        """L_diff of Eq. 4 for a detached latent: one t ~ U{0 … T − 1} a sample."""
        seed = _seed(latent)
        times = torch.randint(len(self.schedule), (latent.shape[0],), device=latent.device)
        noisy = add_noise_embed(latent, times, self.schedule.bars, self.denoiser.embedding.weight, seed=seed)
        # A pass of its own: batch norm's statistics of teacher and student stay apart.
        pred = self.denoiser(noisy)
        return noise_mse(
            pred if self.denoiser.norm is None else fused.bn(pred, self.denoiser.norm), seed=seed
        )


def _seed(like: Tensor) -> Tensor:
    """From the device's own generator: no wait, and anew at each replay of a CUDA graph."""
    return torch.randint(2**62, (1,), device=like.device)


@contextmanager
def _on_copies(module: nn.Module) -> Iterator[None]:
    """Let a second pass over the same batch count up copies of the running statistics."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]
    kept = [dict(norm._buffers) for norm in norms]
    for norm in norms:
        for name, value in norm._buffers.items():
            norm._buffers[name] = None if value is None else value.clone()
    try:
        yield
    finally:
        for norm, buffers in zip(norms, kept):
            norm._buffers.update(buffers)

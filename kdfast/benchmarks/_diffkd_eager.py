"""DiffKD as one writes it in eager PyTorch with diffusers' scheduler, on the modules (and weights) of kdfast's.

The same layers, the same five steps, the same loss: only nothing is fused, and the steps are the scheduler's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kdfast.benchmarks.case import peer
from kdfast.methods.diffkd.blocks import Bottleneck, FeatureDenoiser, LogitDenoiser
from kdfast.methods.diffkd.denoising import Denoising


def scheduler(device: str, steps: int = 5) -> Any:
    """diffusers' DDIM, at twice the steps, with its table on the device."""
    made = peer("diffusers").DDIMScheduler(clip_sample=False)
    made.set_timesteps(2 * steps)
    made.alphas_cumprod = made.alphas_cumprod.to(device)
    return made


def terms(module: Denoising, ddim: Any, student: Tensor, teacher: Tensor) -> Tensor:
    """Diffusion, autoencoder and distance of a pair, ``[3]``."""
    latent, reconstruction = teacher, teacher.new_zeros(())
    if module.autoencoder is not None:
        encoded = module.autoencoder.norm(module.autoencoder.encoder(teacher))
        reconstruction = F.mse_loss(module.autoencoder.decoder(encoded).float(), teacher.float())
        latent = encoded.detach()
    feature = module.trans(student)
    gamma = _gamma(module, feature)[:, None, None, None]
    z = gamma * feature + (1 - gamma) * torch.randn_like(feature)
    times = ddim.timesteps.tolist()
    for t in times[len(times) // 2 :]:
        rows = torch.full((z.shape[0],), t, device=z.device, dtype=torch.long)
        z = ddim.step(_denoise(module.denoiser, z, rows), t, z).prev_sample
    noise = torch.randn_like(latent)
    rows = torch.randint(1000, (latent.shape[0],), device=latent.device)
    noisy = ddim.add_noise(latent.float(), noise.float(), rows).to(latent.dtype)
    diffusion = F.mse_loss(_denoise(module.denoiser, noisy, rows).float(), noise.float())
    projected = z
    if module.proj is not None and module.proj_norm is not None:
        projected = module.proj_norm(module.proj(z))
    if module.distance == "kl":
        log_q, p = projected.flatten(1).float().log_softmax(1), latent.flatten(1).float().softmax(1)
        kd = F.kl_div(log_q, p, reduction="batchmean")
    else:
        kd = F.mse_loss(projected.float(), latent.float())
    return torch.stack([diffusion, reconstruction.float(), kd])


def _denoise(denoiser: FeatureDenoiser | LogitDenoiser, z: Tensor, times: Tensor) -> Tensor:
    x = z + denoiser.embedding(times)[:, :, None, None].to(z.dtype)
    if isinstance(denoiser, FeatureDenoiser):
        x = denoiser.out(_bottleneck(denoiser.block2, _bottleneck(denoiser.block1, x)))
        normed: Tensor = x if denoiser.norm is None else denoiser.norm(x)
        return normed
    hidden = denoiser.bn2(denoiser.fc2(F.relu(denoiser.bn1(denoiser.fc1(x)))))
    out: Tensor = denoiser.out(F.relu(denoiser.bn3(denoiser.fc3(hidden))))
    return out


def _bottleneck(block: Bottleneck, x: Tensor) -> Tensor:
    out = F.relu(block.bn1(block.conv1(x)))
    out = F.relu(block.bn2(block.conv2(out)))
    summed: Tensor = block.bn3(block.conv3(out)) + x
    return summed


def _gamma(module: Denoising, x: Tensor) -> Tensor:
    adapter = module.adapter
    if adapter is None:
        return torch.ones(x.shape[0], device=x.device, dtype=x.dtype)
    if adapter.dense:
        seen = _bottleneck(adapter.block, x)
    else:
        seen = adapter.bn2(adapter.fc2(F.relu(adapter.bn1(adapter.fc1(x)))))
    gamma: Tensor = adapter.out(seen.mean((2, 3))).float().softmax(1)[:, 0].to(x.dtype)
    return gamma

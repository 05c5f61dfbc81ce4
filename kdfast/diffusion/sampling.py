"""The sampling loop, and noise that belongs to an image instead of to a batch.

Every image has a key (run seed, class, index). Its noise is drawn from a counter-based generator under that key, so
it does not depend on the batch, shard, rank or device that happens to make it.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from kdfast.profiling import annotate

_CLASS_BITS = 24
_INDEX_BITS = 40


def sample_noise(
    seed: int,
    classes: Sequence[int],
    indices: Sequence[int],
    shape: Sequence[int],
    *,
    attempt: int = 0,
    paper_rng: bool = False,
) -> torch.Tensor:
    """Standard normal noise, one row for each image's key.

    Drawn by NumPy's Philox4x64-10 with the 128-bit key (seed, class, index), on the CPU whatever the device, so that
    no two keys share a stream and every machine makes the same noise.

    Args:
        seed: The run's seed, in [0, 2⁶⁴).
        classes: Class of each image, in [0, 2²⁴).
        indices: Index of each image within its class, in [0, 2⁴⁰).
        shape: Shape of one row.
        attempt: 0 for the first draw; a further one gives fresh noise for the same key.
        paper_rng: Leave the class out of the key, as DM-KD's published generation code does: image i of every class
            then begins at the same noise.

    Returns:
        float32 ``[len(classes), *shape]`` on the CPU.
    """
    rows = np.empty((len(classes), *shape), dtype=np.float32)
    for row, key in zip(rows, _keys(seed, classes, indices, paper_rng)):
        philox = np.random.Philox(counter=[0, 0, 0, attempt], key=np.array(key, dtype=np.uint64))
        row[...] = np.random.Generator(philox).standard_normal(row.shape, dtype=np.float32)
    return torch.from_numpy(rows)


def step_generators(
    seed: int, classes: Sequence[int], indices: Sequence[int], *, attempt: int = 0, paper_rng: bool = False
) -> list[torch.Generator]:
    """One generator an image, for the noise that a stochastic sampler adds at each step.

    diffusers' schedulers take such a list and draw each row from its own generator.
    """
    generators = []
    for key in _keys(seed, classes, indices, paper_rng):
        # The CPU generator keeps 32 bits of its seed, so the key is hashed down; two images in a run that collide
        # still differ, because the noise they begin with has its full key.
        words = np.random.SeedSequence([*key, attempt]).generate_state(1, np.uint64)
        generators.append(torch.Generator().manual_seed(int(words[0])))
    return generators


def step_seeds(
    seed: int, classes: Sequence[int], indices: Sequence[int], *, attempt: int = 0, paper_rng: bool = False
) -> torch.Tensor:
    """The key of each image's noise where the sampler's step makes it on the device.

    Returns:
        int64 ``[len(classes)]`` on the CPU, not negative: 63 bits hashed from the full key.
    """
    keys = _keys(seed, classes, indices, paper_rng)
    words = [np.random.SeedSequence([*key, attempt]).generate_state(1, np.uint64)[0] >> 1 for key in keys]
    return torch.tensor([int(word) for word in words], dtype=torch.int64)


@annotate("sample_latents")
@torch.no_grad()
def sample_latents(
    denoiser: torch.nn.Module,
    scheduler: Any,
    noise: torch.Tensor,
    labels: torch.Tensor,
    *,
    guidance_scale: float = 1.0,
    null_class: int | None = None,
    cfg_channels: int | None = None,
    eta: float = 0.0,
    generators: list[torch.Generator] | None = None,
) -> torch.Tensor:
    """Run a class-conditional denoiser from noise to latents over the scheduler's timesteps.

    Classifier-free guidance, ``u + s·(c − u)``, happens inside the scheduler's fused step. At ``guidance_scale=1`` the
    unconditional half would cancel, so it is not computed.

    Args:
        denoiser: Called as diffusers' ``DiTTransformer2DModel``: ``denoiser(x, timestep=t, class_labels=y).sample``.
            It may return twice the channels (learned variance).
        scheduler: One of kdfast's schedulers, after ``set_timesteps``.
        noise: ``[B, C, H, W]``, standard normal, on the denoiser's device.
        labels: int64 ``[B]``, same device.
        guidance_scale: s.
        null_class: The label that stands for "no class"; needed when s ≠ 1.
        cfg_channels: Guide only the first so many channels (the original DiT code: 3 of 4); ``None`` guides all.
        eta: DDIM's η; other samplers ignore it.
        generators: One an image, for stochastic samplers; see :func:`step_generators`.

    Returns:
        ``[B, C, H, W]``, float32.

    Raises:
        ValueError: s ≠ 1 without ``null_class``.
    """
    guided = guidance_scale != 1.0
    if guided and null_class is None:
        raise ValueError(
            f"null_class: got None, but guidance_scale={guidance_scale} needs the unconditional label"
        )
    dtype = next(denoiser.parameters()).dtype
    # Flow matching has neither: its noise and its model's input are x itself.
    x = noise.float() * getattr(scheduler, "init_noise_sigma", 1.0)
    scale = getattr(scheduler, "scale_model_input", lambda sample, _: sample)
    if guided:
        labels = torch.cat([labels, torch.full_like(labels, null_class or 0)])
    options: dict[str, Any] = {"generator": generators}
    step = scheduler.step_cfg if guided else scheduler.step
    if "eta" in inspect.signature(step).parameters:
        options["eta"] = eta
    for timestep in scheduler.timesteps:
        latents = scale(x, timestep).to(dtype)
        if guided:
            latents = torch.cat([latents, latents])
        output = denoiser(latents, timestep=timestep.expand(len(latents)), class_labels=labels).sample
        if guided:
            x = step(
                output, timestep, x, guidance_scale, order="cond_uncond", cfg_channels=cfg_channels, **options
            ).prev_sample
        else:
            x = step(_without_variance(output, x, scheduler), timestep, x, **options).prev_sample
    result: torch.Tensor = x.float()
    return result


def _without_variance(output: torch.Tensor, x: torch.Tensor, scheduler: Any) -> torch.Tensor:
    """Drop the learned-variance channels for a sampler that has no use for them."""
    if output.shape[1] == 2 * x.shape[1] and "learned" not in str(scheduler.config.get("variance_type", "")):
        return output[:, : x.shape[1]]
    return output


def _keys(
    seed: int, classes: Sequence[int], indices: Sequence[int], paper_rng: bool
) -> list[tuple[int, int]]:
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed: got {seed}, accepted: 0 to 2**64 - 1")
    if len(classes) != len(indices):
        raise ValueError(f"indices: got {len(indices)} for {len(classes)} classes; one each is needed")
    keys = []
    for label, index in zip(classes, indices):
        if not 0 <= label < 2**_CLASS_BITS:
            raise ValueError(f"classes: got {label}, accepted: 0 to 2**{_CLASS_BITS} - 1")
        if not 0 <= index < 2**_INDEX_BITS:
            raise ValueError(f"indices: got {index}, accepted: 0 to 2**{_INDEX_BITS} - 1")
        keys.append((seed, ((0 if paper_rng else label) << _INDEX_BITS) | index))
    return keys

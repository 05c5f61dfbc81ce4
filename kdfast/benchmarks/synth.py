"""From class labels to images on disk: the synthesizer beside diffusers' own pipeline and PNG files.

Both sample the same network with random weights (DiT-XL/2 at 256² with Stable Diffusion's VAE on a GPU, a miniature of
it on a CPU), DDIM, guidance 2, at the same precision. The peer is the loop that people write: the pipeline for a batch,
then PIL for each image. "Sampling alone" neither decodes nor writes: what is left of its rate end to end says how well
the rest is hidden. Image by image, both are asked for one picture at a time.
"""

from __future__ import annotations

import functools
import itertools
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kdfast.benchmarks.case import Absent, Case, Provider, Settings, Work, peer

GUIDANCE = 2.0
_XL = {
    "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8, "num_layers": 28,
    "sample_size": 32, "patch_size": 2, "num_embeds_ada_norm": 1000,
}  # fmt: skip
_XL_VAE = {
    "block_out_channels": (128, 256, 512, 512), "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4, "latent_channels": 4, "layers_per_block": 2, "sample_size": 256,
}  # fmt: skip
_MINI = {
    **_XL, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "sample_size": 8,
    "norm_num_groups": 4,
}  # fmt: skip
_MINI_VAE = {
    **_XL_VAE, "block_out_channels": (8, 8), "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2, "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 16,
}  # fmt: skip


@dataclass(frozen=True)
class _Size:
    """What one call makes."""

    model: str
    images: int
    batch: int
    steps: int
    dtype: torch.dtype


def cases(settings: Settings) -> Iterator[Case]:
    """All rows of the suite for this device and size of run."""
    if settings.device == "cuda":
        size = settings.pick(
            _Size("miniature", 4, 2, 2, torch.bfloat16),
            _Size("DiT-XL/2", 64, 64, 10, torch.bfloat16),
            _Size("DiT-XL/2", 128, 64, 50, torch.bfloat16),
        )
    else:
        size = settings.pick(
            _Size("miniature", 4, 2, 2, torch.float32),
            _Size("miniature", 64, 32, 10, torch.float32),
            _Size("miniature", 256, 32, 25, torch.float32),
        )
    yield _end_to_end(size, settings)
    yield _one_by_one(size, settings)


@functools.lru_cache(maxsize=2)
def _networks(model: str, dtype: torch.dtype, device: str) -> tuple[Any, Any]:
    """Transformer and VAE, the same for every provider."""
    diffusers = peer("diffusers")
    torch.manual_seed(0)
    transformer, vae = (_XL, _XL_VAE) if model == "DiT-XL/2" else (_MINI, _MINI_VAE)
    parts = diffusers.DiTTransformer2DModel(**transformer), diffusers.AutoencoderKL(**vae)
    network, decoder = (part.to(device, dtype).eval() for part in parts)
    return network, decoder


def _pipeline(size: _Size, device: str) -> Any:
    diffusers = peer("diffusers")
    transformer, vae = _networks(size.model, size.dtype, device)
    pipe = diffusers.DiTPipeline(transformer, vae, diffusers.DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _synthesizer(size: _Size, device: str, mode: Any) -> Any:
    from kdfast.diffusion import DDIMScheduler, Synthesizer

    transformer, vae = _networks(size.model, size.dtype, device)
    return Synthesizer(
        transformer,
        DDIMScheduler(clip_sample=False),
        vae=vae,
        num_inference_steps=size.steps,
        guidance_scale=GUIDANCE,
        weights_id="random",
        mode=mode,
    )


def _params(size: _Size) -> dict[str, Any]:
    return {
        "model": size.model,
        "steps": size.steps,
        "guidance": GUIDANCE,
        "dtype": str(size.dtype).removeprefix("torch."),
    }


def _cuda_only(device: str) -> str:
    if device != "cuda":
        raise Absent("compiling a denoiser pays on a GPU; it is not measured on the CPU")
    return device


# --- end to end ---------------------------------------------------------------------------------------------------


def _end_to_end(size: _Size, settings: Settings) -> Case:
    device = settings.device

    def check(provider: str, made: int) -> None:
        assert made == size.images, f"{made} images; {size.images} were asked for"

    providers = (
        Provider("diffusers + PNG", lambda: _png(size, device, False), graph=False),
        Provider("diffusers compiled + PNG", lambda: _png(size, device, True), graph=False),
        Provider("kdfast", lambda: _shards(size, device, "auto"), graph=False, config="JPEG 95 in shards"),
        Provider(
            "kdfast compiled",
            lambda: _shards(size, _cuda_only(device), "compile"),
            graph=False,
            config="JPEG 95 in shards",
        ),
        Provider("kdfast, sampling alone", lambda: _latents(size, device), graph=False),
    )
    params = {**_params(size), "images": size.images, "batch": size.batch}
    return Case("synth", "labels to images on disk", params, 1, providers, check, size.images, "images")


def _png(size: _Size, device: str, compiled: bool) -> Work:
    if compiled:
        _cuda_only(device)
    pipe = _pipeline(size, device)
    if compiled:
        pipe.transformer = torch.compile(pipe.transformer)
    peer("PIL.Image")

    def work(turn: int) -> int:
        with tempfile.TemporaryDirectory(prefix="kdfast-bench-") as folder:
            numbers = itertools.count()
            for start in range(0, size.images, size.batch):
                labels = [n % 1000 for n in range(start, min(start + size.batch, size.images))]
                for image in pipe(labels, guidance_scale=GUIDANCE, num_inference_steps=size.steps).images:
                    image.save(Path(folder) / f"{next(numbers):09d}.png")
            return len(list(Path(folder).glob("*.png")))

    return work


def _shards(size: _Size, device: str, mode: str) -> Work:
    synthesizer = _synthesizer(size, device, mode)
    from kdfast.data import read_manifest

    def work(turn: int) -> int:
        folder = Path(tempfile.mkdtemp(prefix="kdfast-bench-"))
        try:
            synthesizer.write(folder, size.images, batch_size=size.batch, samples_per_shard=size.images)
            return read_manifest(folder).num_samples
        finally:
            shutil.rmtree(folder)

    return work


def _latents(size: _Size, device: str) -> Work:
    synthesizer = _synthesizer(size, device, "auto")

    def work(turn: int) -> int:
        made = 0
        for start in range(0, size.images, size.batch):
            labels = [n % 1000 for n in range(start, min(start + size.batch, size.images))]
            made += len(synthesizer.source.draw(labels, [0] * len(labels), 0))
        return made

    return work


# --- one picture ---------------------------------------------------------------------------------------------------


def _one_by_one(size: _Size, settings: Settings) -> Case:
    device = settings.device

    def picture(pipe: Any, seed: int) -> torch.Tensor:
        made: torch.Tensor = pipe(
            [seed % 1000],
            guidance_scale=GUIDANCE,
            num_inference_steps=size.steps,
            generator=torch.Generator(device).manual_seed(seed),
            output_type="pt",
        ).images
        return made

    def check(provider: str, made: torch.Tensor) -> None:
        wanted = picture(_pipeline(size, device), 0).float()
        # Ours keeps latents in float32 between steps; theirs rounds them to the model's precision.
        limit = 1e-3 if size.dtype == torch.float32 else 0.1
        error = float((made.float() - wanted).abs().mean())
        assert error < limit, f"pixels are off by {error:.2e} of 1 on average; limit {limit:.0e}"

    def ours(mode: Any) -> Work:
        from kdfast.diffusion import accelerate_pipeline

        where = _cuda_only(device) if mode == "compile" else device
        pipe = accelerate_pipeline(_pipeline(size, where), mode=mode)
        return lambda turn: picture(pipe, turn)

    def theirs() -> Work:
        pipe = _pipeline(size, device)
        return lambda turn: picture(pipe, turn)

    providers = (
        Provider("diffusers", theirs, graph=False),
        Provider("kdfast", lambda: ours("auto"), graph=False),
        Provider("kdfast compiled", lambda: ours("compile"), graph=False),
    )
    return Case("synth", "one picture", _params(size), 1, providers, check, 1, "images")

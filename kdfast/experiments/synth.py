"""``kdfast synth``: labelled synthetic images, written as shards."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import annotated_types as at
import torch

from kdfast.data import ShardWriter
from kdfast.data.surrogate import noise
from kdfast.data.surrogate.uniform import uniform_noise
from kdfast.diffusion import DDIMScheduler, DDPMScheduler, Synthesizer
from kdfast.errors import CheckpointError, ConfigError, require
from kdfast.experiments.common import METRICS, Count
from kdfast.experiments.diffusion_model import SCHEDULER, TRANSFORMER
from kdfast.training import files
from kdfast.training.accelerator import make_accelerator
from kdfast.training.progress import Progress, Task

VAE = "vae"
_FEATURE = "kdfast synth --source diffusion"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class SynthConfig:
    """What makes the images, how many, and where they go.

    Attributes:
        out: Directory of the shards.
        source: ``diffusion``, or ``noise``.
        images: Size of the set.
        weights: For ``diffusion``: a local folder as diffusers saves a pipeline (``transformer/``, ``scheduler/`` and,
            for latent models, ``vae/``, safetensors inside) or a transformer alone.
        random_weights: Take the configs in ``weights`` and leave the networks untrained (for benchmarks).
        sampler: ``ddim``, or the ancestral ``ddpm`` that the paper's images were made with.
        steps: T, denoising steps.
        guidance_scale: s; 1 is without guidance. DM-KD's best is 2.
        cfg_channels: Guide only the first so many channels; DiT's authors guide 3 of 4.
        eta: DDIM's η.
        paper_rng: All classes share their noise, as in DM-KD's published code.
        classes: Which classes to make; by default all.
        noise: For ``noise``: ``uniform`` over all colours, or ``gaussian`` around mid-grey.
        image_size: For ``noise``: side of the images.
        num_classes: For ``noise``: labels go round this many classes.
        seed: Same seed, same images.
        batch_size: Images sampled at a time.
        samples_per_shard: Images a shard.
        image_format: ``jpg`` or ``png``.
        quality: JPEG quality.
        precision: Of the networks: ``fp32``, ``bf16`` or ``fp16``.
        device: ``auto`` takes the GPU if there is one.
        resume: Go on where an earlier run stopped.
        progress: Show a progress bar.
    """

    out: str
    source: Literal["diffusion", "noise"] = "diffusion"
    images: Count = 2000
    weights: str | None = None
    random_weights: bool = False
    sampler: Literal["ddim", "ddpm"] = "ddim"
    steps: Count = 50
    guidance_scale: Annotated[float, at.Ge(1)] = 2.0
    cfg_channels: Count | None = None
    eta: Annotated[float, at.Ge(0), at.Le(1)] = 0.0
    paper_rng: bool = False
    classes: tuple[int, ...] | None = None
    noise: Literal["uniform", "gaussian"] = "uniform"
    image_size: Count = 32
    num_classes: Count = 10
    seed: Annotated[int, at.Ge(0)] = 0
    batch_size: Count = 64
    samples_per_shard: Count = 1000
    image_format: Literal["jpg", "png"] = "jpg"
    quality: Annotated[int, at.Ge(1), at.Le(100)] = 95
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    resume: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        if self.source == "diffusion" and self.weights is None:
            raise ConfigError("weights: missing; source=diffusion needs a folder with a diffusion model")


def run(config: SynthConfig) -> dict[str, Any]:
    """Make the set, or this process's share of it.

    Returns:
        What ``metrics.json`` holds: ``images``, ``refused`` (non-finite latents, drawn again), ``seconds`` of
        this call, and ``images_per_second`` without the time that loading the model took.

    Raises:
        ConfigError: A value makes no sense for this model.
        CheckpointError: The weights cannot be read, or do not match their config; the message names the keys.
        ShardError: ``out`` holds another run's set, or cannot be written.
    """
    accelerator = make_accelerator(config.device)
    folder = Path(config.out)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out: got {folder}, which is a file, accepted: a directory")
    started = time.monotonic()
    with Progress(enabled=config.progress and accelerator.is_main_process) as progress:
        bar = _Bar(progress)
        make = _write_diffusion if config.source == "diffusion" else _write_noise
        written, refused, complete = make(config, accelerator, bar)
    seconds = time.monotonic() - started
    metrics = {
        "source": config.source,
        "images": config.images,
        "refused": refused,
        "seconds": round(seconds, 3),
        "images_per_second": round(written / max(bar.seconds, 1e-9), 2),
    }
    if complete and (written or not (folder / METRICS).exists()):
        files.write_json(folder / METRICS, metrics)
    return metrics


class _Bar:
    """Opens a progress bar when it hears of the first count, so that its rate leaves out what was there before."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: Task | None = None
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the first count."""
        return time.monotonic() - self._started

    def __call__(self, done: int, total: int) -> None:
        if self._task is None:
            self._started = time.monotonic()
            self._task = self._progress.task("synth", total, unit="img", completed=done)
        else:
            self._task.advance(done - self._task.completed)


def load_generator(config: SynthConfig, device: torch.device) -> Synthesizer:
    """The synthesizer over the networks in ``config.weights``.

    Raises:
        CheckpointError: They cannot be read, or do not match their config.
    """
    diffusers = require("diffusers", extra="diffusion", feature=_FEATURE)
    root = Path(config.weights or "")
    if not root.is_dir():
        raise CheckpointError(f"weights {root}: does not exist, or is no directory")
    whole = (root / TRANSFORMER / "config.json").exists()
    transformer = root / TRANSFORMER if whole else root
    model = _network(diffusers.DiTTransformer2DModel, transformer, config)
    vae = _network(diffusers.AutoencoderKL, root / VAE, config) if (root / VAE).is_dir() else None
    scheduler = _scheduler(config, root / SCHEDULER, model)
    return Synthesizer(
        model,
        scheduler,
        vae=vae,
        num_inference_steps=config.steps,
        guidance_scale=config.guidance_scale,
        cfg_channels=config.cfg_channels,
        eta=config.eta,
        seed=config.seed,
        paper_rng=config.paper_rng,
        device=device,
    )


def _scheduler(config: SynthConfig, folder: Path, model: Any) -> Any:
    """The sampler over the noise schedule that the model was trained with; DiT's where no config says."""
    kind = DDPMScheduler if config.sampler == "ddpm" else DDIMScheduler
    try:
        settings = dict(kind.load_config(str(folder))) if folder.is_dir() else {}
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {' '.join(str(error).split())}") from error
    settings = settings or {"beta_schedule": "linear", "clip_sample": False}
    if config.sampler == "ddpm":
        learned = model.config.out_channels == 2 * model.config.in_channels
        settings |= {
            "timestep_spacing": "linspace",  # as the paper respaces: both ends included
            "variance_type": "learned_range" if learned else "fixed_small",
        }
    return kind.from_config(settings)


def _network(kind: Any, folder: Path, config: SynthConfig) -> Any:
    """One of diffusers' networks from safetensors; unlike diffusers, never with part of its weights left random."""
    try:
        if config.random_weights:
            torch.manual_seed(config.seed)
            return kind.from_config(kind.load_config(str(folder))).to(_DTYPES[config.precision])
        network, found = kind.from_pretrained(
            str(folder),
            output_loading_info=True,
            use_safetensors=True,
            local_files_only=True,
            torch_dtype=_DTYPES[config.precision],
        )
    except (OSError, ValueError, RuntimeError, KeyError, NotImplementedError, TypeError) as error:
        raise CheckpointError(f"weights {folder}: cannot be read: {' '.join(str(error).split())}") from error
    except Exception as error:  # safetensors raises an exception class of its own
        raise CheckpointError(f"weights {folder}: is damaged: {error}") from error
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := [str(key) for key in found.get(fault) or ()]:
            shown = ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
            raise CheckpointError(
                f"weights {folder}: do not match config.json: {fault.replace('_', ' ')} {shown}"
            )
    return network


def _write_diffusion(
    config: SynthConfig, accelerator: Any, bar: Callable[[int, int], None]
) -> tuple[int, int, bool]:
    result = load_generator(config, accelerator.device).write(
        config.out,
        config.images,
        classes=config.classes,
        batch_size=config.batch_size,
        samples_per_shard=config.samples_per_shard,
        image_format=config.image_format,
        quality=config.quality,
        resume=config.resume,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        on_progress=bar,
    )
    return result.written, result.refused, result.complete


def _write_noise(
    config: SynthConfig, accelerator: Any, bar: Callable[[int, int], None]
) -> tuple[int, int, bool]:
    if not accelerator.is_main_process:
        return 0, 0, False
    facts = {
        "generator": "noise",
        "noise": config.noise,
        "seed": config.seed,
        "image_size": config.image_size,
    }
    written = 0
    with ShardWriter(
        config.out,
        samples_per_shard=config.samples_per_shard,
        image_format=config.image_format,
        quality=config.quality,
        num_classes=config.num_classes,
        resume=config.resume,
        metadata=json.loads(json.dumps(facts)),
    ) as writer:
        bar(writer.num_samples, config.images)
        for start in range(writer.num_samples, config.images, config.batch_size):
            count = min(config.batch_size, config.images - start)
            writer.write(
                _noise(config, count, start), torch.arange(start, start + count) % config.num_classes
            )
            written += count
            bar(start + count, config.images)
    return written, 0, True


def _noise(config: SynthConfig, count: int, start: int) -> torch.Tensor:
    shape = (config.image_size, config.image_size)
    if config.noise == "uniform":
        return uniform_noise(count, shape, seed=config.seed, start=start)
    return noise(count, shape, mean=(0.5,) * 3, std=(0.25,) * 3, seed=config.seed, start=start)

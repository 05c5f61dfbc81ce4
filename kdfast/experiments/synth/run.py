"""``kdfast synth``: labelled synthetic images, written as shards."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import annotated_types as at

from kdfast.diffusion.notes import SCORES, noted
from kdfast.errors import ConfigError
from kdfast.experiments.common.results import METRICS, Count, Positive
from kdfast.experiments.synth import procedural as synth_procedural
from kdfast.experiments.synth.generator import load_generator, load_scorer
from kdfast.training import files
from kdfast.training.accelerator import make_accelerator
from kdfast.training.progress import Progress, Task


@dataclass(frozen=True, kw_only=True)
class SynthConfig:
    """What makes the images, how many, and where they go.

    Attributes:
        out: Directory of the shards.
        source: ``diffusion``; ``shaders``, random procedural programs; ``leaves``, shapes hiding each other; ``glsl``,
            fragment shaders of your own; or ``noise``.
        images: Size of the set.
        weights: For ``diffusion``: a local folder as diffusers saves a pipeline (for DiT ``transformer/``,
            ``scheduler/`` and, for latent models, ``vae/``, safetensors inside), a transformer's folder, or its
            ``.safetensors`` file with ``config.json`` beside it.
        random_weights: Take the configs in ``weights`` and leave the networks untrained (for benchmarks).
        class_names: For pipelines that take prompts: the classes' names in the order of their labels, or a text file
            with one a line.
        prompt: The prompt, with ``CLASS`` where the name goes.
        sampler: ``ddim``, the ancestral ``ddpm`` that the paper's images were made with, or the model's ``own``.
        steps: T, denoising steps.
        guidance_scale: s; 1 is without guidance. DM-KD's best is 2.
        cfg_channels: Guide only the first so many channels; DiT's authors guide 3 of 4.
        eta: DDIM's η.
        paper_rng: All classes share their noise, as in DM-KD's published code.
        classes: Which classes to make; by default all.
        noise: For ``noise``: ``uniform`` over all colours, or ``gaussian`` around mid-grey.
        programs: For ``shaders``: how many random programs; more images are the same programs at other times.
        programs_file: For ``shaders``: programs saved earlier (``programs.json`` of a set), instead of random ones.
        antialias: For ``shaders``: samples a pixel and side.
        leaves: For ``leaves``: most leaves an image.
        folder: For ``glsl``: a folder of fragment shaders, in Shadertoy's, TwiGL's or GLSL Sandbox's conventions.
        seconds: For ``glsl``: frames are taken at times from 0 to here.
        image_size: For all but ``diffusion``: side of the images.
        num_classes: For all but ``diffusion``: labels, which mean nothing, go round this many classes.
        sheet: For all but ``diffusion``: write ``samples.png`` with the first images beside the set.
        seed: Same seed, same images.
        batch_size: Images sampled at a time.
        samples_per_shard: Images a shard.
        image_format: ``jpg`` or ``png``.
        quality: JPEG quality.
        precision: Of the networks: ``fp32``, ``bf16`` or ``fp16``.
        mode: The sampling loop as one CUDA ``graph``, with the denoiser through torch's ``compile``, or ``eager``;
            ``auto`` is ``graph`` on a GPU.
        scorer: ``module:callable`` that gives each image a number, such as ImageReward's; kept in ``scores.jsonl``.
        device: ``auto`` takes the GPU if there is one.
        resume: Go on where an earlier run stopped.
        progress: Show a progress bar.
    """

    out: str
    source: Literal["diffusion", "shaders", "leaves", "glsl", "noise"] = "diffusion"
    images: Count = 2000
    weights: str | None = None
    random_weights: bool = False
    class_names: tuple[str, ...] | str | None = None
    prompt: str = "A realistic photo of CLASS"
    sampler: Literal["ddim", "ddpm", "own"] = "ddim"
    steps: Count = 50
    guidance_scale: Annotated[float, at.Ge(1)] = 2.0
    cfg_channels: Count | None = None
    eta: Annotated[float, at.Ge(0), at.Le(1)] = 0.0
    paper_rng: bool = False
    classes: tuple[int, ...] | None = None
    noise: Literal["uniform", "gaussian"] = "uniform"
    programs: Count = 4096
    programs_file: str | None = None
    antialias: Annotated[int, at.Ge(1), at.Le(8)] = 2
    leaves: Count = 5000
    folder: str | None = None
    seconds: Positive = 10.0
    image_size: Count = 32
    num_classes: Count = 10
    sheet: bool = True
    seed: Annotated[int, at.Ge(0)] = 0
    batch_size: Count = 64
    samples_per_shard: Count = 1000
    image_format: Literal["jpg", "png"] = "jpg"
    quality: Annotated[int, at.Ge(1), at.Le(100)] = 95
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    mode: Literal["auto", "graph", "compile", "eager"] = "auto"
    scorer: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    resume: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        if self.source == "diffusion" and self.weights is None:
            raise ConfigError("weights: missing; source=diffusion needs a folder with a diffusion model")
        synth_procedural.check(self)


def run(config: SynthConfig) -> dict[str, Any]:
    """Make the set, or this process's share of it.

    Returns:
        What ``metrics.json`` holds: ``images``, ``refused`` (non-finite latents, drawn again; GLSL files left out,
        which ``left_out`` lists with the driver's words), ``seconds`` of this call, ``images_per_second`` without the
        time that loading the model took, ``score`` where there is a scorer, and ``settings`` that a report can plot
        against.

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
        faults: list[str] = []
        if config.source == "diffusion":
            written, refused, complete = _write_diffusion(config, accelerator, bar)
        else:
            written, faults, complete = synth_procedural.write(config, accelerator, bar)
            refused = len(faults)
    seconds = time.monotonic() - started
    metrics = {
        "source": config.source,
        "images": config.images,
        "refused": refused,
        "seconds": round(seconds, 3),
        "images_per_second": round(written / max(bar.seconds, 1e-9), 2),
        **_sampled(config, folder),
        **({"left_out": faults} if faults else {}),
    }
    if complete and (written or not (folder / METRICS).exists()):
        files.write_json(folder / METRICS, metrics)
    return metrics


def _sampled(config: SynthConfig, folder: Path) -> dict[str, Any]:
    """What a report plots a diffusion model's sets against, and the scorer's mean."""
    if config.source != "diffusion":
        return {}
    settings = {"guidance_scale": config.guidance_scale, "steps": config.steps, "sampler": config.sampler}
    scores = [entry["score"] for entry in noted(folder / SCORES)]
    return {"settings": settings, **({"score": sum(scores) / len(scores)} if scores else {})}


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
        scorer=load_scorer(config.scorer),
        on_progress=bar,
    )
    return result.written, result.refused, result.complete

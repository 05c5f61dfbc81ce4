"""What a recipe of ``kdfast synth`` says."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import annotated_types as at

from kdfast.data.codec import ImageFormat
from kdfast.errors import ConfigError
from kdfast.experiments.common.bounds import Count, Positive, Seed


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
        prompt: The prompt, with ``CLASS`` where the name goes; of several each class's images take one in turn.
        negative_prompt: For pipelines that take prompts: what guidance leads away from.
        height: Of their images, in pixels; by default what the pipeline makes.
        width: Likewise.
        allow_pickle: Read weights that are there as ``.bin`` alone, which are pickles, by torch's restricted reader; by
            default only safetensors are read.
        sampler: ``ddim``, the ancestral ``ddpm`` that the paper's images were made with, ``dpm_solver``
            (DPM-Solver++, good from 10 steps on), ``euler``, ``euler_ancestral``, ``lcm``, or the model's ``own`` (flow
            matching has no other).
        steps: T, denoising steps.
        guidance_scale: s; 1 is without guidance. DM-KD's best is 2.
        cfg_channels: Guide only the first so many channels; DiT's authors guide 3 of 4.
        eta: DDIM's η.
        paper_rng: All classes share their noise, as in DM-KD's published code.
        classes: Which classes to make; by default all.
        noise: For ``noise``: ``uniform`` over all colours, or ``gaussian``.
        noise_mean: Of gaussian noise, per channel in [0, 1]; the paper takes the teacher's data's.
        noise_std: Its standard deviation per channel.
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
        image_format: ``jpg``, ``png`` or ``webp``.
        quality: Of JPEG and WebP (lossless at 100).
        precision: Of the networks: ``fp32``, ``bf16`` or ``fp16``.
        mode: The sampling loop as one CUDA ``graph``, with the denoiser through torch's ``compile``, or ``eager``;
            ``auto`` is ``graph`` on a GPU.
        scorer: ``module:callable`` or ``FILE.py:CALLABLE`` that gives each image a number, such as ImageReward's, or a
            trained network, whose probability of the image's label it is; kept in ``scores.jsonl``.
        device: ``auto`` takes the GPU if there is one.
        resume: Go on where an earlier run stopped.
        extend: Grow a finished set to ``images``; those that are there stay, and the set is the one that a single run
            makes.
        progress: Show a progress bar.
    """

    out: str
    source: Literal["diffusion", "shaders", "leaves", "glsl", "noise"] = "diffusion"
    images: Count = 2000
    weights: str | None = None
    random_weights: bool = False
    class_names: tuple[str, ...] | str | None = None
    prompt: str | tuple[str, ...] = "A realistic photo of CLASS"
    negative_prompt: str | None = None
    height: Count | None = None
    width: Count | None = None
    allow_pickle: bool = False
    sampler: Literal["ddim", "ddpm", "dpm_solver", "euler", "euler_ancestral", "lcm", "own"] = "ddim"
    steps: Count = 50
    guidance_scale: Annotated[float, at.Ge(1), at.Lt(math.inf)] = 2.0
    cfg_channels: Count | None = None
    eta: Annotated[float, at.Ge(0), at.Le(1)] = 0.0
    paper_rng: bool = False
    classes: tuple[int, ...] | None = None
    noise: Literal["uniform", "gaussian"] = "uniform"
    noise_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    noise_std: tuple[Positive, Positive, Positive] = (0.25, 0.25, 0.25)
    programs: Count = 4096
    programs_file: str | None = None
    antialias: Annotated[int, at.Ge(1), at.Le(8)] = 2
    leaves: Count = 5000
    folder: str | None = None
    seconds: Positive = 10.0
    image_size: Count = 32
    num_classes: Count = 10
    sheet: bool = True
    seed: Seed = 0
    batch_size: Count = 64
    samples_per_shard: Count = 1000
    image_format: ImageFormat = "jpg"
    quality: Annotated[int, at.Ge(1), at.Le(100)] = 95
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    mode: Literal["auto", "graph", "compile", "eager"] = "auto"
    scorer: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    resume: bool = False
    extend: bool = False
    progress: bool = True

    @property
    def written(self) -> dict[str, Any]:
        """How the set is written, by the names of :class:`kdfast.data.ShardWriter`."""
        names = ("samples_per_shard", "image_format", "quality", "resume")
        return {name: getattr(self, name) for name in names}

    def __post_init__(self) -> None:
        if self.source == "diffusion" and self.weights is None:
            raise ConfigError("weights: missing; source=diffusion needs a folder with a diffusion model")
        if self.source == "glsl" and self.folder is None:
            raise ConfigError("folder: missing; source=glsl needs a folder with GLSL fragment shaders")
        for name in ("negative_prompt", "height", "width"):
            if self.source != "diffusion" and (given := getattr(self, name)) is not None:
                instead = (
                    "null" if name == "negative_prompt" else "null (image_size is the side of its images)"
                )
                raise ConfigError(f"{name}: got {given!r} for source={self.source}, accepted: {instead}")
        if self.folder is not None and self.source != "glsl":
            raise ConfigError(
                f"folder: got {self.folder}, but source={self.source} reads none; accepted with glsl"
            )
        if self.programs_file is not None and self.source != "shaders":
            raise ConfigError(
                f"programs_file: got {self.programs_file}, but source={self.source} has no programs; "
                "accepted with shaders"
            )

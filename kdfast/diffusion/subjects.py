"""From whatever a user hands to the synthesizer to a source of images; and what is refused on the way."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch

from kdfast.diffusion.loop import text_denoiser
from kdfast.diffusion.plans import fused_scheduler
from kdfast.diffusion.schedulers.common import diffusers
from kdfast.diffusion.sources import ModelSource, PipelineSource, Prompts, Sampling, prompts_of
from kdfast.errors import ConfigError


def make_source(
    subject: Any,
    scheduler: Any,
    sampling: Sampling,
    *,
    vae: Any,
    num_classes: int | None,
    sample_shape: tuple[int, ...] | None,
    class_names: Sequence[str] | None,
    prompt: str | Sequence[str],
    device: torch.device | str | None,
) -> ModelSource | PipelineSource:
    """The source for a denoiser or a pipeline; arguments and refusals as :class:`kdfast.diffusion.Synthesizer`'s."""
    if isinstance(subject, torch.nn.Module):
        return _class_source(subject, scheduler, sampling, vae, num_classes, sample_shape, device)
    inner = getattr(subject, "transformer", None)
    if _class_conditional(subject, inner):
        own = subject.scheduler if scheduler is None else scheduler
        scheduler = fused_scheduler(own) if scheduler is None else own
        vae = vae if vae is not None else getattr(subject, "vae", None)
        return _class_source(inner, scheduler, sampling, vae, num_classes, sample_shape, device)
    if not isinstance(subject, diffusers.DiffusionPipeline):
        raise ConfigError(
            f"pipeline_or_model: got {type(subject).__name__}, accepted: a denoiser (nn.Module), or a pipeline of "
            "diffusers that takes class labels or prompts"
        )
    if device is not None:
        subject.to(device)
    accepted = inspect.signature(type(subject).__call__).parameters
    if "prompt" in accepted and class_names is None:
        raise ConfigError(
            f"class_names: missing; {type(subject).__name__} takes prompts, and needs a name for each class"
        )
    if (
        isinstance(subject, diffusers.StableDiffusionPipeline)
        and subject.unet.config.time_cond_proj_dim is None
    ):
        own = fused_scheduler(subject.scheduler) if scheduler is None else scheduler
        return _text_source(subject, own, sampling, list(class_names or ()), prompt)
    if scheduler is not None:
        subject.register_modules(scheduler=scheduler)
    return _any_pipeline(subject, sampling, accepted, class_names, prompt, num_classes)


def _class_conditional(pipe: Any, inner: Any) -> bool:
    """Whether a pipeline's transformer is called with class labels, as DiT's is."""
    if not isinstance(inner, torch.nn.Module) or hasattr(pipe, "text_encoder"):
        return False
    return "class_labels" in inspect.signature(inner.forward).parameters or not isinstance(
        pipe, diffusers.DiffusionPipeline
    )


def _class_source(
    model: Any,
    scheduler: Any,
    sampling: Sampling,
    vae: Any,
    num_classes: int | None,
    sample_shape: tuple[int, ...] | None,
    device: torch.device | str | None,
) -> ModelSource:
    check_sampler(scheduler, sampling)
    for name in ("height", "width", "negative_prompt"):
        if (given := getattr(sampling, name)) is not None:
            raise ConfigError(
                f"{name}: got {given!r}, accepted: null; a class-conditional model takes no prompts, and makes images "
                "of the size that it was trained on"
            )
    classes = num_classes if num_classes is not None else _from_config(model, "num_embeds_ada_norm")
    shape = sample_shape if sample_shape is not None else _sample_shape(model)
    if device is not None:
        model.to(device)
        if vae is not None:
            vae.to(device)
    place = next(model.parameters()).device
    return ModelSource(
        model.eval(), scheduler, vae, num_classes=classes, sample_shape=shape, sampling=sampling, device=place
    )


def _text_source(
    pipe: Any, scheduler: Any, sampling: Sampling, class_names: Sequence[str], prompt: str | Sequence[str]
) -> ModelSource:
    check_sampler(scheduler, sampling)
    device = torch.device(pipe._execution_device)
    prompts = Prompts(
        pipe,
        prompts_of(class_names, prompt),
        guided=sampling.guided,
        negative_prompt=sampling.negative_prompt,
        device=device,
    )
    return _TextSource(pipe, scheduler, sampling, prompts, device)


class _TextSource(ModelSource):
    """A text-conditional U-Net in our loop; its text encoder counts among what the images depend on."""

    def __init__(
        self, pipe: Any, scheduler: Any, sampling: Sampling, prompts: Prompts, device: torch.device
    ) -> None:
        super().__init__(
            pipe.unet.eval(),
            scheduler,
            pipe.vae,
            num_classes=len(prompts.texts),
            sample_shape=_latent_shape(pipe, sampling),
            sampling=sampling,
            device=device,
            condition=prompts,
            denoiser=text_denoiser(pipe.unet),
            order="uncond_cond",
        )
        self._text_encoder = pipe.text_encoder

    def modules(self) -> list[torch.nn.Module]:
        """The U-Net, the VAE and the text encoder."""
        return [*super().modules(), self._text_encoder]


def _any_pipeline(
    pipe: Any,
    sampling: Sampling,
    accepted: Any,
    class_names: Sequence[str] | None,
    prompt: str | Sequence[str],
    num_classes: int | None,
) -> PipelineSource:
    _check_numbers(pipe.scheduler, sampling)
    if "generator" not in accepted or not {"prompt", "class_labels"} & set(accepted):
        raise ConfigError(
            f"pipeline_or_model: got {type(pipe).__name__}, which takes neither prompts nor labels; accepted: "
            "a pipeline that takes a generator and prompt or class_labels"
        )
    if sampling.cfg_channels is not None:
        raise ConfigError(
            f"cfg_channels: got {sampling.cfg_channels}, accepted: null, as {type(pipe).__name__} guides by itself"
        )
    if "prompt" in accepted:
        return PipelineSource(pipe, sampling, prompts_of(class_names or (), prompt), len(class_names or ()))
    if num_classes is None:
        raise ConfigError(f"num_classes: got None, accepted: how many classes {type(pipe).__name__} has")
    return PipelineSource(pipe, sampling, None, num_classes)


def check_sampler(scheduler: Any, sampling: Sampling) -> None:
    """Refuse a sampler that cannot do what is asked.

    Raises:
        ConfigError: Names the argument.
    """
    if scheduler is None:
        raise ConfigError(
            "scheduler: got None, accepted: a kdfast scheduler, e.g. kdfast.diffusion.DDIMScheduler()"
        )
    _check_numbers(scheduler, sampling)
    if sampling.guided and not hasattr(scheduler, "step_cfg"):
        raise ConfigError(
            f"scheduler: got {type(scheduler).__module__}.{type(scheduler).__name__}, which has no step_cfg; use the "
            "scheduler of the same name from kdfast.diffusion"
        )


def _check_numbers(scheduler: Any, sampling: Sampling) -> None:
    if not 1 <= sampling.guidance_scale < math.inf:
        raise ConfigError(
            f"guidance_scale: got {sampling.guidance_scale}, accepted: a finite number of at least 1 (1 is "
            "without guidance; below it the condition is weakened, which makes images of no class)"
        )
    trained = int(scheduler.config.num_train_timesteps)
    if not 1 <= sampling.num_inference_steps <= trained:
        raise ConfigError(
            f"num_inference_steps: got {sampling.num_inference_steps}, accepted: 1 to {trained}, the steps that the "
            "model was trained on"
        )


def _from_config(model: torch.nn.Module, key: str) -> int:
    value = getattr(getattr(model, "config", None), key, None)
    if value is None:
        raise ConfigError(f"num_classes: got None, and the model's config has no {key} to read it from")
    return int(value)


def _latent_shape(pipe: Any, sampling: Sampling) -> tuple[int, int, int]:
    """Of a latent: the model's own, or that of images of the size that was asked for."""
    channels, *sides = _sample_shape(pipe.unet)
    factor = int(pipe.vae_scale_factor)
    for at, name in enumerate(("height", "width")):
        asked = getattr(sampling, name)
        if asked is not None:
            if asked % factor:
                raise ConfigError(f"{name}: got {asked}, accepted: a multiple of {factor}, the VAE's factor")
            sides[at] = asked // factor
    return channels, sides[0], sides[1]


def _sample_shape(model: torch.nn.Module) -> tuple[int, int, int]:
    config = getattr(model, "config", None)
    channels, size = getattr(config, "in_channels", None), getattr(config, "sample_size", None)
    if channels is None or size is None:
        raise ConfigError("sample_shape: got None, and the model's config lacks in_channels or sample_size")
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return int(channels), int(height), int(width)

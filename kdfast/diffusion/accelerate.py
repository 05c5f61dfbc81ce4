"""A diffusers pipeline, its calls unchanged, with its denoising loop replaced by ours.

What a pipeline does around its loop (encoding prompts, drawing noise, decoding, checking, turning arrays into
pictures) stays its own code and its own components. The loop itself becomes :class:`~kdfast.diffusion.loop.
SamplingLoop`: guidance and step in one kernel, and on CUDA the denoiser and they in one graph. A call that asks the
loop for more than that (callbacks, IP-Adapters, custom timesteps, guidance rescaling) is passed to the pipeline's
own loop, which then still steps with the fused scheduler.
"""

from __future__ import annotations

import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from kdfast.capture import autocast_state, has_hooks, module_state
from kdfast.diffusion.loop import Mode, SamplingLoop, StaticStep, class_denoiser, resolve_mode, text_denoiser
from kdfast.diffusion.plans import SCHEDULERS, SamplerPlan, fused_scheduler, same_settings, sampler_plan
from kdfast.diffusion.schedulers.common import diffusers
from kdfast.errors import ConfigError
from kdfast.functional.denoise import Order

P = TypeVar("P")

_STATE = "_kdfast_accelerated"
#: Graphs hold memory of their own; more shapes than this in turn are captured again.
_LOOPS = 4
# Arguments that the loop here has no part for: anything but these values goes to the pipeline's own.
_PLAIN = {
    "timesteps": None,
    "sigmas": None,
    "ip_adapter_image": None,
    "ip_adapter_image_embeds": None,
    "cross_attention_kwargs": None,
    "guidance_rescale": 0.0,
    "callback_on_step_end": None,
}


@dataclass
class _State:
    """What an accelerated pipeline remembers."""

    original: type
    scheduler: Any
    fused: Any
    mode: Mode
    loops: OrderedDict[Any, SamplingLoop] = field(default_factory=OrderedDict)
    settings: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.settings = dict(self.fused.config)


def accelerate_pipeline(pipe: P, *, mode: Mode = "auto") -> P:
    """Make a pipeline of diffusers sample faster; call it as before.

    The images of a seed stay the same, to rounding: the loop keeps its latents in float32, where a half-precision
    pipeline rounds them at every step. Calling this again changes the mode; :func:`restore_pipeline` undoes it.

    Args:
        pipe: A ``DiTPipeline`` or ``StableDiffusionPipeline``, changed in place.
        mode: ``"graph"`` captures denoiser, guidance and step as one CUDA graph for each batch shape; ``"compile"``
            compiles the denoiser before; ``"eager"`` does neither. ``"auto"`` is ``"graph"`` on CUDA, else
            ``"eager"``; a pipeline whose modules are moved between devices (CPU offload) is never captured.

    Returns:
        ``pipe``.

    Raises:
        ConfigError: Another kind of pipeline, a scheduler that has no namesake here, or a mode that cannot be.

    Example:
        >>> pipe = accelerate_pipeline(DiTPipeline.from_pretrained(folder).to("cuda"))    # doctest: +SKIP
        >>> pipe([207, 360], num_inference_steps=50).images                               # doctest: +SKIP
    """
    state = _state(pipe)
    kind = type(pipe) if state is None else state.original
    if kind not in _calls():
        names = " or ".join(accepted.__name__ for accepted in _calls())
        raise ConfigError(f"pipe: got {kind.__module__}.{kind.__name__}, accepted: {names}")
    resolve_mode(mode, _device(pipe))
    if state is not None:
        state.mode = mode
        state.loops.clear()
        return pipe
    scheduler = pipe.scheduler  # type: ignore[attr-defined]
    ours = fused_scheduler(scheduler)
    pipe.register_modules(scheduler=ours)  # type: ignore[attr-defined]
    pipe.__dict__[_STATE] = _State(kind, scheduler, ours, mode)
    pipe.__class__ = _accelerated(kind)
    return pipe


def restore_pipeline(pipe: P) -> P:
    """Undo :func:`accelerate_pipeline`: the pipeline's own class and scheduler, and no captured graph.

    Returns:
        ``pipe``; one that was not accelerated is left alone.
    """
    state = pipe.__dict__.pop(_STATE, None)
    if state is not None:
        pipe.__class__ = state.original
        pipe.register_modules(scheduler=_plain_scheduler(pipe, state))  # type: ignore[attr-defined]
    return pipe


def _plain_scheduler(pipe: Any, state: _State) -> Any:
    """What the pipeline would step with if it had never been accelerated, with all that was set since."""
    scheduler = pipe.scheduler
    if scheduler is state.fused and dict(scheduler.config) == state.settings:
        return state.scheduler
    if type(scheduler) not in SCHEDULERS.values():
        return scheduler  # the user's own choice
    namesake = getattr(diffusers, type(scheduler).__name__)
    return same_settings(namesake, scheduler)


def _state(pipe: Any) -> _State | None:
    found: _State | None = getattr(pipe, "__dict__", {}).get(_STATE)
    return found


def _device(pipe: Any) -> torch.device:
    return torch.device(pipe._execution_device)


@functools.cache
def _accelerated(kind: type) -> type:
    """A subclass under the parent's own name, which saved pipelines and messages go by."""
    call = _calls()[kind]
    original = kind.__call__
    signature = inspect.signature(original)

    @functools.wraps(original)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            bound = signature.bind(self, *args, **kwargs)
        except TypeError:
            return original(self, *args, **kwargs)  # which says what is wrong with them
        bound.apply_defaults()
        values = dict(bound.arguments)
        unusual = [name for name, plain in _PLAIN.items() if values.get(name, plain) != plain]
        if unusual or values.get("kwargs"):
            return original(self, *args, **kwargs)
        result = call(self, values)
        return original(self, *args, **kwargs) if result is None else result

    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        """As the pipeline it was: what is saved loads without kdfast."""
        state = _state(self)
        ours = self.scheduler
        restore_pipeline(self)
        try:
            return self.save_pretrained(*args, **kwargs)
        finally:
            self.register_modules(scheduler=ours)
            self.__dict__[_STATE] = state
            self.__class__ = _accelerated(kind)

    body = {
        "__call__": torch.no_grad()(run),
        "save_pretrained": save_pretrained,
        "__module__": kind.__module__,
    }
    return type(kind.__name__, (kind,), body)


def _loop(
    pipe: Any,
    model: torch.nn.Module,
    denoiser: Callable[[torch.nn.Module], Any],
    plan: SamplerPlan,
    latents: Tensor,
    conditions: Mapping[str, Tensor],
    guidance_scale: float | None,
    order: Order,
) -> SamplingLoop:
    """The loop for these shapes, made or found."""
    state = _state(pipe)
    if state is None:  # pragma: no cover - only called on an accelerated pipeline
        raise ConfigError("pipe: is not accelerated")
    device = latents.device
    # Hooks run with every call, move weights to other addresses, skip blocks: nothing that a graph would follow.
    mode: Mode = "eager" if has_hooks(model) else state.mode
    key = (
        module_state(model),
        autocast_state(device),
        torch.is_inference_mode_enabled(),
        tuple(latents.shape),
        device,
        model.dtype,
        tuple((name, value.shape, value.dtype) for name, value in conditions.items()),
        plan.facts(),
        guidance_scale,
        mode,
    )
    loop = state.loops.pop(key, None)
    if loop is None:
        step = StaticStep(
            denoiser(model),
            plan,
            tuple(latents.shape),
            device=device,
            dtype=model.dtype,  # type: ignore[arg-type]
            conditions=conditions,
            guidance_scale=guidance_scale,
            order=order,
            seeded=False,
        )
        loop = SamplingLoop(step, mode)
    state.loops[key] = loop
    while len(state.loops) > _LOOPS:
        state.loops.popitem(last=False)
    return loop


def _draws(shape: tuple[int, ...], generator: Any, device: torch.device, dtype: Any) -> Callable[[], Tensor]:
    """The noise that diffusers' scheduler would draw at each step, in its order."""
    return lambda: diffusers.utils.torch_utils.randn_tensor(
        shape, generator=generator, device=device, dtype=dtype
    )


def _sample_dit(pipe: Any, values: Mapping[str, Any]) -> Any:
    """``DiTPipeline.__call__`` with our loop; None where its sampler needs its own."""
    classes, scale, generator = values["class_labels"], values["guidance_scale"], values["generator"]
    model, device = pipe.transformer, _device(pipe)
    pipe.scheduler.set_timesteps(values["num_inference_steps"])
    plan = sampler_plan(pipe.scheduler, device)
    # The pipeline cuts a variance off before it steps, and steps from the *scaled* input of a sampler in σ.
    if plan is None or plan.learned_variance or plan.first_scale != 1 or plan.init_sigma != 1:
        return None
    size, channels = model.config.sample_size, model.config.in_channels
    shape = (len(classes), channels, size, size)
    noise = diffusers.utils.torch_utils.randn_tensor(
        shape, generator=generator, device=device, dtype=model.dtype
    )
    guided = scale > 1
    labels = torch.tensor(classes).to(device, non_blocking=True).reshape(-1)
    if guided:
        labels = torch.cat([labels, torch.full_like(labels, 1000)])  # the pipeline's own null class
    # The pipeline steps both halves, from the global generator, and goes on with the first.
    rows = (2 * shape[0] if guided else shape[0], *shape[1:])
    draw = _draws(rows, None, device, model.dtype)
    conditions = {"labels": labels}
    loop = _loop(
        pipe, model, class_denoiser, plan, noise, conditions, float(scale) if guided else None, "cond_uncond"
    )
    with pipe.progress_bar(total=len(plan)) as bar:
        latents = loop.run(noise, conditions, draw=lambda: draw()[: shape[0]], on_step=bar.update)
    latents = latents.to(model.dtype) / pipe.vae.config.scaling_factor
    images = (pipe.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    if values["output_type"] != "pt":
        images = images.cpu().permute(0, 2, 3, 1).float().numpy()
        if values["output_type"] == "pil":
            images = pipe.numpy_to_pil(images)
    pipe.maybe_free_model_hooks()
    if not values["return_dict"]:
        return (images,)
    return diffusers.pipelines.pipeline_utils.ImagePipelineOutput(images=images)


def _sample_stable_diffusion(pipe: Any, values: Mapping[str, Any]) -> Any:
    """``StableDiffusionPipeline.__call__`` with our loop; None where its model or sampler needs its own."""
    model, device = pipe.unet, _device(pipe)
    pipe.scheduler.set_timesteps(values["num_inference_steps"], device=device)
    plan = sampler_plan(pipe.scheduler, device, eta=float(values["eta"]))
    if plan is None or plan.learned_variance or model.config.time_cond_proj_dim is not None:
        return None
    height, width = _image_size(pipe, values)
    # What the pipeline's own call leaves behind for its properties.
    for name in ("guidance_scale", "guidance_rescale", "clip_skip", "cross_attention_kwargs"):
        setattr(pipe, f"_{name}", values[name])
    pipe._interrupt, pipe._num_timesteps = False, len(plan)
    scale, generator = float(values["guidance_scale"]), values["generator"]
    embeds, negative = _encode(pipe, values, height, width, guided=scale > 1)
    start = pipe.prepare_latents(
        len(embeds),
        model.config.in_channels,
        height,
        width,
        embeds.dtype,
        device,
        generator,
        values["latents"],
    )
    noise = start / plan.init_sigma  # the pipeline has scaled it already, and the loop will
    conditions = {"prompt": embeds if negative is None else torch.cat([negative, embeds])}
    loop = _loop(
        pipe,
        model,
        text_denoiser,
        plan,
        noise,
        conditions,
        None if negative is None else scale,
        "uncond_cond",
    )
    accepted = "generator" in inspect.signature(pipe.scheduler.step).parameters
    draw = _draws(tuple(start.shape), generator if accepted else None, device, embeds.dtype)
    with pipe.progress_bar(total=len(plan)) as bar:
        latents = loop.run(noise, conditions, draw=draw, on_step=bar.update).to(embeds.dtype)
    return _picture(pipe, latents, values, embeds.dtype, generator)


def _image_size(pipe: Any, values: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width in pixels: as asked for, or the model's own."""
    side = pipe.unet.config.sample_size
    height, width = (side, side) if isinstance(side, int) else side
    if values["height"] and values["width"]:
        return values["height"], values["width"]
    return height * pipe.vae_scale_factor, width * pipe.vae_scale_factor


def _encode(
    pipe: Any, values: Mapping[str, Any], height: int, width: int, *, guided: bool
) -> tuple[Tensor, Tensor | None]:
    """The embeddings of the prompts and of their negatives, after the pipeline's own checks."""
    names = ("prompt", "negative_prompt", "prompt_embeds", "negative_prompt_embeds")
    prompt, negative, embeds, negative_embeds = (values[name] for name in names)
    pipe.check_inputs(prompt, height, width, None, negative, embeds, negative_embeds)
    made, unwanted = pipe.encode_prompt(
        prompt,
        _device(pipe),
        values["num_images_per_prompt"],
        guided,
        negative,
        prompt_embeds=embeds,
        negative_prompt_embeds=negative_embeds,
        clip_skip=values["clip_skip"],
    )
    return made, unwanted if guided else None


def _picture(
    pipe: Any, latents: Tensor, values: Mapping[str, Any], dtype: torch.dtype, generator: Any
) -> Any:
    """Decode, check and convert, with the pipeline's own parts."""
    kind, unsafe = values["output_type"], None
    image = latents
    if kind != "latent":
        scaled = latents / pipe.vae.config.scaling_factor
        image = pipe.vae.decode(scaled, return_dict=False, generator=generator)[0]
        image, unsafe = pipe.run_safety_checker(image, latents.device, dtype)
    shown = [True] * len(image) if unsafe is None else [not flag for flag in unsafe]
    image = pipe.image_processor.postprocess(image, output_type=kind, do_denormalize=shown)
    pipe.maybe_free_model_hooks()
    if not values["return_dict"]:
        return (image, unsafe)
    output = diffusers.pipelines.stable_diffusion.StableDiffusionPipelineOutput
    return output(images=image, nsfw_content_detected=unsafe)


@functools.cache
def _calls() -> dict[type, Callable[[Any, Mapping[str, Any]], Any]]:
    """The kinds of pipeline; importing them is slow, so it waits until it is needed."""
    return {
        diffusers.DiTPipeline: _sample_dit,
        diffusers.StableDiffusionPipeline: _sample_stable_diffusion,
    }

"""What makes the images of a set: a class-conditional model, a text-conditional one, or any pipeline as it is.

Each draws rows for keys (class, index), and turns them into pixels; :class:`~kdfast.diffusion.Synthesizer` does the
rest. The first two sample in :class:`~kdfast.diffusion.loop.SamplingLoop`; the third is called as its users call it.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdfast.diffusion.loop import Denoiser, Mode, SamplingLoop, StaticStep, class_denoiser, resolve_mode
from kdfast.diffusion.plans import sampler_plan
from kdfast.diffusion.sampling import sample_latents, sample_noise, step_generators, step_seeds
from kdfast.errors import ConfigError
from kdfast.functional.denoise import Order

#: Stands for the class's name in a prompt.
PLACEHOLDER = "CLASS"
# Activations of a VAE at 256² are a hundred times its latents; so many images at once fill a GPU well enough.
_DECODE = 16


@dataclass(frozen=True)
class Sampling:
    """How images are sampled; the fields are those of :class:`~kdfast.diffusion.Synthesizer`."""

    num_inference_steps: int
    guidance_scale: float
    cfg_channels: int | None
    eta: float
    seed: int
    paper_rng: bool
    mode: Mode
    height: int | None = None
    width: int | None = None
    negative_prompt: str | None = None

    @property
    def guided(self) -> bool:
        """Whether there is an unconditional half; at s = 1 it would cancel."""
        return self.guidance_scale != 1.0


class ModelSource:
    """A denoiser and a sampler, in one loop.

    Args:
        model: The denoiser.
        scheduler: One of kdfast's.
        vae: Latents to images; ``None`` for a model of pixels.
        num_classes: How many there are.
        sample_shape: Of one latent.
        sampling: How to sample.
        device: Where.
        condition: The denoiser's tensors for these classes and the images' numbers in them: of both halves, where there
            is guidance.
        denoiser: Calls the model with them; ``None`` for a class-conditional one.
        order: Which half is the conditional one.
    """

    def __init__(
        self,
        model: nn.Module,
        scheduler: Any,
        vae: Any,
        *,
        num_classes: int,
        sample_shape: tuple[int, ...],
        sampling: Sampling,
        device: torch.device,
        condition: Callable[[Sequence[int], Sequence[int]], Mapping[str, Tensor]] | None = None,
        denoiser: Denoiser | None = None,
        order: Order = "cond_uncond",
    ) -> None:
        self.model, self.scheduler, self.vae = model, scheduler, vae
        self.num_classes, self.sample_shape, self.device = num_classes, sample_shape, device
        self._sampling, self._order = sampling, order
        self._condition = condition or self._labels
        self._denoiser, self._by_class = denoiser or class_denoiser(model), denoiser is None
        self._loops: dict[int, SamplingLoop] = {}
        #: Rows that every batch is filled up to, where loops are captured: a set of images is made by loops of one
        #: size then, whichever batch a run begins with, and libraries compute the same bits for it.
        self.fill_to = 0
        self._mode = resolve_mode(sampling.mode, device)
        scheduler.set_timesteps(sampling.num_inference_steps, device=device)
        self._plan = sampler_plan(scheduler, device, eta=sampling.eta)
        if self._plan is None and not self._by_class:
            raise ConfigError(
                f"scheduler: got {type(scheduler).__name__} with dynamic thresholding or a predicted variance, "
                "accepted: one without them for prompts"
            )
        if vae is not None and device.type == "cuda":
            vae.to(memory_format=torch.channels_last)

    def draw(self, classes: Sequence[int], indices: Sequence[int], attempt: int) -> Tensor:
        """Latents ``[B, C, H, W]``, float32 on the device; without waiting for them."""
        sampling = self._sampling
        key = (sampling.seed, classes, indices)
        options: dict[str, Any] = {"attempt": attempt, "paper_rng": sampling.paper_rng}
        noise = sample_noise(*key, self.sample_shape, **options).to(self.device, non_blocking=True)
        if self._plan is None:
            return self._step_by_step(noise, classes, step_generators(*key, **options))
        rows = self._rows(len(classes))
        padded, counted = ([*each, *[each[-1]] * (rows - len(each))] for each in (classes, indices))
        seeds = step_seeds(*key, **options) if self._plan.stochastic else torch.zeros(len(classes)).long()
        if rows > len(classes):
            spare = rows - len(classes)
            noise = torch.cat([noise, noise[-1:].expand(spare, *noise.shape[1:])])
            seeds = torch.cat([seeds, seeds[-1:].expand(spare)])
        conditions = self._condition(padded, counted)
        loop = self._loop(rows, conditions)
        return loop.run(noise, conditions, seeds=seeds.to(self.device, non_blocking=True))[: len(classes)]

    @torch.no_grad()
    def decode(self, drawn: Tensor) -> Tensor:
        """Latents to images in about [-1, 1], float32."""
        if self.vae is None:
            return drawn
        weight = next(self.vae.parameters())
        scaled = (drawn / self.vae.config.scaling_factor).to(weight.dtype)
        if scaled.device.type == "cuda":
            scaled = scaled.contiguous(memory_format=torch.channels_last)
        return torch.cat([self.vae.decode(part).sample.float() for part in scaled.split(_DECODE)])

    def modules(self) -> list[nn.Module]:
        """Whose weights the images depend on."""
        return [self.model, *([] if self.vae is None else [self.vae])]

    def dtype(self) -> torch.dtype:
        """Of the denoiser."""
        return next(self.model.parameters()).dtype

    def _rows(self, count: int) -> int:
        """Rows of the loop to use: a captured one is filled up rather than captured again for a short batch."""
        if self._mode == "eager":
            return count
        if count <= self.fill_to:
            return self.fill_to
        return min((rows for rows in self._loops if rows >= count), default=count)

    def _loop(self, rows: int, conditions: Mapping[str, Tensor]) -> SamplingLoop:
        found = self._loops.get(rows)
        if found is None:
            if self._plan is None:
                raise RuntimeError("a sampler without a plan has no loop")
            step = StaticStep(
                self._denoiser,
                self._plan,
                (rows, *self.sample_shape),
                device=self.device,
                dtype=self.dtype(),
                conditions=conditions,
                guidance_scale=self._sampling.guidance_scale if self._sampling.guided else None,
                order=self._order,
                cfg_channels=self._sampling.cfg_channels,
            )
            if self._mode == "eager":
                self._loops.clear()  # a few buffers, not worth keeping for every size
            found = self._loops[rows] = SamplingLoop(step, self._mode)
        return found

    def _labels(self, classes: Sequence[int], _: Sequence[int]) -> Mapping[str, Tensor]:
        labels = torch.tensor(list(classes)).to(self.device, non_blocking=True)
        if self._sampling.guided:
            labels = torch.cat([labels, torch.full_like(labels, self.num_classes)])
        return {"labels": labels}

    def _step_by_step(
        self, noise: Tensor, classes: Sequence[int], generators: list[torch.Generator]
    ) -> Tensor:
        # Samplers with a history start each batch afresh.
        self.scheduler.set_timesteps(self._sampling.num_inference_steps, device=self.device)
        return sample_latents(
            self.model,
            self.scheduler,
            noise,
            torch.tensor(list(classes)).to(self.device, non_blocking=True),
            guidance_scale=self._sampling.guidance_scale,
            null_class=self.num_classes,
            cfg_channels=self._sampling.cfg_channels,
            eta=self._sampling.eta,
            generators=generators,
        )


class Prompts:
    """The prompts of each class, encoded once by the pipeline's own encoder and kept on the device."""

    def __init__(
        self, pipe: Any, texts: Texts, *, guided: bool, negative_prompt: str | None, device: torch.device
    ) -> None:
        self._pipe, self._guided, self._device = pipe, guided, device
        self.texts, self._negative_prompt = texts, negative_prompt
        self._embeds: dict[str, Tensor] = {}
        self._negative: Tensor | None = None

    @torch.no_grad()
    def __call__(self, classes: Sequence[int], indices: Sequence[int]) -> Mapping[str, Tensor]:
        """The embeddings of these images' prompts, after those of the negative prompt where there is guidance."""
        texts = self.texts.of(classes, indices)
        if missing := [text for text in dict.fromkeys(texts) if text not in self._embeds]:
            unwanted = None if self._negative_prompt is None else [self._negative_prompt] * len(missing)
            embeds, negative = self._pipe.encode_prompt(
                missing, self._device, 1, self._guided, negative_prompt=unwanted
            )
            self._embeds.update(zip(missing, embeds))
            if self._guided and self._negative is None:
                self._negative = negative[:1]
        rows = torch.stack([self._embeds[text] for text in texts])
        if self._negative is not None:
            rows = torch.cat([self._negative.expand_as(rows), rows])
        return {"prompt": rows}


class PipelineSource:
    """Any pipeline that takes prompts or class labels, called as it is: a generator an image, arrays back.

    Nothing of it is fused or captured; resuming, sharding, seeds and overlap are those of every other set.
    """

    def __init__(self, pipe: Any, sampling: Sampling, texts: Texts | None, num_classes: int) -> None:
        self.pipe, self._sampling, self.num_classes = pipe, sampling, num_classes
        self.scheduler = pipe.scheduler
        self.device = torch.device(pipe._execution_device)
        self._texts = texts
        self.fill_to = 0  # a pipeline captures nothing
        accepted = inspect.signature(type(pipe).__call__).parameters
        options = {
            "num_inference_steps": sampling.num_inference_steps,
            "guidance_scale": sampling.guidance_scale,
            "eta": sampling.eta,
            "output_type": "np",
        }
        self._options = {name: value for name, value in options.items() if name in accepted}
        asked = {name: getattr(sampling, name) for name in ("height", "width", "negative_prompt")}
        asked = {name: value for name, value in asked.items() if value is not None}
        if refused := [name for name in asked if name not in accepted]:
            raise ConfigError(
                f"{refused[0]}: got {asked[refused[0]]!r}, accepted: null, as {type(pipe).__name__} takes none"
            )
        self._unwanted = asked.pop("negative_prompt", None)
        self._options |= asked
        pipe.set_progress_bar_config(disable=True)

    def draw(self, classes: Sequence[int], indices: Sequence[int], attempt: int) -> Tensor:
        """Images ``[B, 3, H, W]`` in [-1, 1]."""
        sampling = self._sampling
        generators = step_generators(
            sampling.seed, classes, indices, attempt=attempt, paper_rng=sampling.paper_rng
        )
        subject: dict[str, list[Any]] = (
            {"class_labels": list(classes)}
            if self._texts is None
            else {"prompt": self._texts.of(classes, indices)}
        )
        if self._unwanted is not None:
            subject["negative_prompt"] = [self._unwanted] * len(classes)
        images = self.pipe(**subject, **self._options, generator=generators).images
        return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() * 2 - 1

    def decode(self, drawn: Tensor) -> Tensor:
        """They are images already."""
        return drawn

    def modules(self) -> list[nn.Module]:
        """Whose weights the images depend on."""
        return [part for _, part in sorted(self.pipe.components.items()) if isinstance(part, nn.Module)]

    def dtype(self) -> torch.dtype:
        """Of the pipeline."""
        found: torch.dtype = self.pipe.dtype
        return found


@dataclass(frozen=True)
class Texts:
    """What the prompts say.

    Attributes:
        prompts: By class, one of each template.
    """

    prompts: Sequence[Sequence[str]]

    def __len__(self) -> int:
        return len(self.prompts)

    def of(self, classes: Sequence[int], indices: Sequence[int]) -> list[str]:
        """The prompts of these images: a class's, in turn, by the images' numbers in it."""
        return [
            self.prompts[label][index % len(self.prompts[label])] for label, index in zip(classes, indices)
        ]


def prompts_of(class_names: Sequence[str], prompt: str | Sequence[str]) -> Texts:
    """The prompts of each class.

    Raises:
        ConfigError: No template, one without :data:`PLACEHOLDER`, or an empty name.
    """
    templates = [prompt] if isinstance(prompt, str) else list(prompt)
    if not templates:
        raise ConfigError(f"prompt: got none, accepted: a text with {PLACEHOLDER} in it, or several")
    if lacking := [template for template in templates if PLACEHOLDER not in template]:
        raise ConfigError(
            f"prompt: got {lacking[0]!r}, accepted: a text with {PLACEHOLDER} in it, for the class"
        )
    if empty := [at for at, name in enumerate(class_names) if not name.strip()]:
        raise ConfigError(f"class_names: number {empty[0]} is empty, accepted: a name for each class")
    return Texts([[each.replace(PLACEHOLDER, name.strip()) for each in templates] for name in class_names])


def fingerprint(*models: nn.Module) -> str:
    """SHA-256 over the models' state dicts: names, shapes and bytes."""
    digest = hashlib.sha256()
    for model in models:
        for name, tensor in model.state_dict().items():
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()

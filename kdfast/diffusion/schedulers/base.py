"""The way into the fused step: what a call asks for, and the mixins that the schedulers are made of.

A scheduler is one of these in front of diffusers' class of the same name, so that ``super().step`` is diffusers' own.
Diffusers' pipelines look at the parameters of ``step``: every class shows its namesake's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, cast

import numpy
import torch
from torch import Tensor

from kdfast.diffusion.schedulers.common import check_same_channels, diffusers, noisy
from kdfast.functional.denoise import Order, guidance
from kdfast.ops.denoise import NO_GUIDANCE, Guidance, StepResult, denoise_step, guided_output
from kdfast.profiling import annotate, phase

logger = diffusers.utils.logging.get_logger(__name__)

Generators = torch.Generator | list[torch.Generator] | None


class Request(NamedTuple):
    """What one call of ``step`` or ``step_cfg`` asks for."""

    model_output: Tensor
    timestep: Any
    sample: Tensor
    guide: Guidance = NO_GUIDANCE
    generator: Generators = None
    noise: Tensor | None = None
    seed: int | Tensor | None = None
    return_dict: bool = True

    @property
    def noisy(self) -> bool:
        """Whether there is a source of noise for the kernel."""
        return self.noise is not None or self.seed is not None

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Whose dtypes decide on the table's."""
        return self.sample, self.model_output, self.noise

    def silent(self) -> Request:
        """The same without noise, for a deterministic step; the generator is left alone."""
        return self._replace(noise=None, seed=None)

    def draw(self, dtype: torch.dtype | None = None, *, like: Tensor | None = None) -> Request:
        """The same with its noise drawn, unless the kernel makes it from ``seed``.

        Args:
            dtype: Of the noise; by default the model output's.
            like: In whose shape and on whose device; by default the model output's.

        Raises:
            ValueError: More than one source of noise.
        """
        sources = {"generator": self.generator, "variance_noise": self.noise, "seed": self.seed}
        given = [name for name, value in sources.items() if value is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)}: give one source of noise, got {len(given)}")
        if self.noisy:
            return self
        # Diffusers draws in the shape of the output it steps with: guided, without a variance's channels.
        output, sample = self.model_output if like is None else like, self.sample
        plain = self.guide.scale is None and output.shape[1:2] == sample.shape[1:2]
        noise = diffusers.utils.torch_utils.randn_tensor(
            output.shape if plain else sample.shape,
            generator=self.generator,
            device=output.device,
            dtype=dtype or output.dtype,
        )
        return self._replace(noise=noise)

    def unguided(self) -> Tensor:
        """The output after guidance, for a step that is left to diffusers."""
        if self.guide.scale is None:
            return self.model_output
        return guided_output(self.model_output, self.sample, self.guide).to(self.model_output.dtype)


def _spaced(theirs: Callable[..., None]) -> Callable[..., None]:
    """``set_timesteps`` that refuses a number of steps at which diffusers' "trailing" goes on to a timestep of −1.

    That is a matter of rounding (61 steps of 1000, and as many other numbers): the last step would read the schedule
    from its other end. Pipelines look at the signature, which stays.
    """

    @functools.wraps(theirs)
    def set_timesteps(self: Any, *arguments: Any, **options: Any) -> None:
        steps = arguments[0] if arguments else options.get("num_inference_steps")
        if steps and self.config.get("timestep_spacing") == "trailing" and options.get("timesteps") is None:
            length = self.config.num_train_timesteps
            if numpy.round(numpy.arange(length, 0, -length / steps))[-1] < 1:
                raise ValueError(
                    f"num_inference_steps: got {steps} with timestep_spacing 'trailing', which ends at a timestep of "
                    f"−1 of {length}; another number of steps is needed, or another spacing"
                )
        theirs(self, *arguments, **options)

    return set_timesteps


class FusedStep:
    """A scheduler's step as one call of the kernel; subclasses say by which row of which table, in ``_fused``."""

    #: What ``step`` returns, with fields (prev_sample) or (prev_sample, pred_original_sample).
    OUTPUT: ClassVar[Any]

    #: Whether the config's ``timestep_spacing`` counts.
    SPACED: ClassVar[bool] = True

    config: Any
    num_inference_steps: Any
    step_index: Any
    _step_index: Any
    _init_step_index: Any

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        theirs = getattr(cls, "set_timesteps", None)
        if theirs is not None and cls.SPACED and not hasattr(theirs, "__wrapped__"):
            cls.set_timesteps = _spaced(theirs)  # type: ignore[attr-defined]

    def __new__(cls, *_: Any, **__: Any) -> Any:
        """An instance that pipelines save under the name of diffusers' class."""
        made = super().__new__(cls)
        # A pipeline is saved under its scheduler's module and name. Ours is no library that diffusers loads from, and a
        # folder that anybody can load is worth more: it names diffusers' own class, which has the same config.
        made.__dict__["__module__"] = "diffusers.schedulers"
        return made

    def _fused(self, request: Request) -> Any:
        raise NotImplementedError

    def _run(self, request: Request, table: Tensor, row: int | Tensor, **options: Any) -> StepResult:
        """The kernel."""
        return denoise_step(
            request.sample,
            request.model_output,
            table,
            row,
            guidance=request.guide,
            noise=request.noise,
            seed=request.seed,
            **options,
        )

    def _answer(self, request: Request, *values: Tensor | None) -> Any:
        """A tuple, or diffusers' output."""
        return self.OUTPUT(*values) if request.return_dict else values

    def _plain_step(self, request: Request, *arguments: Any, takes_noise: bool) -> Any:
        """Diffusers' own step, after guidance: dynamic thresholding needs a quantile of each image."""
        if request.seed is not None or (request.noise is not None and not takes_noise):
            names = "seed" if takes_noise else "variance_noise, seed"
            raise ValueError(f"{names}: not with dynamic thresholding; pass a generator")
        return super().step(  # type: ignore[misc]
            request.unguided(), request.timestep, request.sample, *arguments, request.return_dict
        )

    def _check_timesteps(self) -> None:
        if self.num_inference_steps is None:
            raise ValueError("num_inference_steps is None: call set_timesteps before step")

    def _row(self, timestep: Any) -> int:
        """The row of this step: diffusers counts steps on the host, from the first timestep it is given.

        Raises:
            ValueError: All steps have been taken.
        """
        if self.step_index is None:
            self._init_step_index(timestep)
        row, steps = int(self.step_index), len(self.timesteps)  # type: ignore[attr-defined]
        if row >= steps:
            raise ValueError(
                f"timestep: this would be step {row} of {steps}, counted from 0; call set_timesteps for another run"
            )
        return row


class GuidedStep(FusedStep):
    """Adds :meth:`step_cfg`."""

    @annotate("scheduler.step_cfg")
    def step_cfg(
        self,
        model_output: Tensor,
        timestep: int | float | Tensor,
        sample: Tensor,
        guidance_scale: float,
        *,
        order: Order = "cond_uncond",
        cfg_channels: int | None = None,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        seed: int | Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Classifier-free guidance and ``step`` in one pass.

        Args:
            model_output: Both halves of the batch ``[2B, ≥ C, …]``.
            timestep: As in ``step``.
            sample: x_t ``[B, C, …]``, or ``[2B, C, …]`` with a row for each half; the result matches it.
            guidance_scale: g of u + g·(c − u).
            order: Which half is first: the conditional (DiT) or the unconditional (Stable Diffusion).
            cfg_channels: Guide only the first channels; None: all. The others come from the conditional half
                or, for a sample of 2B rows, each from its own.
            generator: Draws the noise (of the sample's shape) of a stochastic sampler.
            variance_noise: The noise itself, instead.
            seed: Make the noise in the kernel instead, keyed by (seed, step, element): an int, or an int64
                tensor of one element on the sample's device.
            return_dict: As in ``step``.

        Raises:
            ValueError: Shapes that do not fit, an unknown ``order``, or two sources of noise.
        """
        guide = guidance(guidance_scale, order, cfg_channels)
        return self._fused(
            Request(model_output, timestep, sample, guide, generator, variance_noise, seed, return_dict)
        )


class DrawnStep(GuidedStep):
    """Adds the ``step`` of schedulers whose only option is where their noise comes from."""

    def step(
        self,
        model_output: Tensor,
        timestep: int | float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> Any:
        """One step; arguments and result as in the ``step`` of diffusers' scheduler of the same name.

        Args:
            model_output: The model's prediction, of the sample's shape; for DDPM's learned variance, twice its
                channels.
            timestep: One of ``timesteps``: a number, or a tensor of one element on any device. Only DDPM reads it at
                every step, the others at the first.
            sample: x_t, any strides, which the result keeps.
            generator: Draws the noise, as diffusers would.
            return_dict: False: a tuple (prev_sample, the predicted x₀).

        Raises:
            ValueError: No ``set_timesteps`` yet, a timestep that is not one of ``timesteps``, or shapes that do not
                fit.
        """
        with phase(f"{type(self).__name__}.step"):
            if self._has_plain_output():
                check_same_channels(sample, model_output)
            return self._fused(
                Request(model_output, timestep, sample, generator=generator, return_dict=return_dict)
            )

    def _has_plain_output(self) -> bool:
        """Whether the model's output has no channels for a variance."""
        return True


class SigmaStep(GuidedStep):
    """What samplers in σ have in common: floating-point timesteps."""

    is_scale_input_called: bool

    def _row(self, timestep: Any) -> int:
        """As in :class:`FusedStep`.

        Raises:
            ValueError: An integer, which is likely a position and no timestep.
        """
        of_tensor = isinstance(timestep, Tensor)
        if not timestep.is_floating_point() if of_tensor else isinstance(timestep, int):
            raise ValueError(
                f"timestep: must be one of scheduler.timesteps, which are floating-point, got {timestep!r} "
                "(an index of enumerate?)"
            )
        return super()._row(timestep)

    def _warn_unscaled(self) -> None:
        """Diffusers' warning for a loop that feeds the model x instead of x/√(σ² + 1)."""
        if not self.is_scale_input_called:
            logger.warning(
                "scale_model_input should be called before step, so that the model sees its input scaled"
            )


class ScaledInput:
    """The model's input x/√(σ² + 1) of samplers in σ."""

    step_index: Any
    _init_step_index: Any
    is_scale_input_called: bool
    sigmas: Tensor
    _roots: tuple[Tensor, int, list[float]] | None = None

    def scale_model_input(self, sample: Tensor, timestep: Any) -> Tensor:
        """x/√(σ² + 1), as in diffusers; the roots of a host's σ are taken once for all steps."""
        sigmas = self.sigmas
        if sigmas.device.type != "cpu" or torch.compiler.is_compiling():
            return cast(Tensor, super().scale_model_input(sample, timestep))  # type: ignore[misc]
        if self.step_index is None:
            self._init_step_index(timestep)
        kept = self._roots
        if kept is None or kept[0] is not sigmas or kept[1] != sigmas._version:
            kept = self._roots = (sigmas, sigmas._version, ((sigmas**2 + 1) ** 0.5).tolist())
        self.is_scale_input_called = True
        root: float = kept[2][self.step_index]
        return sample / root


class VariancePreserving:
    """Noising by ᾱ, as diffusers' schedulers of that kind do it, with roots taken in float32 at least."""

    alphas_cumprod: Tensor

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """√ᾱ_t·x₀ + √(1 − ᾱ_t)·ε, as in diffusers; the roots are taken in float32 at least."""
        root, complement = noisy(self.alphas_cumprod, timesteps, original_samples)
        return root * original_samples + complement * noise

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """v = √ᾱ_t·ε − √(1 − ᾱ_t)·x₀ (Salimans & Ho 2022), as in diffusers."""
        root, complement = noisy(self.alphas_cumprod, timesteps, sample)
        return root * noise - complement * sample

"""Euler samplers in σ (Karras et al. 2022, Alg. 2), ancestral and for flow matching, over the fused step.

With σ → σ' and dt = σ' − σ: y = x + dt·(x − x₀)/σ. Diffusers computes in float32 and returns the model
output's dtype; so do these, but for float64 inputs, which stay float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdfast.diffusion.schedulers_common import (
    Generators,
    GuidedStep,
    check_same_channels,
    columns,
    diffusers,
    draw_noise,
    table_cache,
    table_dtype,
)
from kdfast.ops import denoise as ops
from kdfast.profiling import annotate

logger = diffusers.utils.logging.get_logger(__name__)


def begin_step(scheduler: Any, timestep: Any) -> int:
    """The row of this step: diffusers counts steps on the host, from the first timestep it is given.

    Raises:
        ValueError: An integer, which is likely a position and no timestep.
    """
    integer = not timestep.is_floating_point() if isinstance(timestep, Tensor) else isinstance(timestep, int)
    if integer:
        raise ValueError(
            f"timestep: must be one of scheduler.timesteps, which are floating-point, got {timestep!r} "
            "(an index of enumerate?)"
        )
    if scheduler.step_index is None:
        scheduler._init_step_index(timestep)
    return int(scheduler.step_index)


def warn_unscaled(scheduler: Any) -> None:
    """Diffusers' warning for a loop that feeds the model x instead of x/√(σ² + 1)."""
    if not scheduler.is_scale_input_called:
        logger.warning(
            "scale_model_input should be called before step, so that the model sees its input scaled"
        )


def sigma_x0(sigma: Tensor, prediction_type: str, scheduler: str) -> tuple[Tensor, Tensor]:
    """px and po in float64: x₀ = x − σ·ε, or (x − σ√(σ² + 1)·v)/(σ² + 1).

    Raises:
        ValueError: An unknown prediction type.
    """
    if prediction_type == "epsilon":
        return torch.ones_like(sigma), -sigma
    if prediction_type in ("sample", "original_sample"):
        return torch.zeros_like(sigma), torch.ones_like(sigma)
    if prediction_type == "v_prediction":
        return 1 / (sigma**2 + 1), -sigma / (sigma**2 + 1) ** 0.5
    raise ValueError(
        f"prediction_type: {scheduler} takes epsilon, sample or v_prediction, got {prediction_type!r}"
    )


def euler_table(sigmas: Tensor, target: Tensor, gamma: float, prediction_type: str, scheduler: str) -> Tensor:
    """Coefficients of one Euler step from each σ towards ``target``.

    Args:
        sigmas: σ ``[N + 1]``.
        target: Where the deterministic part goes ``[N]``: σ', or the ancestral σ_down.
        gamma: Churn: the step starts from σ̂ = σ·(1 + γ).
        prediction_type: What the model predicts.
        scheduler: For the message of an error.

    Returns:
        float64 ``[N, 10]``; s scales the next model input.
    """
    sigma, following = sigmas[:-1].double(), sigmas[1:].double()
    hat = sigma if gamma == 0 else (sigmas[:-1] * (gamma + 1)).double()
    dt = target.double() - hat
    px, po = sigma_x0(hat if prediction_type == "epsilon" else sigma, prediction_type, scheduler)
    if prediction_type == "epsilon":
        a, b, d = torch.ones_like(dt), torch.zeros_like(dt), dt
    elif prediction_type == "v_prediction":
        # (x − x₀)/σ̂ without cancelling x: the share of x in it is σ²/(σ² + 1).
        a = 1 + dt / hat * sigma**2 / (sigma**2 + 1)
        b, d = torch.zeros_like(dt), dt / hat * sigma / (sigma**2 + 1) ** 0.5
    else:
        a, b, d = 1 + dt / hat, -dt / hat, torch.zeros_like(dt)
    return columns(len(dt), px=px, po=po, a=a, b=b, d=d, s=1 / (following**2 + 1) ** 0.5)


class EulerDiscreteScheduler(GuidedStep, diffusers.EulerDiscreteScheduler):  # type: ignore[misc, name-defined]
    """A drop-in for ``diffusers.EulerDiscreteScheduler``: same config, same results, one kernel a step.

    Attributes:
        keep_pred_original: Set to False to leave ``pred_original_sample`` None.
    """

    keep_pred_original: bool = True

    @annotate("EulerDiscreteScheduler.step")
    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> Any:
        """One step; arguments and result as in ``diffusers.EulerDiscreteScheduler.step``.

        Args:
            model_output: The model's prediction, of the sample's shape.
            timestep: One of ``timesteps``; it is read on the first step only.
            sample: x, any strides, which the result keeps.
            s_churn: Noise added before the step (Karras et al. 2022, Alg. 2), over all steps.
            s_tmin: Smallest σ with churn.
            s_tmax: Largest σ with churn.
            s_noise: Scale of that noise.
            generator: Draws it.
            return_dict: False: a tuple (prev_sample, pred_original_sample).

        Raises:
            ValueError: An integer timestep, or shapes that do not fit.
        """
        check_same_channels(sample, model_output)
        row = begin_step(self, timestep)
        gamma = 0.0
        if s_churn > 0 and s_tmin <= float(self.sigmas[row]) <= s_tmax:
            gamma = min(s_churn / (len(self.sigmas) - 1), 2**0.5 - 1)
            sigma = self.sigmas[row]
            spread = ((sigma * (gamma + 1)) ** 2 - sigma**2) ** 0.5
            noise = diffusers.utils.torch_utils.randn_tensor(
                model_output.shape, generator=generator, device=model_output.device, dtype=model_output.dtype
            )
            # Before the model's own time σ̂; rare enough to stay a pass of its own.
            wide = torch.promote_types(sample.dtype, torch.float32)
            sample = sample.to(wide) + noise * s_noise * spread.to(sample.device)
        return self._euler(model_output, sample, row, gamma, ops.NO_GUIDANCE, return_dict)

    def _fused(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        guide: ops.Guidance,
        generator: Generators,
        noise: Tensor | None,
        seed: int | Tensor | None,
        return_dict: bool,
    ) -> Any:
        # Without churn the step is deterministic, and no source of noise is touched.
        return self._euler(model_output, sample, begin_step(self, timestep), 0.0, guide, return_dict)

    def _euler(
        self,
        model_output: Tensor,
        sample: Tensor,
        row: int,
        gamma: float,
        guide: ops.Guidance,
        return_dict: bool,
    ) -> Any:
        warn_unscaled(self)
        prediction = self.config.prediction_type
        dtype = table_dtype(sample, model_output)

        def build() -> Tensor:
            sigmas = self.sigmas.detach().cpu().float()
            return euler_table(sigmas, sigmas[1:], gamma, prediction, "EulerDiscreteScheduler")

        result = ops.denoise_step(
            sample,
            model_output,
            table_cache(self).get((prediction, gamma), sample.device, dtype, (self.sigmas,), build),
            row,
            guidance=guide,
            want_x0=self.keep_pred_original,
            dtype=model_output.dtype,
            # A model that predicts x₀ has its own output returned.
            x0_dtype=model_output.dtype if "sample" in prediction else dtype,
        )
        self._step_index += 1
        if not return_dict:
            return result.y, result.x0
        return diffusers.schedulers.scheduling_euler_discrete.EulerDiscreteSchedulerOutput(
            prev_sample=result.y, pred_original_sample=result.x0
        )


class EulerAncestralDiscreteScheduler(GuidedStep, diffusers.EulerAncestralDiscreteScheduler):  # type: ignore[misc, name-defined]
    """A drop-in for ``diffusers.EulerAncestralDiscreteScheduler``: same config, same results, one kernel.

    Attributes:
        keep_pred_original: Set to False to leave ``pred_original_sample`` None.
    """

    keep_pred_original: bool = True

    @annotate("EulerAncestralDiscreteScheduler.step")
    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> Any:
        """One step; arguments and result as in ``diffusers.EulerAncestralDiscreteScheduler.step``.

        Args:
            model_output: The model's prediction, of the sample's shape.
            timestep: One of ``timesteps``; it is read on the first step only.
            sample: x, any strides, which the result keeps.
            generator: Draws the noise, as diffusers would.
            return_dict: False: a tuple (prev_sample, pred_original_sample).

        Raises:
            ValueError: An integer timestep, or shapes that do not fit.
        """
        check_same_channels(sample, model_output)
        return self._fused(
            model_output, timestep, sample, ops.NO_GUIDANCE, generator, None, None, return_dict
        )

    def _fused(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        guide: ops.Guidance,
        generator: Generators,
        noise: Tensor | None,
        seed: int | Tensor | None,
        return_dict: bool,
    ) -> Any:
        prediction = self.config.prediction_type
        if prediction not in ("epsilon", "v_prediction"):
            raise ValueError(
                "prediction_type: EulerAncestralDiscreteScheduler takes epsilon or v_prediction, "
                f"got {prediction!r}"
            )
        row = begin_step(self, timestep)
        warn_unscaled(self)
        noise = draw_noise(model_output, sample, guide, generator, noise, seed)
        dtype = table_dtype(sample, model_output, noise)
        result = ops.denoise_step(
            sample,
            model_output,
            table_cache(self).get(
                prediction,
                sample.device,
                dtype,
                (self.sigmas,),
                lambda: ancestral_table(self.sigmas, prediction),
            ),
            row,
            guidance=guide,
            noise=noise,
            seed=seed,
            want_x0=self.keep_pred_original,
            dtype=model_output.dtype,
            x0_dtype=dtype,
        )
        self._step_index += 1
        if not return_dict:
            return result.y, result.x0
        output = (
            diffusers.schedulers.scheduling_euler_ancestral_discrete.EulerAncestralDiscreteSchedulerOutput
        )
        return output(prev_sample=result.y, pred_original_sample=result.x0)


def ancestral_table(sigmas: Tensor, prediction_type: str) -> Tensor:
    """Euler to σ_down, then noise of σ_up: σ_up² = σ'²(σ² − σ'²)/σ², σ_down² = σ'² − σ_up²; float32 roots."""
    sigmas = sigmas.detach().cpu().float()
    sigma, following = sigmas[:-1], sigmas[1:]
    up = (following**2 * (sigma**2 - following**2) / sigma**2) ** 0.5
    down = (following**2 - up**2).clamp(min=0) ** 0.5
    table = euler_table(sigmas, down, 0.0, prediction_type, "EulerAncestralDiscreteScheduler")
    table[:, ops.COLUMNS.index("c")] = up.double()
    return table


class FlowMatchEulerDiscreteScheduler(GuidedStep, diffusers.FlowMatchEulerDiscreteScheduler):  # type: ignore[misc, name-defined]
    """A drop-in for ``diffusers.FlowMatchEulerDiscreteScheduler``: same config, same results, one kernel.

    The model predicts the velocity ε − x₀ (Lipman et al. 2023): y = x + (σ' − σ)·o, or with
    ``stochastic_sampling`` y = (1 − σ')·(x − σ·o) + σ'·z.
    """

    @annotate("FlowMatchEulerDiscreteScheduler.step")
    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: Generators = None,
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """One step; arguments and result as in ``diffusers.FlowMatchEulerDiscreteScheduler.step``.

        Args:
            model_output: The model's prediction, of the sample's shape.
            timestep: One of ``timesteps``; it is read on the first step only.
            sample: x, any strides, which the result keeps.
            s_churn: Ignored, as in diffusers; so are ``s_tmin``, ``s_tmax`` and ``s_noise``.
            s_tmin: Ignored.
            s_tmax: Ignored.
            s_noise: Ignored.
            generator: Draws the noise of ``stochastic_sampling``.
            per_token_timesteps: A timestep for each token: left to diffusers' own step.
            return_dict: False: a tuple (prev_sample,).

        Raises:
            ValueError: An integer timestep, or shapes that do not fit.
        """
        if per_token_timesteps is not None:
            return super().step(
                model_output,
                timestep,
                sample,
                generator=generator,
                per_token_timesteps=per_token_timesteps,
                return_dict=return_dict,
            )
        check_same_channels(sample, model_output)
        return self._fused(
            model_output, timestep, sample, ops.NO_GUIDANCE, generator, None, None, return_dict
        )

    def _fused(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        guide: ops.Guidance,
        generator: Generators,
        noise: Tensor | None,
        seed: int | Tensor | None,
        return_dict: bool,
    ) -> Any:
        row = begin_step(self, timestep)
        stochastic = bool(self.config.stochastic_sampling)
        if stochastic:
            noise = draw_noise(sample, sample, guide, generator, noise, seed, torch.float32)
        else:
            noise = seed = None
        dtype = table_dtype(sample, model_output, noise)
        result = ops.denoise_step(
            sample,
            model_output,
            table_cache(self).get(
                stochastic, sample.device, dtype, (self.sigmas,), lambda: flow_table(self.sigmas, stochastic)
            ),
            row,
            guidance=guide,
            noise=noise,
            seed=seed,
            dtype=model_output.dtype,
        )
        self._step_index += 1
        if not return_dict:
            return (result.y,)
        output = (
            diffusers.schedulers.scheduling_flow_match_euler_discrete.FlowMatchEulerDiscreteSchedulerOutput
        )
        return output(prev_sample=result.y)


def flow_table(sigmas: Tensor, stochastic: bool) -> Tensor:
    """Coefficients of flow matching's Euler step from each σ; m is x₀ = x − σ·o."""
    sigmas = sigmas.detach().cpu().float()
    sigma, following = sigmas[:-1].double(), sigmas[1:].double()
    one, zero = torch.ones_like(sigma), torch.zeros_like(sigma)
    if stochastic:
        return columns(len(sigma), px=one, po=-sigma, b=(1 - sigmas[1:]).double(), c=following, s=one)
    dt = (sigmas[1:] - sigmas[:-1]).double()
    return columns(len(sigma), px=one, po=-sigma, a=one, b=zero, d=dt, s=one)

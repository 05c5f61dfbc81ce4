"""A sampler as a table: what a loop over static buffers needs to know of a scheduler, read once and kept on the device.

Every scheduler here is one row of coefficients a step (see kernels/denoise/). Gathered in the order of the steps,
with the timesteps beside them, they are all that a captured loop reads: no scheduler object, nothing on the host.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from kdfast.diffusion import schedulers
from kdfast.diffusion.schedulers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
)
from kdfast.diffusion.schedulers.common import clip_bound, needs_quantiles
from kdfast.diffusion.schedulers.dpm import step_order
from kdfast.diffusion.schedulers.euler import ancestral_table, euler_table
from kdfast.diffusion.schedulers.flow import flow_table
from kdfast.errors import ConfigError
from kdfast.ops.denoise import COLUMNS

SCHEDULERS: dict[str, Any] = {name: getattr(schedulers, name) for name in schedulers.__all__}
_SCALE = COLUMNS.index("s")


@dataclass(frozen=True)
class SamplerPlan:
    """The steps of one sampler.

    Attributes:
        timesteps: What the model is told at each step ``[N]``.
        table: Coefficients of each step, float32 ``[N, 10]``; column s scales the *next* model input.
        first_scale: Scales the first model input.
        init_sigma: Scales the standard normal noise that sampling begins with.
        history: Earlier predictions that a step reads.
        stochastic: Whether a step adds noise.
        learned_variance: Whether the model's further channels hold the noise's variance.
        clip: Clamp the predicted x₀ to ±clip.
    """

    timesteps: Tensor
    table: Tensor
    first_scale: float
    init_sigma: float
    history: int = 0
    stochastic: bool = False
    learned_variance: bool = False
    clip: float | None = None

    def __len__(self) -> int:
        return len(self.timesteps)

    def facts(self) -> tuple[Any, ...]:
        """All of it as a key: equal where the same recording does."""
        values = (getattr(self, each.name) for each in fields(self))
        return tuple(v.cpu().numpy().tobytes() if isinstance(v, Tensor) else v for v in values)


def fused_scheduler(scheduler: Any) -> Any:
    """The scheduler of the same name from kdfast, with the same config; one of kdfast's comes back as it is.

    Raises:
        ConfigError: There is none; names it and what there is.
    """
    kind = type(scheduler)
    if kind in SCHEDULERS.values():
        return scheduler
    ours = SCHEDULERS.get(kind.__name__)
    if ours is None or not kind.__module__.startswith("diffusers."):
        raise ConfigError(
            f"scheduler: got {kind.__module__}.{kind.__name__}, accepted: {', '.join(SCHEDULERS)}; one of these over "
            "the same noise schedule is made by KIND.from_config(scheduler.config)"
        )
    return same_settings(ours, scheduler)


def same_settings(kind: Any, scheduler: Any) -> Any:
    """A scheduler of another class with every setting of this one."""
    # Without diffusers' list of which values are defaults: pipelines change some of those behind its back.
    made = kind.from_config({k: v for k, v in scheduler.config.items() if not k.startswith("_")})
    if "_use_default_values" in scheduler.config:
        # By that list a third class, made from this one's config, has defaults of its own; so it is handed on.
        made.register_to_config(_use_default_values=scheduler.config["_use_default_values"])
    return made


def sampler_plan(scheduler: Any, device: torch.device | str, *, eta: float = 0.0) -> SamplerPlan | None:
    """Read a scheduler of kdfast's after its ``set_timesteps``.

    Args:
        scheduler: One of :data:`SCHEDULERS`.
        device: Where the tables go.
        eta: DDIM's η.

    Returns:
        The plan; ``None`` where a step is no linear function of its inputs (dynamic thresholding, a predicted
        variance of diffusers' type ``learned``): such a sampler has to be stepped itself.
    """
    if type(scheduler) not in SCHEDULERS.values():
        return None
    config = scheduler.config
    if needs_quantiles(config):
        return None
    clip = clip_bound(config)
    device = torch.device(device)
    timesteps = scheduler.timesteps.detach().to(device)
    if isinstance(scheduler, DDIMScheduler):
        table = scheduler._table(eta, False, clip is not None, torch.device("cpu"), torch.float32)
        rows = table[scheduler.timesteps.cpu().long()]
        return _plan(scheduler, timesteps, rows, stochastic=eta > 0, clip=clip)
    if isinstance(scheduler, DDPMScheduler):
        if scheduler.variance_type == "learned":
            return None
        rows = scheduler._table(torch.device("cpu"), torch.float32)[scheduler.timesteps.cpu().long()]
        learned = scheduler.variance_type == "learned_range"
        return _plan(scheduler, timesteps, rows, stochastic=True, learned_variance=learned, clip=clip)
    if isinstance(scheduler, LCMScheduler):
        rows = scheduler._table(clip is not None, torch.device("cpu"), torch.float32)
        return _plan(scheduler, timesteps, rows, stochastic=True, clip=clip)
    if isinstance(scheduler, DPMSolverMultistepScheduler):
        if config.thresholding and not config.algorithm_type.endswith("++"):
            return None
        return _multistep_plan(scheduler, timesteps, clip)
    return _sigma_plan(scheduler, timesteps)


def _plan(scheduler: Any, timesteps: Tensor, rows: Tensor, **facts: Any) -> SamplerPlan:
    """A plan of a sampler whose model input is x itself."""
    rows = rows[: len(timesteps)].clone()
    rows[:, _SCALE] = 1.0
    sigma = float(getattr(scheduler, "init_noise_sigma", 1.0))
    return SamplerPlan(timesteps, rows.to(timesteps.device).contiguous(), 1.0, sigma, **facts)


def _multistep_plan(scheduler: Any, timesteps: Tensor, clip: float | None) -> SamplerPlan:
    """DPM-Solver: each step's row at the order that its history allows."""
    table = scheduler._table(torch.device("cpu"), torch.float32)
    steps, config = len(scheduler.sigmas) - 1, scheduler.config
    count = len(timesteps)
    orders = [step_order(config, at, count, min(at, config.solver_order)) for at in range(count)]
    rows = table[[(order - 1) * steps + at for at, order in enumerate(orders)]]
    stochastic = config.algorithm_type.startswith("sde")
    return _plan(scheduler, timesteps, rows, history=max(orders) - 1, stochastic=stochastic, clip=clip)


def _sigma_plan(scheduler: Any, timesteps: Tensor) -> SamplerPlan:
    """The samplers in σ: their model input is x/√(σ² + 1), but for flow matching's."""
    sigmas = scheduler.sigmas.detach().cpu().float()
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        stochastic = bool(scheduler.config.stochastic_sampling)
        return _plan(scheduler, timesteps, flow_table(sigmas, stochastic).float(), stochastic=stochastic)
    prediction, ancestral = (
        scheduler.config.prediction_type,
        isinstance(scheduler, EulerAncestralDiscreteScheduler),
    )
    rows = (
        ancestral_table(sigmas, prediction)
        if ancestral
        else euler_table(sigmas, sigmas[1:], 0.0, prediction, "EulerDiscreteScheduler")
    )
    first = float(1 / (sigmas[0].double() ** 2 + 1) ** 0.5)
    rows = rows[: len(timesteps)].float().to(timesteps.device).contiguous()
    return SamplerPlan(timesteps, rows, first, float(scheduler.init_noise_sigma), stochastic=ancestral)

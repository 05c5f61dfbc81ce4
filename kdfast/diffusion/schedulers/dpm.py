"""DPM-Solver multistep (Lu et al. 2022, arXiv:2206.00927 and 2211.01095) over the fused step.

With λ = log α − log σ, h = λ_t − λ_s0, r₀ = (λ_s0 − λ_s1)/h, r₁ = (λ_s1 − λ_s2)/h, predictions m₀, m₁, m₂:

    D₁₀ = (m₀ − m₁)/r₀,  D₁₁ = (m₁ − m₂)/r₁
    y = a·x + k₀·m₀ + u₀·D₁₀ + u₁·D₁₁ + c·z
      = a·x + (k₀ + u₀/r₀)·m₀ + (u₁/r₁ − u₀/r₀)·m₁ − (u₁/r₁)·m₂ + c·z

The predictions are x₀ for the ``++`` algorithms and ε for the others; the step makes m₀ and stores it, and
reads m₁ and m₂ as its history.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdfast.diffusion.schedulers.base import Generators, GuidedStep, Request
from kdfast.diffusion.schedulers.common import (
    check_same_channels,
    clip_bound,
    columns,
    diffusers,
    needs_quantiles,
    table_cache,
    table_dtype,
)
from kdfast.errors import ConfigError
from kdfast.profiling import annotate


class DPMSolverMultistepScheduler(GuidedStep, diffusers.DPMSolverMultistepScheduler):  # type: ignore[misc, name-defined]
    """A drop-in for ``diffusers.DPMSolverMultistepScheduler``: same config, same results, one kernel a step.

    All four algorithms, orders 1 to 3, midpoint and Heun. Diffusers computes in float32; so does this, but
    for float64 inputs, which stay float64.
    """

    OUTPUT = diffusers.schedulers.scheduling_utils.SchedulerOutput
    model_outputs: list[Any]

    @annotate("DPMSolverMultistepScheduler.step")
    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """One step; arguments and result as in ``diffusers.DPMSolverMultistepScheduler.step``.

        Args:
            model_output: The model's prediction, of the sample's shape (further channels are a variance,
                which ``variance_type`` must announce).
            timestep: One of ``timesteps``; it is read on the first step only.
            sample: x, any strides, which the result keeps.
            generator: Draws the noise of the stochastic algorithms, as diffusers would.
            variance_noise: The noise itself, instead.
            return_dict: False: a tuple (prev_sample,).

        Raises:
            ValueError: No ``set_timesteps`` yet, or shapes that do not fit.
        """
        if self.config.variance_type is None:
            check_same_channels(sample, model_output)
        if variance_noise is not None:
            generator = None  # as in diffusers, which looks at the noise first
        request = Request(
            model_output, timestep, sample, generator=generator, noise=variance_noise, return_dict=return_dict
        )
        return self._fused(request)

    def _fused(self, request: Request) -> Any:
        self._check_timesteps()
        config, sample = self.config, request.sample
        if needs_quantiles(config) or (config.thresholding and not config.algorithm_type.endswith("++")):
            return self._plain_step(request, request.generator, request.noise, takes_noise=True)
        row, order = self._row(request.timestep), self._order()
        dtype = torch.promote_types(sample.dtype, request.model_output.dtype)
        if config.algorithm_type.startswith("sde"):
            request = request.draw(torch.float32, like=sample)
            if request.noise is not None:
                request = request._replace(
                    noise=request.noise.to(device=sample.device, non_blocking=sample.is_cuda)
                )
        else:
            request = request.silent()
        history = [self.model_outputs[-at] for at in range(1, order)]
        steps = len(self.sigmas) - 1
        result = self._run(
            request,
            self._table(sample.device, table_dtype(sample, request.model_output, *history)),
            (order - 1) * steps + row,
            history=history,
            clip=clip_bound(config),
            want_x0=True,
            dtype=dtype,
        )
        self.model_outputs = [*self.model_outputs[1:], result.x0]
        if self.lower_order_nums < config.solver_order:
            self.lower_order_nums += 1
        self._step_index += 1
        return self._answer(request, result.y)

    def _order(self) -> int:
        """The order of this step: what the history allows, lower at the end, as in diffusers."""
        return step_order(self.config, self.step_index, len(self.timesteps), self.lower_order_nums)

    def _table(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        config = self.config
        key = (config.algorithm_type, config.solver_type, config.prediction_type, config.use_flow_sigmas)
        return table_cache(self).get(
            (*key, config.solver_order),
            device,
            dtype,
            (self.sigmas,),
            lambda: dpm_table(self.sigmas, *key, config.solver_order),
        )


def step_order(config: Any, at: int, steps: int, history: int) -> int:
    """The order of step ``at`` of ``steps`` with so many predictions to look back on."""
    left = steps - at
    short = config.lower_order_final and steps < 15
    last = left == 1 and (config.euler_at_final or short or config.final_sigmas_type == "zero")
    if config.solver_order == 1 or history < 1 or last:
        return 1
    if config.solver_order == 2 or history < 2 or (left == 2 and short):
        return 2
    return 3


def dpm_table(
    sigmas: Tensor, algorithm: str, solver: str, prediction_type: str, flow: bool, max_order: int
) -> Tensor:
    """Coefficients of every step at every order, in diffusers' order of operations in float32.

    Args:
        sigmas: σ ``[N + 1]``.
        algorithm: ``"dpmsolver++"``, ``"sde-dpmsolver++"``, ``"dpmsolver"`` or ``"sde-dpmsolver"``.
        solver: ``"midpoint"`` or ``"heun"``: of the second order.
        prediction_type: What the model predicts.
        flow: Whether the schedule is flow matching's: α = 1 − σ.
        max_order: 1 to 3.

    Returns:
        float64 ``[max_order·N, 10]``: the steps of order 1, then those of order 2, then 3. Rows whose history
        would lie before the first step are not meant to be used.
    """
    if max_order not in (1, 2, 3):
        raise ConfigError(f"solver_order: must be 1, 2 or 3, got {max_order}")
    if algorithm == "sde-dpmsolver" and max_order == 3:
        raise ConfigError("solver_order: the algorithm sde-dpmsolver has no third order; use sde-dpmsolver++")
    values = sigmas.detach().cpu().float()
    alpha = 1 - values if flow else 1 / ((values**2 + 1) ** 0.5)
    sigma = values if flow else values * alpha
    lam = torch.log(alpha) - torch.log(sigma)
    before = torch.arange(len(values) - 1)
    alpha_t, sigma_t, lam_t = alpha[1:], sigma[1:], lam[1:]
    alpha_s, sigma_s, lam_s = alpha[:-1], sigma[:-1], lam[:-1]
    h = lam_t - lam_s
    h0 = lam_s - lam[before - 1]
    h1 = lam[before - 1] - lam[before - 2]
    r0, r1 = (h0 / h).double(), (h1 / h).double()

    px, po = _conversion(alpha_s, sigma_s, values[:-1], algorithm, prediction_type)
    a, k0, c = _first_order(algorithm, alpha_t, alpha_s, sigma_t, sigma_s, h)
    blocks = []
    for order in range(1, max_order + 1):
        if order == 1:
            u0 = u1 = torch.zeros_like(r0)
        elif order == 2:
            u0 = _second_order(algorithm, solver, alpha_t, sigma_t, h).double()
            u1 = torch.zeros_like(r0)
        else:
            k1, k2 = (value.double() for value in _third_order(algorithm, alpha_t, sigma_t, h))
            w = r0 / (r0 + r1)
            u0, u1 = k1 * (1 + w) + k2 / (r0 + r1), -k1 * w - k2 / (r0 + r1)
        first = torch.zeros_like(r0) if order == 1 else u0 / r0
        second = torch.zeros_like(r0) if order < 3 else u1 / r1
        blocks.append(
            columns(
                len(h), px=px, po=po, a=a.double(), b=k0.double() + first, d1=second - first, d2=-second,
                c=c.double(), s=torch.ones_like(r0),
            )
        )  # fmt: skip
    return torch.cat(blocks)


def _conversion(
    alpha: Tensor, sigma: Tensor, raw_sigma: Tensor, algorithm: str, prediction_type: str
) -> tuple[Tensor, Tensor]:
    """px and po of the prediction m: x₀ for the ``++`` algorithms, else ε."""
    alpha, sigma, raw_sigma = alpha.double(), sigma.double(), raw_sigma.double()
    one, zero = torch.ones_like(alpha), torch.zeros_like(alpha)
    data = {
        "epsilon": (1 / alpha, -sigma / alpha),
        "sample": (zero, one),
        "v_prediction": (alpha, -sigma),
        "flow_prediction": (one, -raw_sigma),
    }
    noise = {
        "epsilon": (zero, one),
        "sample": (1 / sigma, -alpha / sigma),
        "v_prediction": (sigma, alpha),
    }
    known = data if algorithm.endswith("++") else noise
    if prediction_type not in known:
        raise ConfigError(f"prediction_type: {algorithm} takes {', '.join(known)}, got {prediction_type!r}")
    return known[prediction_type]


def _first_order(
    algorithm: str, alpha_t: Tensor, alpha_s: Tensor, sigma_t: Tensor, sigma_s: Tensor, h: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """a, k₀ and c, which all orders share."""
    none = torch.zeros_like(h)
    if algorithm == "dpmsolver++":
        return sigma_t / sigma_s, -(alpha_t * (torch.exp(-h) - 1.0)), none
    if algorithm == "dpmsolver":
        return alpha_t / alpha_s, -(sigma_t * (torch.exp(h) - 1.0)), none
    if algorithm == "sde-dpmsolver++":
        spread = sigma_t * torch.sqrt(1.0 - torch.exp(-2 * h))
        return sigma_t / sigma_s * torch.exp(-h), alpha_t * (1 - torch.exp(-2.0 * h)), spread
    if algorithm == "sde-dpmsolver":
        spread = sigma_t * torch.sqrt(torch.exp(2 * h) - 1.0)
        return alpha_t / alpha_s, -2.0 * (sigma_t * (torch.exp(h) - 1.0)), spread
    raise ConfigError(f"algorithm_type: {algorithm!r} is not known to DPMSolverMultistepScheduler")


def _second_order(algorithm: str, solver: str, alpha_t: Tensor, sigma_t: Tensor, h: Tensor) -> Tensor:
    """The coefficient of D₁₀ at order 2."""
    if algorithm == "dpmsolver++":
        if solver == "midpoint":
            return -0.5 * (alpha_t * (torch.exp(-h) - 1.0))
        return alpha_t * ((torch.exp(-h) - 1.0) / h + 1.0)
    if algorithm == "dpmsolver":
        if solver == "midpoint":
            return -0.5 * (sigma_t * (torch.exp(h) - 1.0))
        return -(sigma_t * ((torch.exp(h) - 1.0) / h - 1.0))
    if algorithm == "sde-dpmsolver++":
        if solver == "midpoint":
            return 0.5 * (alpha_t * (1 - torch.exp(-2.0 * h)))
        return alpha_t * ((1.0 - torch.exp(-2.0 * h)) / (-2.0 * h) + 1.0)
    if solver == "midpoint":
        return -(sigma_t * (torch.exp(h) - 1.0))
    return -2.0 * (sigma_t * ((torch.exp(h) - 1.0) / h - 1.0))


def _third_order(algorithm: str, alpha_t: Tensor, sigma_t: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """The coefficients of D₁ and D₂ at order 3."""
    if algorithm == "dpmsolver++":
        decay = torch.exp(-h) - 1.0
        return alpha_t * (decay / h + 1.0), -(alpha_t * ((decay + h) / h**2 - 0.5))
    if algorithm == "dpmsolver":
        growth = torch.exp(h) - 1.0
        return -(sigma_t * (growth / h - 1.0)), -(sigma_t * ((growth - h) / h**2 - 0.5))
    decay = 1.0 - torch.exp(-2.0 * h)
    return (
        alpha_t * (decay / (-2.0 * h) + 1.0),
        alpha_t * ((decay - 2.0 * h) / (2.0 * h) ** 2 - 0.5),
    )

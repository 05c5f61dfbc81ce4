"""The sampling loop over buffers that never move: one CUDA graph of denoiser and step, replayed once a step.

Everything that changes between steps lives on the device: the latents, the history of a multistep sampler, the
counter that the step itself advances, and the seeds that its noise is keyed by. :class:`StaticStep` is that step, and
nothing in it waits for the device or depends on what was allocated before; on a CPU it runs as it is, and on CUDA it
is recorded once and replayed, which leaves the host with one launch a step.

What this buys is host time: at small batches, where launching some hundred kernels takes longer than running them,
nearly all of it; at batch 64 and 256², where the denoiser's own work is hundreds of times the step's, one or two
per cent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from kdfast import capture
from kdfast.diffusion.plans import SamplerPlan
from kdfast.errors import ConfigError
from kdfast.functional.denoise import Order, guidance
from kdfast.ops import denoise as ops

Mode = Literal["auto", "graph", "compile", "eager"]
#: Called with the model input, a timestep for each of its rows, and the conditions; returns the raw output.
Denoiser = Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor]

# A captured graph must not be the first to run anything: kernels are compiled and workspaces made before.
_WARM_UP = 3


class StaticStep:
    """One denoiser call and one sampler step, in place.

    Args:
        denoiser: See :data:`Denoiser`.
        plan: The sampler.
        shape: Of the latents, ``[B, C, …]``.
        device: Where everything lives.
        dtype: Of the model's input. The latents themselves stay float32 between steps.
        conditions: Tensors for the denoiser, a row for each of the model input's; copied into buffers.
        guidance_scale: ``None``: one model row a sample; else both halves of classifier-free guidance.
        order: Which half is first.
        cfg_channels: Guide only the first channels.
        seeded: Of a stochastic sampler: noise from :attr:`seeds`; else from :attr:`noise`.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        plan: SamplerPlan,
        shape: tuple[int, ...],
        *,
        device: torch.device,
        dtype: torch.dtype,
        conditions: Mapping[str, Tensor],
        guidance_scale: float | None = None,
        order: Order = "cond_uncond",
        cfg_channels: int | None = None,
        seeded: bool = True,
    ) -> None:
        self.denoiser, self.plan = denoiser, plan
        with torch.inference_mode(False):  # a first call under it must not forbid later ones without
            self._allocate(
                plan, shape, device, dtype, conditions, seeded, guidance_scale, order, cfg_channels
            )

    def _allocate(
        self,
        plan: SamplerPlan,
        shape: tuple[int, ...],
        device: torch.device,
        dtype: torch.dtype,
        conditions: Mapping[str, Tensor],
        seeded: bool,
        guidance_scale: float | None,
        order: Order,
        cfg_channels: int | None,
    ) -> None:
        self._guidance = guidance(guidance_scale, order, cfg_channels)
        self._copies = 1 if guidance_scale is None else 2
        rows = self._copies * shape[0]
        self.latents = torch.zeros(shape, device=device)
        self.model_input = torch.zeros((rows, *shape[1:]), device=device, dtype=dtype)
        self.history = [torch.zeros_like(self.latents) for _ in range(plan.history)]
        self.counter = torch.zeros(1, dtype=torch.int64, device=device)
        self.conditions = {name: value.to(device).clone() for name, value in conditions.items()}
        self.seeds = torch.zeros(shape[0], dtype=torch.int64, device=device) if seeded else None
        self.noise = torch.zeros_like(self.latents) if plan.stochastic and not seeded else None

    def begin(self, noise: Tensor, conditions: Mapping[str, Tensor], seeds: Tensor | None = None) -> None:
        """Go back to the first step, with these inputs in the buffers.

        Args:
            noise: Standard normal, of the latents' shape.
            conditions: As given when the step was made: same names, same shapes.
            seeds: int64 ``[B]``: keys of the noise that a stochastic sampler adds.
        """
        self.latents.copy_(noise).mul_(self.plan.init_sigma)
        scaled = (self.latents * self.plan.first_scale).to(self.model_input.dtype)
        self.model_input.copy_(torch.cat([scaled] * self._copies))
        for name, value in conditions.items():
            self.conditions[name].copy_(value)
        for past in self.history:
            past.zero_()
        if seeds is not None and self.seeds is not None:
            self.seeds.copy_(seeds)
        self.counter.zero_()

    def __call__(self) -> None:
        """Advance all buffers by one step."""
        plan = self.plan
        timestep = plan.timesteps.index_select(0, self.counter).expand(len(self.model_input))
        output = self.denoiser(self.model_input, timestep, self.conditions)
        stepped = ops.denoise_step(
            self.latents,
            output,
            plan.table,
            self.counter,
            guidance=self._guidance,
            history=self.history,
            noise=self.noise,
            seed=self.seeds if plan.stochastic and self.noise is None else None,
            learned_variance=plan.learned_variance,
            clip=plan.clip,
            want_x0=bool(self.history),
            dtype=torch.float32,
            next_dtype=self.model_input.dtype,
            next_copies=self._copies,
        )
        for newer, older in zip(self.history[-2::-1], self.history[:0:-1]):
            older.copy_(newer)
        if self.history and stepped.x0 is not None:
            self.history[0].copy_(stepped.x0)
        self.latents.copy_(stepped.y)
        if stepped.model_input is not None:
            self.model_input.copy_(stepped.model_input)
        self.counter.add_(1)


class SamplingLoop:
    """From noise to latents, by a step that is captured on CUDA.

    Args:
        step: What is repeated.
        mode: ``"graph"`` records denoiser and step as one CUDA graph; ``"compile"`` hands the denoiser to
            ``torch.compile`` first (on CUDA what comes of it is captured too); ``"eager"`` runs it as it is;
            ``"auto"`` is ``"graph"`` on CUDA and ``"eager"`` elsewhere.

    Raises:
        ConfigError: An unknown mode, or ``"graph"`` without a CUDA device.
    """

    def __init__(self, step: StaticStep, mode: Mode = "auto") -> None:
        self.step, self.mode = step, resolve_mode(mode, step.latents.device)
        if self.mode == "compile":
            step.denoiser = torch.compile(step.denoiser, dynamic=False)
        self._capture = capture.can_capture(step.latents.device) and self.mode != "eager"
        self._graph: Any = None

    @torch.no_grad()
    def run(
        self,
        noise: Tensor,
        conditions: Mapping[str, Tensor],
        *,
        seeds: Tensor | None = None,
        draw: Callable[[], Tensor] | None = None,
        on_step: Callable[[], None] | None = None,
    ) -> Tensor:
        """Sample once.

        Args:
            noise: Standard normal ``[B, C, …]``.
            conditions: The denoiser's tensors.
            seeds: int64 ``[B]``: of a stochastic sampler whose step was made ``seeded``.
            draw: Gives the noise of the next step, of one that was not.
            on_step: Called after each step was launched (it may not have run yet).

        Returns:
            The latents, float32, in memory of their own.
        """
        if self._capture and self._graph is None:
            self.step.begin(noise, conditions, seeds)
            self._graph = record(self.step)
        self.step.begin(noise, conditions, seeds)
        advance = self.step if self._graph is None else self._graph.replay
        for _ in range(len(self.step.plan)):
            if self.step.noise is not None and draw is not None:
                self.step.noise.copy_(draw())
            advance()
            if on_step is not None:
                on_step()
        return self.step.latents.clone()


def resolve_mode(mode: Mode, device: torch.device) -> Mode:
    """What ``"auto"`` means on a device.

    Raises:
        ConfigError: See :class:`SamplingLoop`.
    """
    if mode not in get_args(Mode):
        raise ConfigError(f"mode: got {mode!r}, accepted: {', '.join(get_args(Mode))}")
    if mode == "graph" and not capture.can_capture(device):
        raise ConfigError(
            f"mode: got 'graph' on {device}, accepted: a CUDA device for it, or 'compile' or 'eager'"
        )
    if mode == "auto":
        return "graph" if capture.can_capture(device) else "eager"
    return mode


def record(step: StaticStep) -> Any:
    """Capture ``step`` as a CUDA graph, after running it a few times on a stream of its own."""
    # A sampler may have fewer steps than there are rehearsals. Threads of the data path keep using the device
    # meanwhile; only this thread's calls are recorded.
    graph, _ = capture.record(
        step,
        step.latents.device,
        rehearsals=_WARM_UP,
        before=step.counter.zero_,
        error_mode="thread_local",
    )
    return graph


def class_denoiser(model: torch.nn.Module) -> Denoiser:
    """A class-conditional model as :data:`Denoiser`; condition ``labels``."""

    def call(x: Tensor, timestep: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        output: Tensor = model(x, timestep=timestep, class_labels=conditions["labels"]).sample
        return output

    return call


def text_denoiser(model: torch.nn.Module) -> Denoiser:
    """A text-conditional U-Net as :data:`Denoiser`; condition ``prompt``."""

    def call(x: Tensor, timestep: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        output: Tensor = model(x, timestep, encoder_hidden_states=conditions["prompt"], return_dict=False)[0]
        return output

    return call

"""One guided denoising step: the fused step against the formulas, and the drop-in scheduler against diffusers'.

Traffic in moves of one sample (S bytes, read or written once), guidance scale and clamp-free DDIM:

    eager       22S   u + g·(c − u): 8; x₀ = (x − σ·ε)/α: 7; α'·x₀ + σ'·ε: 7
    compiled    4S    reads x and both halves, writes y
    kdfast      4S    the same; the scheduler also stores the predicted x₀: 5S

The tail of DiTPipeline's loop, whose model returns a variance that is cut off and whose sample has both halves:

    diffusers   52S   slices, guides, joins, joins the variance on again, cuts it off, steps both halves
    kdfast      6S    reads x twice (once a half) and four of eight channels of both halves, writes both halves
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from kdfast.backend import triton_available
from kdfast.benchmarks.case import Case, Provider, Settings, Traffic, Work, compiled, peer
from kdfast.benchmarks.environment import turns_for
from kdfast.functional import denoise_step

GUIDANCE = 4.0
STEPS = 50


def cases(settings: Settings) -> Iterator[Case]:
    """All rows of the suite for this device and size of run."""
    small, latents, pixels = (1, 4, 32, 32), (64, 4, 32, 32), (256, 4, 64, 64)
    if settings.tiny:
        shapes = [((1, 4, 8, 8), torch.float32)]
    elif settings.device == "cpu":
        shapes = [(small, torch.float32), (latents, torch.float32)]
    else:
        shapes = [(small, torch.float32), (latents, torch.float32), (pixels, torch.bfloat16)]
        if not settings.quick:
            shapes += [(pixels, torch.float32), ((32, 3, 256, 256), torch.bfloat16)]
    for shape, dtype in shapes:
        inputs = _Inputs(shape, dtype, settings.device)
        yield _step_case(inputs, settings)
        yield _scheduler_case(inputs, settings)
    tails = [small, latents, *([(256, 4, 32, 32)] if settings.device == "cuda" else [])]
    for shape in [(1, 4, 8, 8)] if settings.tiny else tails:
        yield _tail_case(shape, settings)
    # One image's latents, where a scheduler's own way is most of what it takes.
    for name in ("DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"):
        yield _overhead_case(name, settings.pick((1, 4, 8, 8), small, small), settings)


def eager_step(
    sample: torch.Tensor,
    output: torch.Tensor,
    alpha: float,
    sigma: float,
    next_alpha: float,
    next_sigma: float,
) -> torch.Tensor:
    """Guidance and a DDIM step (Song et al. 2021, Eq. 12, η = 0), as it is written down."""
    cond, uncond = output.chunk(2)
    noise = uncond + GUIDANCE * (cond - uncond)
    original = (sample - sigma * noise) / alpha
    return next_alpha * original + next_sigma * noise


class _Inputs:
    """Rotating samples and model outputs, and the coefficients of one step in the middle of 50."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self.size = int(torch.Size(shape).numel()) * dtype.itemsize
        self.turns = turns_for(4 * self.size, device)
        betas = torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64)  # diffusers' default schedule
        bars = torch.cumprod(1 - betas, 0)
        self.timestep = 500
        bar, next_bar = float(bars[self.timestep]), float(bars[self.timestep - 1000 // STEPS])
        self.coefficients = (bar**0.5, (1 - bar) ** 0.5, next_bar**0.5, (1 - next_bar) ** 0.5)
        self._pairs: list[tuple[torch.Tensor, torch.Tensor]] = []

    def pairs(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        if not self._pairs:
            generator = torch.Generator(self.device).manual_seed(0)
            doubled = (2 * self.shape[0], *self.shape[1:])
            self._pairs = [
                (
                    torch.randn(self.shape, generator=generator, device=self.device).to(self.dtype),
                    torch.randn(doubled, generator=generator, device=self.device).to(self.dtype),
                )
                for _ in range(self.turns)
            ]
        return self._pairs

    def table(self) -> torch.Tensor:
        """The step's row px po a b d d1 d2 d3 c s: y = a·x + d·o."""
        alpha, sigma, next_alpha, next_sigma = self.coefficients
        ratio = next_alpha / alpha
        row = [1 / alpha, -sigma / alpha, ratio, 0, next_sigma - ratio * sigma, 0, 0, 0, 0, 1]
        return torch.tensor([row], dtype=torch.float32, device=self.device)

    def check(self, provider: str, result: torch.Tensor) -> None:
        sample, output = self.pairs()[0]
        want = eager_step(sample.double(), output.double(), *self.coefficients)
        # Eager bf16 rounds seven times; relative to the largest value since terms cancel.
        limit = 1e-5 if self.dtype == torch.float32 else 6e-2 if provider != "kdfast" else 2e-2
        error = float((result.double() - want).abs().max() / want.abs().max())
        assert error < limit, f"off by {error:.2e} of the largest value; limit {limit:.0e}"

    def params(self) -> dict[str, Any]:
        return {"shape": "x".join(map(str, self.shape)), "dtype": str(self.dtype).removeprefix("torch.")}

    def moves(self, count: int) -> Traffic:
        return Traffic(f"{count}S", count * self.size)


def _case(name: str, inputs: _Inputs, settings: Settings, providers: tuple[Provider, ...]) -> Case:
    items = inputs.shape[0]
    return Case(
        "denoise",
        name,
        inputs.params(),
        inputs.turns,
        providers,
        inputs.check,
        items,
        "samples",
        working_set=4 * inputs.size,
        family="denoise",
    )


def _step_case(inputs: _Inputs, settings: Settings) -> Case:
    def plain(step: Any) -> Work:
        pairs = inputs.pairs()
        return lambda turn: step(*pairs[turn % inputs.turns], *inputs.coefficients)

    def ours() -> Work:
        pairs, table = inputs.pairs(), inputs.table()

        def step(turn: int) -> torch.Tensor:
            return denoise_step(*pairs[turn % inputs.turns], table, 0, guidance_scale=GUIDANCE)

        return step

    fused = settings.device == "cuda" and triton_available()
    providers = (
        Provider("eager", lambda: plain(eager_step), inputs.moves(22)),
        Provider("torch.compile", lambda: plain(compiled(eager_step)), inputs.moves(4)),
        Provider("kdfast", ours, inputs.moves(4) if fused else None),
    )
    return _case("guided DDIM step", inputs, settings, providers)


def _scheduler_case(inputs: _Inputs, settings: Settings) -> Case:
    def theirs() -> Work:
        scheduler = peer("diffusers").DDIMScheduler(clip_sample=False)
        scheduler.set_timesteps(STEPS, device=inputs.device)
        pairs = inputs.pairs()

        def step(turn: int) -> Any:
            sample, output = pairs[turn % inputs.turns]
            cond, uncond = output.chunk(2)
            guided = uncond + GUIDANCE * (cond - uncond)
            return scheduler.step(guided, inputs.timestep, sample).prev_sample

        return step

    def ours() -> Work:
        peer("diffusers")
        from kdfast.diffusion import DDIMScheduler

        scheduler = DDIMScheduler(clip_sample=False)
        scheduler.set_timesteps(STEPS, device=inputs.device)
        pairs = inputs.pairs()

        def step(turn: int) -> Any:
            sample, output = pairs[turn % inputs.turns]
            return scheduler.step_cfg(output, inputs.timestep, sample, GUIDANCE).prev_sample

        return step

    fused = settings.device == "cuda" and triton_available()
    providers = (
        Provider("diffusers", theirs),
        Provider("kdfast", ours, inputs.moves(5) if fused else None),
    )
    return _case("DDIM scheduler with guidance", inputs, settings, providers)


def _overhead_case(name: str, shape: tuple[int, ...], settings: Settings) -> Case:
    """A whole sampling run without its network: what a scheduler adds to one."""
    steps = settings.pick(4, STEPS, STEPS)
    generator = torch.Generator(settings.device).manual_seed(0)
    noise, output = (torch.randn(shape, generator=generator, device=settings.device) for _ in range(2))

    def sampling(library: Any, start: torch.Tensor, predicted: torch.Tensor) -> Work:
        scheduler = getattr(library, name)()

        def work(turn: int) -> torch.Tensor:
            scheduler.set_timesteps(steps, device=start.device)
            sample = start
            for timestep in scheduler.timesteps:
                scheduler.scale_model_input(sample, timestep)
                sample = scheduler.step(predicted, timestep, sample).prev_sample
            return sample

        return work

    def ours() -> Work:
        peer("diffusers")
        import kdfast.diffusion

        return sampling(kdfast.diffusion, noise, output)

    def check(provider: str, result: torch.Tensor) -> None:
        want = sampling(peer("diffusers"), noise.double(), output.double())(0)
        error = float((result.double() - want).abs().max() / want.abs().max())
        assert error < 1e-4, f"off by {error:.2e} of the largest value; limit 1e-4"

    providers = (
        # set_timesteps copies from the host: neither run can be captured as a whole.
        Provider("diffusers", lambda: sampling(peer("diffusers"), noise, output), graph=False),
        Provider("kdfast", ours, graph=False),
    )
    params = {"scheduler": name.removesuffix("Scheduler"), "shape": "x".join(map(str, shape)), "steps": steps}
    return Case(
        "denoise",
        "sampling without the network",
        params,
        1,
        providers,
        check,
        steps,
        "steps",
        family="denoise",
    )


def _tail_case(shape: tuple[int, ...], settings: Settings) -> Case:
    """What comes after the model in DiTPipeline: 8 channels of which 4 are stepped, both halves of a doubled sample."""
    device, dtype = settings.device, torch.float32
    size = int(torch.Size(shape).numel()) * dtype.itemsize
    turns = turns_for(6 * size, device)
    batch, channels, *rest = shape
    generator = torch.Generator(device).manual_seed(0)
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []

    def inputs() -> list[tuple[torch.Tensor, torch.Tensor]]:
        if not pairs:
            for _ in range(turns):
                half = torch.randn(shape, generator=generator, device=device)
                doubled = (2 * batch, 2 * channels, *rest)
                output = torch.randn(doubled, generator=generator, device=device)
                pairs.append((torch.cat([half, half]), output))
        return pairs

    def scheduler(kind: Any) -> Any:
        made = kind(clip_sample=False)
        made.set_timesteps(STEPS, device=device)
        return made

    def plain(stepper: Any, sample: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        eps, variance = output[:, :channels], output[:, channels:]
        cond, uncond = torch.split(eps, len(eps) // 2, dim=0)
        half = uncond + GUIDANCE * (cond - uncond)
        joined = torch.cat([torch.cat([half, half], dim=0), variance], dim=1)
        made: torch.Tensor = stepper.step(joined[:, :channels], 500, sample).prev_sample
        return made

    def theirs() -> Work:
        stepper = scheduler(peer("diffusers").DDIMScheduler)
        return lambda turn: plain(stepper, *inputs()[turn % turns])

    def ours() -> Work:
        peer("diffusers")
        from kdfast.diffusion import DDIMScheduler

        stepper = scheduler(DDIMScheduler)
        stepper.keep_pred_original = False

        def step(turn: int) -> Any:
            sample, output = inputs()[turn % turns]
            return stepper.step_cfg(output, 500, sample, GUIDANCE).prev_sample

        return step

    def check(provider: str, made: torch.Tensor) -> None:
        sample, output = inputs()[0]
        want = plain(scheduler(peer("diffusers").DDIMScheduler), sample.double(), output.double())
        error = float((made.double() - want).abs().max() / want.abs().max())
        assert error < 1e-5, f"off by {error:.2e} of the largest value; limit 1e-5"

    fused = device == "cuda" and triton_available()
    providers = (
        Provider("diffusers", theirs, Traffic("52S", 52 * size)),
        Provider("kdfast", ours, Traffic("6S", 6 * size) if fused else None),
    )
    params = {"shape": f"{2 * batch}x{2 * channels}x{'x'.join(map(str, rest))}", "dtype": "float32"}
    return Case(
        "denoise",
        "DiT tail",
        params,
        turns,
        providers,
        check,
        batch,
        "samples",
        working_set=6 * size,
        family="denoise",
    )

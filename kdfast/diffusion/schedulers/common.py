"""What the schedulers share: coefficient tables on the device, and the way into the fused step."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdfast.errors import require
from kdfast.functional.denoise import Order, guidance
from kdfast.ops.denoise import COLUMNS, Guidance, guided_output
from kdfast.profiling import annotate

diffusers = require("diffusers", extra="diffusion", feature="kdfast.diffusion")

#: Stands for 1/√ᾱ at zero terminal SNR (ᾱ = 0): a power of two, so that clamping (x − o)·BIG is exact.
BIG = 2.0**100


class _Entry(NamedTuple):
    sources: tuple[Tensor, ...]
    versions: tuple[int, ...]
    table: Tensor


def _version(tensor: Tensor) -> int:
    """How often a tensor was written in place; those made in inference mode do not count."""
    return 0 if tensor.is_inference() else tensor._version


class TableCache:
    """Coefficient tables by (key, device, dtype), rebuilt when the schedule they were made from changes."""

    def __init__(self, limit: int = 32) -> None:
        self._limit = limit
        self._entries: dict[Hashable, _Entry] = {}

    def get(
        self,
        key: Hashable,
        device: torch.device,
        dtype: torch.dtype,
        sources: Sequence[Tensor],
        build: Callable[[], Tensor],
    ) -> Tensor:
        """The table that ``build`` makes (float64, on the CPU), in ``dtype`` on ``device``."""
        full_key = (key, device, dtype)
        entry = self._entries.get(full_key)
        if entry is not None and all(
            new is old and _version(new) == version
            for new, old, version in zip(sources, entry.sources, entry.versions, strict=True)
        ):
            return entry.table
        if len(self._entries) >= self._limit:
            self._entries.pop(next(iter(self._entries)))
        with torch.inference_mode(False):  # the table may serve a training step later
            table = build().to(dtype).to(device)
        self._entries[full_key] = _Entry(tuple(sources), tuple(map(_version, sources)), table)
        return table


def table_cache(scheduler: Any) -> TableCache:
    """The scheduler's cache; made on first use, since ``__init__`` belongs to diffusers."""
    cache = scheduler.__dict__.get("_kdfast_tables")
    if cache is None:
        cache = scheduler.__dict__["_kdfast_tables"] = TableCache()
    return cache  # type: ignore[no-any-return]


def columns(rows: int, **values: Tensor) -> Tensor:
    """A float64 table ``[rows, 10]``, zero but for the columns given."""
    table = torch.zeros(rows, len(COLUMNS), dtype=torch.float64)
    for name, value in values.items():
        table[:, COLUMNS.index(name)] = value
    return table


def table_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any tensor is, else float32."""
    doubles = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if doubles else torch.float32


def row_of(timestep: int | Tensor, device: torch.device) -> int | Tensor:
    """A timestep as the step op takes it: read on the host if it is there, left on the device if not.

    Raises:
        TypeError: Not an integer.
        ValueError: A tensor of more than one element.
    """
    if not isinstance(timestep, Tensor):
        try:
            return operator.index(timestep)
        except TypeError:
            raise TypeError(f"timestep: must be an integer, got {type(timestep).__name__}") from None
    if timestep.is_floating_point():
        raise TypeError(f"timestep: must be an integer, got a tensor of {timestep.dtype}")
    if timestep.numel() != 1:
        raise ValueError(f"timestep: must have one element, got shape {tuple(timestep.shape)}")
    return int(timestep) if timestep.device.type == "cpu" else timestep.to(device)


def check_same_channels(sample: Tensor, model_output: Tensor) -> None:
    """Refuse a model output with further channels where diffusers would fail to subtract it."""
    if sample.dim() == model_output.dim() > 1:
        given, wanted = model_output.shape[1], sample.shape[1]
        if given > wanted > 1:
            raise ValueError(
                f"model_output: has {given} channels for a sample of {wanted}; pass "
                f"model_output[:, :{wanted}], or use step_cfg, which reads only as many as the sample has"
            )


Generators = torch.Generator | list[torch.Generator] | None


def draw_noise(
    model_output: Tensor,
    sample: Tensor,
    guide: Guidance,
    generator: Generators,
    noise: Tensor | None,
    seed: int | Tensor | None,
    dtype: torch.dtype | None = None,
) -> Tensor | None:
    """The step's noise tensor, or None if the kernel makes it from ``seed``.

    Raises:
        ValueError: More than one source of noise.
    """
    sources = {"generator": generator, "variance_noise": noise, "seed": seed}
    given = [name for name, value in sources.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)}: give one source of noise, got {len(given)}")
    if noise is not None or seed is not None:
        return noise
    # Diffusers draws in the shape of the output it steps with: guided, without a variance's channels.
    plain = guide.scale is None and model_output.shape[1:2] == sample.shape[1:2]
    return diffusers.utils.torch_utils.randn_tensor(  # type: ignore[no-any-return]
        model_output.shape if plain else sample.shape,
        generator=generator,
        device=model_output.device,
        dtype=dtype or model_output.dtype,
    )


class GuidedStep:
    """Adds :meth:`step_cfg` to a scheduler that has a ``_fused`` step."""

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
            model_output, timestep, sample, guide, generator, variance_noise, seed, return_dict
        )

    def _fused(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        guide: Guidance,
        generator: Generators,
        noise: Tensor | None,
        seed: int | Tensor | None,
        return_dict: bool,
    ) -> Any:
        raise NotImplementedError


def unguided(model_output: Tensor, sample: Tensor, guide: Guidance) -> Tensor:
    """The output after guidance, for a step that is left to diffusers."""
    if guide.scale is None:
        return model_output
    return guided_output(model_output, sample, guide).to(model_output.dtype)


def noisy(schedule: Tensor, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """√ᾱ_t and √(1 − ᾱ_t), shaped to multiply ``like``.

    The roots are taken in float32 at least: in bfloat16, ᾱ near 1 would round to 1.
    """
    dtype = like.dtype if like.dtype == torch.float64 else torch.float32
    alpha = schedule.to(device=like.device, dtype=dtype)[timesteps.to(like.device)].flatten()
    alpha = alpha.view(-1, *([1] * (like.dim() - 1)))
    return (alpha**0.5).to(like.dtype), ((1 - alpha) ** 0.5).to(like.dtype)

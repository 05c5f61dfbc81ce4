"""What every scheduler's arithmetic needs: coefficient tables on the device, timesteps as rows, checks."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdfast.capture import capturing
from kdfast.errors import require
from kdfast.ops.denoise import COLUMNS

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
        #: Tables that graphs read, whatever becomes of their entries.
        self._captured: dict[int, Tensor] = {}

    def get(
        self,
        key: Hashable,
        device: torch.device,
        dtype: torch.dtype,
        sources: Sequence[Tensor],
        build: Callable[[], Tensor],
    ) -> Tensor:
        """The table that ``build`` makes (float64, on the CPU), in ``dtype`` on ``device``."""
        table = self._get((key, device, dtype), sources, lambda: build().to(dtype).to(device))
        if capturing(device):
            self._captured[id(table)] = table
        return table

    def _get(self, full_key: Hashable, sources: Sequence[Tensor], build: Callable[[], Tensor]) -> Tensor:
        entry = self._entries.get(full_key)
        if entry is not None and all(
            new is old and _version(new) == version
            for new, old, version in zip(sources, entry.sources, entry.versions, strict=True)
        ):
            return entry.table
        if len(self._entries) >= self._limit:
            self._entries.pop(next(iter(self._entries)))
        with torch.inference_mode(False):  # the table may serve a training step later
            table = build()
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


def clip_bound(config: Any) -> float | None:
    """±Bound of the predicted x₀; dynamic thresholding at a maximum of 1 clamps to ±1, whatever the quantile."""
    if config.get("thresholding"):
        return 1.0
    if not config.get("clip_sample"):
        return None
    bound = float(config.clip_sample_range)
    if not 0 < bound < math.inf:
        raise ValueError(f"clip_sample_range: got {bound}, accepted: a finite number above 0")
    return bound


def needs_quantiles(config: Any) -> bool:
    """Whether x₀ is thresholded by a quantile of each image: no linear step."""
    return bool(config.get("thresholding")) and config.sample_max_value != 1


def noisy(schedule: Tensor, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """√ᾱ_t and √(1 − ᾱ_t), shaped to multiply ``like``.

    The roots are taken in float32 at least: in bfloat16, ᾱ near 1 would round to 1.
    """
    dtype = like.dtype if like.dtype == torch.float64 else torch.float32
    ahead = like.is_cuda  # onto a GPU: nothing waits for it
    schedule = schedule.to(like.device, dtype, non_blocking=ahead)
    alpha = schedule[timesteps.to(like.device, non_blocking=ahead)].flatten()
    alpha = alpha.view(-1, *([1] * (like.dim() - 1)))
    return (alpha**0.5).to(like.dtype), ((1 - alpha) ** 0.5).to(like.dtype)

"""Arguments of the replay buffer: each check names the argument, what it got, and what it accepts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch


def as_vector(
    name: str, value: Any, dtype: torch.dtype, length: int | None, device: torch.device
) -> torch.Tensor:
    """``value`` as a contiguous vector of this dtype on the device."""
    if (
        isinstance(value, torch.Tensor)
        and value.dtype is dtype
        and value.dim() == 1
        and (length is None or value.numel() == length)
        and value.is_contiguous()
        and value.device == device
    ):
        return value  # as it comes from `sample`: nothing to do
    if not isinstance(value, torch.Tensor):
        value = torch.as_tensor(value)
        if value.numel() == 0:
            value = value.to(dtype)
    if value.dim() != 1 or (length is not None and value.shape[0] != length):
        expected = "[n]" if length is None else f"[{length}]"
        raise ValueError(f"{name}: got shape {list(value.shape)}, accepted: {expected}")
    if value.dtype != dtype:
        if dtype == torch.int64 and (value.is_floating_point() or value.dtype == torch.bool):
            raise TypeError(f"{name}: got {value.dtype}, accepted: an integer dtype")
        if value.is_complex():
            raise TypeError(f"{name}: got {value.dtype}, accepted: a real dtype")
    moved: torch.Tensor = value.detach().to(device, dtype).contiguous()
    return moved


def numbers(value: Any) -> tuple[float, ...]:
    """A number, a sequence of them or a tensor, as a tuple."""
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    return tuple(value) if isinstance(value, Sequence) else (value,)


def check_int(name: str, value: Any, least: int, most: int) -> None:
    """An integer from ``least`` to ``most``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {value!r}, accepted: an integer")
    if not least <= value <= most:
        raise ValueError(f"{name}: got {value}, accepted: {least} to {most}")


def check_real(name: str, value: Any) -> None:
    """A finite number, not negative."""
    if isinstance(value, bool) or not isinstance(value, float | int):
        raise TypeError(f"{name}: got {value!r}, accepted: a number")
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}: got {value}, accepted: at least 0, finite")


def check_choice(name: str, value: Any, accepted: Sequence[str]) -> None:
    """One of these."""
    if value not in accepted:
        raise ValueError(f"{name}: got {value!r}, accepted: {', '.join(accepted)}")


def check_exponents(alpha: float, beta: float) -> None:
    """αβ < 1."""
    # With δ = w·KL the fixed point is P ∝ KL^(α/(1+αβ)), reached only while αβ < 1.
    if alpha * beta >= 1:
        raise ValueError(
            f"alpha, beta: got {alpha} and {beta}, whose product is {alpha * beta:g}; accepted: below 1"
        )


def affine_of(
    mean: tuple[float, ...], std: tuple[float, ...], channels: int, unit: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(gain, bias), float32 ``[channels]``, of ``(x / unit − mean) / std = x·gain + bias``."""
    for name, values in (("mean", mean), ("std", std)):
        if not channels or len(values) not in (1, channels):
            raise ValueError(
                f"normalize: got {len(values)} values of {name}, accepted: one, or a channel each ({channels})"
            )
    if not all(math.isfinite(m) for m in mean) or not all(s > 0 and math.isfinite(s) for s in std):
        raise ValueError(f"normalize: got {mean} and {std}, accepted: finite means, positive deviations")
    means, stds = (torch.tensor(x, dtype=torch.float64).expand(channels) for x in (mean, std))
    return (1 / (unit * stds)).float(), (-means / stds).float()


def check_rows(labels: torch.Tensor | None, priorities: torch.Tensor | None, num_classes: int | None) -> None:
    """What the C++ core checks of rows on a CPU, for strict buffers on a GPU; it syncs."""
    most = num_classes or 1 << 31
    if labels is not None and bool(((labels < 0) | (labels >= most)).any()):
        raise ValueError(f"labels: got one out of range, accepted: 0 to {most - 1}")
    if priorities is not None and not bool(priorities.isfinite().all()):
        raise ValueError("priority: got NaN or infinity, accepted: finite values (strict=True)")


def check_update(
    leaves: torch.Tensor, index: torch.Tensor, priority: torch.Tensor, generation: torch.Tensor | None
) -> None:
    """The same of an update."""
    if bool(((index < 0) | (index >= leaves.numel())).any()):
        raise ValueError(f"index: got one out of range, accepted: 0 to {leaves.numel() - 1}")
    if generation is None and not bool((leaves[index] != 0).all()):
        raise ValueError("index: got an empty slot")
    check_rows(None, priority, None)

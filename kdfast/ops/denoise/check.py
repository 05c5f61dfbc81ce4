"""What the denoising step refuses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kdfast.reference.denoise import COLUMNS, Guidance


def broadcast(
    sample: Tensor, model_output: Tensor, noise: Tensor | None, history: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor | None, Sequence[Tensor]]:
    """The same tensors, broadcast to the sample's shape."""
    if (
        sample.dim() > 1
        and model_output.dim() == sample.dim()
        and model_output.shape[1] > sample.shape[1] > 1
    ):
        model_output = model_output.narrow(1, 0, sample.shape[1])
    present = [sample, model_output, *history] + ([] if noise is None else [noise])
    try:
        shape = torch.broadcast_shapes(*(t.shape for t in present))  # type: ignore[no-untyped-call]
    except RuntimeError:
        shapes = ", ".join(str(tuple(t.shape)) for t in present)
        raise ValueError(
            f"sample, model_output, history and noise must broadcast to one shape (model_output may have "
            f"more channels), got {shapes}"
        ) from None
    expanded = [t.expand(shape) for t in present]
    noise = expanded.pop() if noise is not None else None
    return expanded[0], expanded[1], noise, expanded[2:]


def check(
    inputs: Sequence[Tensor],
    sample: Tensor,
    model_output: Tensor,
    table: Tensor,
    step: int | Tensor,
    guidance: Guidance,
    noise: Tensor | None,
    seed: int | Tensor | None,
    history: Sequence[Tensor],
) -> torch.dtype:
    """Refuse what does not fit; the dtype of the result."""
    dtype = sample.dtype
    for tensor in inputs:
        if not tensor.is_floating_point():
            raise TypeError(
                f"sample, model_output, history and noise must be floating-point, got {tensor.dtype}"
            )
        if tensor.device != sample.device:
            raise ValueError(
                "sample, model_output, history and noise must be on one device, got "
                f"{sample.device} and {tensor.device}"
            )
        if tensor.dtype != dtype:
            dtype = torch.promote_types(dtype, tensor.dtype)
    if table.dim() != 2 or table.shape[1] != len(COLUMNS) or not table.is_contiguous():
        raise ValueError(
            f"coefficients: must be a contiguous [steps, {len(COLUMNS)}] table with columns "
            f"{', '.join(COLUMNS)}, got shape {tuple(table.shape)}"
        )
    wanted = (torch.float64,) if dtype == torch.float64 else (torch.float32, torch.float64)
    if table.dtype not in wanted or (table.dtype == torch.float64 and dtype != torch.float64):
        raise ValueError(
            f"coefficients: must be {'float64' if dtype == torch.float64 else 'float32'} for {dtype} inputs, "
            f"got {table.dtype}"
        )
    if table.requires_grad:
        raise ValueError("coefficients: no gradient flows to them; detach the table")
    if table.device != sample.device:
        raise ValueError(f"coefficients: must be on {sample.device} like the sample, got {table.device}")
    if isinstance(step, Tensor):
        if step.numel() != 1 or step.is_floating_point() or step.device != sample.device:
            raise ValueError(
                f"step: must be an int, or an integer tensor of one element on {sample.device}, "
                f"got {step.dtype} {tuple(step.shape)} on {step.device}"
            )
    elif not 0 <= step < table.shape[0]:
        raise ValueError(f"step: must be in [0, {table.shape[0]}), the rows of the table, got {step}")
    if noise is not None and seed is not None:
        raise ValueError("noise and seed: give one of them, got both")
    if isinstance(seed, Tensor) and (
        seed.numel() not in (1, sample.shape[0] if sample.dim() else 1) or seed.dtype != torch.int64
    ):
        raise ValueError(
            f"seed: must be an int, or an int64 tensor of one element or of one for each row of the sample "
            f"({sample.shape[0] if sample.dim() else 1}), got {seed.dtype} {tuple(seed.shape)}"
        )
    if isinstance(seed, Tensor) and (seed.device != sample.device or not seed.is_contiguous()):
        raise ValueError(
            f"seed: must be contiguous and on {sample.device} like the sample, got it on {seed.device}"
        )
    if len(history) > 3:
        raise ValueError(f"history: at most 3 tensors, got {len(history)}")
    if guidance.scale is not None:
        check_guided(sample, model_output, guidance, noise, history)
    return dtype


def check_guided(
    sample: Tensor, model_output: Tensor, guidance: Guidance, noise: Tensor | None, history: Sequence[Tensor]
) -> None:
    """Refuse a model output whose rows are not twice the sample's, or one that guidance has no use for."""
    rows, given = model_output.shape[0] if model_output.dim() else 0, tuple(model_output.shape)
    if (
        sample.dim() < 2
        or model_output.dim() != sample.dim()
        or rows % 2
        or sample.shape[0] not in (rows, rows // 2)
        or model_output.shape[1] < sample.shape[1]
        or model_output.shape[2:] != sample.shape[2:]
    ):
        raise ValueError(
            f"guidance takes a model_output with two rows and at least one channel for each of the sample's "
            f"(whose rows may be doubled too): sample {tuple(sample.shape)}, model_output {given}"
        )
    if guidance.channels is not None and not 0 <= guidance.channels <= sample.shape[1]:
        raise ValueError(f"cfg_channels: must be in [0, {sample.shape[1]}], got {guidance.channels}")
    for other in [*history] + ([] if noise is None else [noise]):
        if other.shape != sample.shape:
            raise ValueError(
                f"noise and history must have the sample's shape {tuple(sample.shape)}, "
                f"got {tuple(other.shape)}"
            )


def check_learned(sample: Tensor, model_output: Tensor, others: Sequence[Tensor]) -> None:
    """Refuse a model output without a variance for each of the sample's channels."""
    if (
        sample.dim() < 2
        or model_output.dim() != sample.dim()
        or model_output.shape[1] < 2 * sample.shape[1]
        or model_output.shape[2:] != sample.shape[2:]
        or model_output.shape[0] not in (sample.shape[0], 2 * sample.shape[0])
    ):
        raise ValueError(
            f"a learned variance takes a model_output with two channels for each of the sample's: sample "
            f"{tuple(sample.shape)}, model_output {tuple(model_output.shape)}"
        )
    for other in others:
        if other.shape != sample.shape:
            raise ValueError(
                f"noise and history must have the sample's shape {tuple(sample.shape)}, "
                f"got {tuple(other.shape)}"
            )

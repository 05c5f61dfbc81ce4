"""The C++ core's calls over torch's memory. State on a GPU can be worked on here too, over and back."""

from __future__ import annotations

import torch

from kdfast.reference.replay.state import Meta, ReplayBatch, ReplayState

Affine = tuple[torch.Tensor, torch.Tensor] | None

__all__ = ["add", "normalized", "rebuild", "remove", "sample", "update"]


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def add(
    state: ReplayState,
    samples: torch.Tensor,
    labels: torch.Tensor | None,
    priority: torch.Tensor | None,
) -> torch.Tensor:
    """Insert rows one after another; returns the slot of each, int64.

    Args:
        state: Any device.
        samples: ``[n, *sample_shape]`` of the rows' dtype on the state's device, contiguous.
        labels: None or int64 ``[n]``, contiguous; likewise on the state's device.
        priority: None (the running maximum) or float32 ``[n]``, contiguous; likewise.
    """
    count = samples.shape[0]
    index = torch.empty(count, dtype=torch.int64)
    if state.on_cpu:
        source = samples.data_ptr() if state.row_bytes else 0
        state.core.add(count, source, _address(labels), _address(priority), index.data_ptr())
        return index
    with state.turns:
        with state.on_host() as host:
            host_labels = None if labels is None else labels.cpu()
            host_priority = None if priority is None else priority.cpu()
            first = int(host.meta[Meta.INSERTED])
            host.core.add(count, 0, _address(host_labels), _address(host_priority), index.data_ptr())
            # A slot may have been given twice; the generation tells which row stayed.
            numbers = (torch.arange(count) + first).to(torch.int32)
            stayed = host.generation[index] == numbers
        kept = stayed.nonzero().squeeze(1)
        state.rows[index[kept].to(state.device)] = samples[kept.to(state.device)]
    return index.to(state.device)


def sample(
    state: ReplayState,
    batch_size: int,
    beta: float,
    stratified: bool,
    affine: Affine,
) -> ReplayBatch:
    """Draw rows with P = q/S, with replacement; w = (N·P)^−β.

    Args:
        state: Any device.
        batch_size: Draws.
        beta: β.
        stratified: One draw in each of ``batch_size`` equal parts of the mass, else independent draws.
        affine: None, or (gain, bias), float32 ``[channels]`` each on the state's device: rows come as float32,
            ``row·gain + bias`` by first dimension of the sample.
    """
    if state.on_cpu:
        return _sample_here(state, batch_size, beta, stratified, affine)
    with state.turns:
        with state.on_host() as host:
            out = _sample_here(host, batch_size, beta, stratified, None)
        out = ReplayBatch(*(t.to(state.device) for t in out))
        samples = state.rows[out.index]
    return out._replace(samples=samples if affine is None else normalized(samples, *affine))


def _sample_here(
    state: ReplayState, batch_size: int, beta: float, stratified: bool, affine: Affine
) -> ReplayBatch:
    """On the CPU. Every microsecond here is one of a training step's: new_empty is torch's fastest allocation."""
    rows, meta, delta = state.rows, state.meta, state.delta
    fused = affine is not None and rows.dtype is torch.uint8
    shape = (batch_size, *state.sample_shape)
    samples = delta.new_empty(shape) if fused else rows.new_empty(shape)
    labels, index, generation = (meta.new_empty(batch_size) for _ in range(3))
    weight, probability = delta.new_empty(batch_size), delta.new_empty(batch_size)
    gain, bias = (t.numpy() for t in affine) if fused and affine is not None else (None, None)
    state.core.sample(
        batch_size,
        beta,
        stratified,
        samples.data_ptr() if state.row_bytes else 0,
        labels.data_ptr(),
        index.data_ptr(),
        generation.data_ptr(),
        weight.data_ptr(),
        probability.data_ptr(),
        gain,
        bias,
    )
    if affine is not None and not fused:
        samples = normalized(samples, *affine)
    return ReplayBatch(samples, labels, index, generation, weight, probability)


def normalized(samples: torch.Tensor, gain: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """``samples·gain + bias`` in float32, gain and bias by the sample's first dimension."""
    by_channel = (-1, *[1] * (samples.dim() - 2))
    return samples.float() * gain.view(by_channel) + bias.view(by_channel)


def update(
    state: ReplayState,
    index: torch.Tensor,
    priority: torch.Tensor,
    generation: torch.Tensor | None,
    largest: bool,
) -> None:
    """Re-score rows.

    Args:
        state: Any device.
        index: int64 ``[n]``, contiguous, on the state's device.
        priority: |δ| or δ, float32 ``[n]``, likewise.
        generation: None, or int64 ``[n]`` from the draw, likewise: rows overwritten since are skipped.
        largest: Of duplicates the largest counts, else the last.
    """
    if state.on_cpu:
        state.core.update(index.numel(), index.data_ptr(), priority.data_ptr(), _address(generation), largest)
        return
    with state.on_host() as host:
        update(host, index.cpu(), priority.cpu(), None if generation is None else generation.cpu(), largest)


def remove(state: ReplayState, index: torch.Tensor) -> None:
    """Empty these slots (int64 ``[n]``, contiguous, on the state's device)."""
    with state.on_host() as host:
        host.core.remove(index.numel(), index.to(host.device).data_ptr())


def rebuild(state: ReplayState) -> None:
    """Recompute all sums from the leaves."""
    with state.on_host() as host:
        host.core.rebuild()

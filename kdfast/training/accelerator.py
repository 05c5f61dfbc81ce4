"""What kdfast needs of 🤗 Accelerate, in one place."""

from __future__ import annotations

from typing import Any

from kdfast.errors import BackendError, ConfigError, require

_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def make_accelerator(device: str = "auto", precision: str = "fp32") -> Any:
    """An ``Accelerator`` for this device and precision, whatever an earlier one in this process had.

    Under ``torchrun`` or ``accelerate launch`` it joins the process group (nccl on GPUs, gloo on CPUs).

    Raises:
        ConfigError: ``device`` or ``precision`` is none of the known ones.
        BackendError: CUDA was asked for and is not there.
    """
    import torch

    accelerate = require("accelerate", extra="train", feature="training")
    state = require("accelerate.state", extra="train", feature="training")
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device: got {device!r}, accepted: auto, cpu, cuda")
    if precision not in _PRECISION:
        raise ConfigError(f"precision: got {precision!r}, accepted: {', '.join(_PRECISION)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise BackendError("device 'cuda' was chosen, but torch sees no CUDA device; take cpu or auto")
    cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    shared = state.AcceleratorState._shared_state
    if shared and (shared.get("_mixed_precision"), state.PartialState().device.type == "cpu") != (
        _PRECISION[precision],
        cpu,
    ):
        # Accelerate keeps one state a process and refuses to change it; a process group must stay, though.
        state.AcceleratorState._reset_state(reset_partial_state=state.PartialState().num_processes == 1)
    return accelerate.Accelerator(cpu=cpu, mixed_precision=_PRECISION[precision])


def gather_objects(value: Any) -> list[Any]:
    """The values of all ranks, in order; without a process group just this one."""
    import torch

    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values

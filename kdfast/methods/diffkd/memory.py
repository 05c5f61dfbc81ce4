"""How much a method keeps for backward."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

if TYPE_CHECKING:
    from kdfast.methods.diffkd.method import DiffKD

__all__ = ["activation_memory", "saved_bytes"]


class saved_bytes(saved_tensors_hooks):
    """Count the bytes that autograd keeps for backward inside a ``with`` block, each storage once.

    Args:
        module: Whose parameters and buffers do not count: they are there anyway.

    Attributes:
        total: So far.
    """

    def __init__(self, module: nn.Module) -> None:
        self.total = 0
        known = [*module.parameters(), *module.buffers()]
        self._seen = {tensor.untyped_storage().data_ptr() for tensor in known}
        self._alive: list[Tensor] = []  # an address must not be used again while we count

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._seen:
                self._seen.add(storage.data_ptr())
                self._alive.append(tensor)
                self.total += storage.nbytes()
            return tensor

        super().__init__(pack, lambda tensor: tensor)

    def __enter__(self) -> saved_bytes:  # type: ignore[override]
        super().__enter__()
        return self


def activation_memory(method: DiffKD, images: Tensor) -> int:
    """Bytes that the method's own part of a training step keeps for backward, beside the two networks.

    Counted, not sampled, on a copy of the method whose teacher is the same: on any device, and before anything of the
    batch's size has to fit a GPU twice. Weights, statistics and the random state stay as they were.

    Args:
        method: Made for these networks.
        images: A batch, as for training.
    """
    trial = copy.deepcopy(method).train()
    devices = [images.device] if images.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        with torch.no_grad():
            trial.teacher(images)
        trial.student(images)
        with saved_bytes(trial) as counted:
            trial.loss()
    return int(counted.total)

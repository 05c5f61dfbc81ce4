"""Distance of a batch's statistics to those that the teacher's batch norms remember."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class BNStatistics:
    """L_BN over every batch norm of a network, on its input (Eq. 1)."""

    def __init__(self, network: nn.Module, *, squared: bool, momentum: float) -> None:
        self.layers = [
            module
            for module in network.modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
        ]
        self.squared, self.momentum = squared, momentum
        self._handles: list[Any] = []
        self._terms: list[Tensor] = []
        self._seen: list[tuple[Tensor, Tensor]] = []
        self._average: list[tuple[Tensor, Tensor]] = []

    @property
    def averaging(self) -> bool:
        return bool(self._average)

    def on(self) -> None:
        if not self._handles:
            self._handles = [layer.register_forward_pre_hook(self._hook) for layer in self.layers]

    def off(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def clear(self) -> None:
        self._terms, self._seen = [], []

    def _hook(self, layer: Any, inputs: Any) -> None:
        (x,) = inputs
        dims = [0, *range(2, x.dim())]
        mean = x.float().mean(dims)
        var = x.float().var(dims, unbiased=False)
        self._seen.append((mean.detach(), var.detach()))
        number = len(self._seen) - 1
        if self._average and self.momentum:
            old_mean, old_var = self._average[number]
            mean = (1 - self.momentum) * mean + self.momentum * old_mean
            var = (1 - self.momentum) * var + self.momentum * old_var
        for gap in (layer.running_mean - mean, layer.running_var - var):
            self._terms.append(gap.square().sum() if self.squared else torch.linalg.vector_norm(gap))

    def loss(self) -> Tensor:
        return torch.stack(self._terms).sum()

    @torch.no_grad()
    def update_average(self) -> None:
        if not self.momentum or not self._seen:
            return
        if not self._average:
            self._average = [(m.clone(), v.clone()) for m, v in self._seen]
            return
        for old, new in zip(self._average, self._seen):
            for a, b in zip(old, new):
                a.lerp_(b, 1 - self.momentum)

    def state_dict(self) -> dict[str, Any]:
        return {"average": [list(pair) for pair in self._average]}

    def load_state_dict(self, state: Any) -> None:
        self._average = [
            tuple(t.to(self.layers[0].running_mean.device) for t in pair) for pair in state["average"]
        ]

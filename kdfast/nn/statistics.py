"""The batch-norm statistics of a whole network as one loss, by hooks that come and go."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from kdfast.ops.norm import statistics_loss as ops

__all__ = ["BNStatisticsLoss"]


class BNStatisticsLoss:
    """Sum over a network's batch norms of :func:`kdfast.functional.bn_statistics_loss` of their inputs.

    What makes images look to a network like what it was trained on (DeepInversion; SSD-KD's L_BN). While attached, a
    forward of the network collects one term a batch norm, in one launch each on a GPU, and one more in backward
    that also adds the gradient which the batch norm sends back. Detached, which is how it begins, the network
    carries no hook at all.

    Use it as a context manager, or with :meth:`attach` and :meth:`detach`::

        statistics = BNStatisticsLoss(teacher)
        with statistics:
            logits = teacher(images)
            loss = statistics.loss() + ...

    Args:
        network: With batch norms that keep running statistics. Usually in eval mode.
        squared: Squared norms.
        momentum: Share of the average of earlier batches in what is compared, from 0 (none is kept) to below 1.
            The average moves only when :meth:`update_average` says so, by 1 − momentum, and counts from then on.

    Attributes:
        layers: The batch norms, in the network's order.

    Raises:
        ValueError: No batch norm; one without running statistics; a momentum out of range.

    Note:
        Everything stays on the device, and may be captured in a CUDA graph after a first forward outside of it.
        Attach before ``torch.compile`` sees the network: it does not look again for hooks.
    """

    def __init__(self, network: nn.Module, *, squared: bool = False, momentum: float = 0.0) -> None:
        found = {name: module for name, module in network.named_modules() if isinstance(module, _BatchNorm)}
        if not found:
            raise ValueError(
                f"network: got {type(network).__name__} without batch norms; at least one is needed"
            )
        for name, layer in found.items():
            if layer.running_mean is None or layer.running_var is None:
                raise ValueError(
                    f"network: its batch norm {name!r} keeps no running statistics; track_running_stats=True is needed"
                )
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum: got {momentum}; accepted: 0 to below 1")
        self.layers: list[_BatchNorm] = list(found.values())
        self.squared, self.momentum = squared, momentum
        self._network = network
        self._handles: list[RemovableHandle] = []
        self._terms: list[Tensor] = []
        # In the order of calls, which is not that of layers where one is called twice.
        self._seen: list[tuple[Tensor, Tensor]] = []
        self._average: list[tuple[Tensor, Tensor]] = []
        # k on the device, 0 until there is an average: a captured graph need not be captured again.
        self._share: Tensor | None = None
        self._counts = False

    @property
    def attached(self) -> bool:
        """Whether forwards of the network collect terms."""
        return bool(self._handles)

    def attach(self) -> None:
        """Begin to collect; nothing happens when it has begun."""
        if self._handles:
            return
        self._handles = [self._network.register_forward_pre_hook(self._begin)]
        self._handles += [layer.register_forward_pre_hook(self._collect) for layer in self.layers]

    def detach(self) -> None:
        """Take every hook away, and forget terms that nobody asked for."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._terms = []

    def __enter__(self) -> BNStatisticsLoss:
        self.attach()
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def loss(self) -> Tensor:
        """The sum of the last forward's terms, 0-d, and once for each forward.

        Raises:
            RuntimeError: No forward since the hooks were attached, or since this was called.
        """
        if not self._terms:
            raise RuntimeError(
                "loss: nothing was collected; attach(), then call the network, then loss() once"
            )
        terms, self._terms = self._terms, []
        return torch.stack(terms).sum()

    @torch.no_grad()
    def update_average(self) -> None:
        """Let the last forward's statistics into the average; the first time they become it."""
        if not self._average:
            return
        assert self._share is not None
        for average, seen in zip(self._average, self._seen):
            for old, new in zip(average, seen):
                old.lerp_(new, 1 - self.momentum) if self._counts else old.copy_(new)
        self._share.fill_(self.momentum)
        self._counts = True

    def state_dict(self) -> dict[str, Any]:
        """The average, copied; empty before the first :meth:`update_average`."""
        if not self._counts:
            return {"average": []}
        return {"average": [(mean.clone(), var.clone()) for mean, var in self._average]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put an average back, into the tensors that a captured graph reads where there are any."""
        given = [(mean, var) for mean, var in state["average"]]
        if not given:
            self._counts = False
            if self._share is not None:
                self._share.zero_()
            return
        if self._average and len(self._average) != len(given):
            raise ValueError(f"average: got {len(given)} layers; the network called {len(self._average)}")
        if not self._average:
            self._average = [(torch.empty_like(mean), torch.empty_like(var)) for mean, var in given]
            self._to_device()
        for own, new in zip(self._average, given):
            for old, value in zip(own, new):
                old.copy_(value)
        assert self._share is not None
        self._share.fill_(self.momentum)
        self._counts = True

    def _to_device(self) -> None:
        device = self._device()
        self._average = [(mean.to(device), var.to(device)) for mean, var in self._average]
        self._share = torch.zeros((), device=device)

    def _device(self) -> torch.device:
        first = self.layers[0].running_mean
        assert first is not None  # checked when this was made
        return first.device

    def _begin(self, *_: Any) -> None:
        self._terms, self._seen = [], []

    def _collect(self, layer: Any, inputs: tuple[Any, ...]) -> tuple[Tensor, ...] | None:
        (x,) = inputs
        mean, var = layer.running_mean, layer.running_var
        if x.dim() < 2 or x.shape[1:2] != mean.shape or x.numel() == 0:
            return None  # the layer says what is wrong
        loss, *seen, through = ops.bn_statistics_through(x, self._target(mean, var, len(self._seen)))
        self._terms.append(loss)
        self._seen.append((seen[0], seen[1]))
        return None if through is x else (through,)

    def _target(self, mean: Tensor, var: Tensor, call: int) -> ops.Target:
        if not self.momentum:
            return ops.Target(mean, var, None, None, None, self.squared)
        if self._share is None:
            self._share = torch.zeros((), device=mean.device)
        if call == len(self._average):
            self._average.append((torch.zeros_like(mean), torch.zeros_like(var)))
        return ops.Target(mean, var, *self._average[call], self._share, self.squared)

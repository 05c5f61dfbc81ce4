"""Fixed work as CUDA graphs: one launch where there were hundreds. On a CPU the same functions simply run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kdfast import capture

__all__ = ["CapturedLoss", "CapturedStep", "bare", "capturable", "optimizer_capturable"]

# Calls that run eagerly before a graph is captured: libraries choose algorithms and allocate workspaces, optimisers
# make their state. They are real work, not rehearsals: nothing has to be undone.
WARM_UP = 3


def capturable(device: torch.device, *, wanted: bool = True) -> bool:
    """Whether steps on this device are captured; fp16 is not, since its gradients are scaled outside of the step."""
    if not wanted or not capture.can_capture(device):
        return False
    return not (torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") == torch.float16)


def optimizer_capturable(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimiser's step can be captured, and a rate that changes be seen by the replays: it is a tensor."""
    return all(
        isinstance(group["lr"], Tensor) and (group.get("capturable", False) or group.get("fused", False))
        for group in optimizer.param_groups
    )


class _Graph:
    """A graph of a function without arguments, and the tensors that it fills at each replay."""

    def __init__(self, body: Callable[[], Any], rng: torch.Generator) -> None:
        self.replays = 0
        self._graph, self.result = capture.record(body, rng.device, rng=rng)

    def replay(self) -> Any:
        self._graph.replay()
        self.replays += 1
        return self.result


class CapturedStep:
    """A function without arguments and results, which reads and writes tensors that stay where they are.

    Args:
        body: The function.
        rng: The generator that it draws from.
        capture: Whether to capture it; else it is called.
    """

    def __init__(self, body: Callable[[], None], rng: torch.Generator, *, capture: bool) -> None:
        self._body, self._rng, self._capture = body, rng, capture
        self._calls = 0
        self._graph: _Graph | None = None

    def __call__(self) -> None:
        """Do the work once."""
        self._calls += 1
        if not self._capture or self._calls <= WARM_UP:
            self._body()
            return
        if self._graph is None:
            self._graph = _Graph(self._body, self._rng)
        self._graph.replay()


class CapturedLoss:
    """A loss with its gradients in one graph; what it returns is differentiated as if it had been computed there.

    Args:
        body: Returns the loss, 0-d, differentiable in ``parameters``.
        parameters: What backward brings gradients to.
        rng: The generator that ``body`` draws from.
        capture: Whether to capture it; else ``body`` is called and autograd does the rest.
    """

    def __init__(
        self,
        body: Callable[[], Tensor],
        parameters: Sequence[Tensor],
        rng: torch.Generator,
        *,
        capture: bool,
    ) -> None:
        self._body, self._rng, self._capture = body, rng, capture
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._calls = 0
        self._graph: _Graph | None = None

    def __call__(self) -> Tensor:
        """The loss of the next batch."""
        self._calls += 1
        if not self._capture or self._calls <= WARM_UP:
            return self._body()
        if self._graph is None:
            self._graph = _Graph(self._with_gradients, self._rng)
        graph = self._graph
        loss: Tensor = ReadyGradients.apply(graph.replay, lambda: graph.replays, *self.parameters)  # type: ignore[no-untyped-call]
        return loss

    def _with_gradients(self) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        loss = self._body()
        return loss.detach(), torch.autograd.grad(loss, self.parameters, allow_unused=True)


class ReadyGradients(torch.autograd.Function):
    """Hands gradients that are already there to autograd, times what comes from above."""

    @staticmethod
    def forward(
        ctx: Any,
        compute: Callable[[], tuple[Tensor, Sequence[Tensor | None]]],
        version: Callable[[], int],
        *parameters: Tensor,
    ) -> Tensor:
        """The loss; ``compute`` returns it together with one gradient for each parameter.

        ``version`` changes with each call of ``compute``, which writes over the gradients of the one before.
        """
        loss, ctx.gradients = compute()
        ctx.version, ctx.made = version, version()
        # A copy: the next replay writes over the graph's own.
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients, scaled.

        Raises:
            RuntimeError: They are gone: another loss was computed since.
        """
        if ctx.version() != ctx.made:
            raise RuntimeError(
                "SSDKD.step(): backward() of an earlier loss, whose gradients the next step() has written over; call "
                "backward() before the next step(), or make the method with cuda_graphs=False"
            )
        present = [gradient for gradient in ctx.gradients if gradient is not None]
        scaled = iter(torch._foreach_mul(present, upstream))
        return (None, None, *(None if gradient is None else next(scaled) for gradient in ctx.gradients))


def bare(student: nn.Module) -> nn.Module:
    """The network inside of ``DistributedDataParallel``."""
    inner: nn.Module = student.module if isinstance(student, DistributedDataParallel) else student
    return inner

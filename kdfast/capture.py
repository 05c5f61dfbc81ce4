"""Recording work as a CUDA graph: on the device of its tensors, and of nothing that later goes away.

A graph holds addresses and launches. Whoever replays one says so by a key in which everything stands that the recorded
Python looked at: :func:`module_state` for a network, :func:`autocast_state` for the mode it ran in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

__all__ = [
    "Same",
    "autocast_state",
    "can_capture",
    "capturing",
    "has_hooks",
    "module_state",
    "record",
    "step_state",
]

#: torch's CUDA classes have no types.
cuda: Any = torch.cuda

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_hf_hook", "_diffusers_hook")
_PRIMITIVE = (bool, int, float, str, type(None), torch.dtype, torch.device)


def can_capture(device: torch.device) -> bool:
    """Whether work on this device can be recorded."""
    return device.type == "cuda"


def capturing(device: torch.device) -> bool:
    """Whether what is launched on ``device`` now goes into a graph, which will read the same memory in every replay."""
    return can_capture(device) and bool(cuda.is_current_stream_capturing())


def record(
    body: Callable[[], Any],
    device: torch.device,
    *,
    rehearsals: int = 0,
    before: Callable[[], object] = lambda: None,
    rng: torch.Generator | None = None,
    error_mode: str = "global",
) -> tuple[Any, Any]:
    """Capture ``body`` on ``device``, whichever device is current.

    Args:
        body: Work without arguments, on tensors that stay where they are.
        device: Where they are. torch records on the current device by default, and keeps one stream for all
            captures, on the device of the first: both are set here.
        rehearsals: Calls before, on the same stream: kernels are compiled and workspaces made by then.
        before: Called before each rehearsal.
        rng: A generator that ``body`` draws from.
        error_mode: As in ``torch.cuda.graph``.

    Returns:
        The graph, and what ``body`` returned, which each replay fills again.
    """
    with cuda.device(device):
        side = cuda.Stream(device)
        side.wait_stream(cuda.current_stream(device))
        cached = torch.is_autocast_cache_enabled()
        # What autocast has converted is freed with its block: a graph must convert for itself.
        torch.set_autocast_cache_enabled(False)
        try:
            with cuda.stream(side):
                for _ in range(rehearsals):
                    before()
                    body()
            cuda.current_stream(device).wait_stream(side)
            graph = cuda.CUDAGraph()
            if rng is not None:
                graph.register_generator_state(rng)
            with cuda.graph(graph, stream=side, capture_error_mode=error_mode):
                result = body()
        finally:
            torch.set_autocast_cache_enabled(cached)
    return graph, result


class Same:
    """Equal to itself alone, in a key that outlives its objects: an address that is used again is another object."""

    __slots__ = ("held",)

    def __init__(self, held: object) -> None:
        self.held = held

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.held is other.held

    def __hash__(self) -> int:
        return id(self.held)


def autocast_state(device: torch.device) -> tuple[Any, ...]:
    """Whether and to what autocast converts on a device."""
    return torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling ``module`` runs more than its own code: hooks of torch, accelerate or diffusers (offloading)."""
    return any(getattr(part, name, None) for part in module.modules() for name in _HOOKS)


def step_state(module: nn.Module) -> tuple[Any, ...]:
    """The part of :func:`module_state` that training steps change, quick enough to be asked for before each of them.

    The parts themselves, their modes and hooks, and where parameters and buffers lie: weights that were loaded with
    ``assign=True``, moved away and back or replaced, layers that were wrapped, frozen or hooked.
    """
    found: list[Any] = []
    for part in module.modules():
        found += (part, part.training)
        for hooks in (part._forward_pre_hooks, part._forward_hooks):
            if hooks:
                found += map(Same, hooks.values())
        for own in (part._parameters, part._buffers):
            for tensor in own.values():
                if tensor is not None:
                    found += (tensor.data_ptr(), tensor.requires_grad)
    return tuple(found)


def module_state(module: nn.Module) -> tuple[Any, ...]:
    """What a recording of ``module`` depends on beside its input: equal as long as a replay does what a call would.

    Every part's class, plain attributes (mode, flags, FreeU's factors) and other objects (attention processors), and
    where its parameters and buffers lie. Their values are not in it: a replay reads them anew.
    """
    return tuple(_state(part) for part in module.modules())


def _state(part: nn.Module) -> tuple[Any, ...]:
    plain = tuple(
        (name, value if isinstance(value, _PRIMITIVE) else Same(value))
        for name, value in vars(part).items()
        if name not in ("_parameters", "_buffers", "_modules")
    )
    tensors = tuple(
        (name, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        for own in (part._parameters, part._buffers)
        for name, tensor in own.items()
        if tensor is not None
    )
    return Same(part), type(part), plain, tensors

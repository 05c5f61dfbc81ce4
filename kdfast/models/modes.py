"""Evaluation mode for a moment, module by module: what somebody froze stays frozen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["evaluated"]


@contextmanager
def evaluated(*networks: nn.Module) -> Iterator[None]:
    """Networks in evaluation mode within the block; afterwards every module is in the mode that it was in.

    One flag for a whole network would not do: batch norms that its owner keeps in evaluation mode would train after it.
    """
    modes = [(module, module.training) for network in networks for module in network.modules()]
    try:
        for network in networks:
            network.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training

"""Whether a call may go to the loops of the C++ extension, which read and write memory and are no operators."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

from kdfast.ops.common.gradients import has_values
from kdfast.reference.native import extension

_batched = torch._C._functorch.is_legacy_batchedtensor

__all__ = ["have_memory", "runs_here"]


def runs_here(tensor: torch.Tensor) -> bool:
    """Whether a tensor's memory is a CPU's, the extension is built, and nobody has to see operators.

    Those who have: torch.compile, torch.func's transforms, modes that watch operators, forward-mode differentiation.
    """
    return (
        tensor.device.type == "cpu"
        and has_values(tensor)
        and forward_ad._current_level < 0
        and _get_current_dispatch_mode() is None
        and extension() is not None
    )


def have_memory(*upstream: torch.Tensor | None) -> bool:
    """Whether upstream gradients are one each: ``is_grads_batched`` and torch.func hand on many as if they were."""
    return all(grad is None or (has_values(grad) and not _batched(grad)) for grad in upstream)

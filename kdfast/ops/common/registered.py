"""Operators that torch.compile puts into its graph.

``torch.library.custom_op`` enters Python three times for a call: in autograd, in a wrapper that looks for outputs which
are inputs, and in the kernel. A compiled graph has differentiated already, and needs the last alone. So an operator is
two here: ``kdfast::NAME``, which autograd sees, and below it ``kdfast::NAME_kernel``, which graphs are traced into and
torch's dispatcher hands to the kernel without a stop.

A kernel returns fresh memory, never an input nor a view of one: ``torch.library.opcheck`` looks for that in the tests.
Arguments are tensors and what is none; lists of tensors are for ``torch.library.custom_op``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["RegisteredOp", "registered_op"]

#: Operators live as long as what defined them.
_LIBRARY: Any = torch.library.Library("kdfast", "FRAGMENT")  # type: ignore[no-untyped-call]
#: Where kernels are, whatever the device: they choose a backend themselves.
_EVERYWHERE = "CompositeExplicitAutograd"

Kernel = Callable[..., Any]


def registered_op(name: str, schema: str | None = None) -> Callable[[Kernel], RegisteredOp]:
    """Register the function below as ``kdfast::name``.

    Args:
        name: Without the namespace.
        schema: Arguments and results as torch's dispatcher writes them; None takes them from the annotations.
    """
    return lambda kernel: RegisteredOp(
        name, kernel, schema or torch.library.infer_schema(kernel, mutates_args=())
    )


class RegisteredOp:
    """One operator.

    Attributes:
        overload: ``torch.ops.kdfast.NAME.default``.
    """

    def __init__(self, name: str, kernel: Kernel, schema: str) -> None:
        self.__doc__ = kernel.__doc__
        self._name = name
        self._both = name, f"{name}_kernel"
        for own in self._both:
            _LIBRARY.define(own + schema, tags=(torch.Tag.pt2_compliant_tag,))
            _LIBRARY.impl(own, kernel, _EVERYWHERE)
        _LIBRARY.impl(self._both[1], torch.library.fallthrough_kernel, "Autograd")
        self.overload, self._below = (getattr(torch.ops.kdfast, own).default for own in self._both)
        self._function = self._recorded(self._refuse, lambda ctx, inputs, output: None)
        _LIBRARY.impl(name, self._autograd, "Autograd")

    def __call__(self, *args: Any) -> Any:
        """Run it by torch's dispatcher."""
        return self.overload(*args)

    def register_fake(self, fake: Kernel) -> Kernel:
        """Shapes, dtypes and strides of the results, computed from arguments without memory."""
        for own in self._both:
            torch.library.register_fake(f"kdfast::{own}", fake, lib=_LIBRARY)
        return fake

    def register_autograd(self, backward: Kernel, *, setup_context: Callable[[Any, Any, Any], None]) -> None:
        """How it is differentiated: as the methods of ``torch.autograd.Function``. Without, it refuses to be."""
        self._function = self._recorded(backward, setup_context)

    def _recorded(self, backward: Kernel, setup_context: Kernel) -> Any:
        below = self._below
        methods = {
            "forward": staticmethod(lambda *args: below(*args)),
            "setup_context": staticmethod(setup_context),
            "backward": staticmethod(backward),
        }
        return type(f"_{self._name}", (torch.autograd.Function,), methods)

    def _autograd(self, *args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in args):
            return self._function.apply(*args)
        return self._below(*args)

    def _refuse(self, *_: Any) -> Any:
        raise RuntimeError(f"kdfast::{self._name} has no gradient")

"""What the loss modules are: a function with its options fixed."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

__all__ = ["Fixed", "OfLogits", "Rows"]

#: One value a row, or None.
Rows = Tensor | None


class Fixed(nn.Module):
    """A function with its options fixed: each is an attribute, and is handed on by its own name.

    The options are the parameters of ``__init__``, but for those ``apart``; ``hidden`` ones are not printed.
    """

    names: ClassVar[tuple[str, ...]]
    apart: ClassVar[tuple[str, ...]] = ()
    hidden: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if Fixed in cls.__bases__:  # what is derived from one of these may take what it likes
            cls.names = tuple(name for name in inspect.signature(cls).parameters if name not in cls.apart)

    def __init__(self, given: dict[str, Any]) -> None:
        """``given`` is the ``locals()`` of a module's own ``__init__``, whose parameters are the options."""
        super().__init__()
        for name in self.names:
            setattr(self, name, given[name])

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """An option; ``nn.Module`` would have it be a tensor or a module."""

    @property
    def options(self) -> dict[str, Any]:
        """As they are now."""
        return {name: getattr(self, name) for name in self.names}

    def extra_repr(self) -> str:
        """The options."""
        return ", ".join(
            f"{name}={value!r}" for name, value in self.options.items() if name not in self.hidden
        )


class OfLogits:
    """A loss of two tensors of logits, with a weight a row and a mask."""

    function: ClassVar[Callable[..., Tensor]]
    options: dict[str, Any]

    def forward(self, student: Tensor, teacher: Tensor, row_weight: Rows = None, mask: Rows = None) -> Tensor:
        """The loss of these logits; see the function of the same name."""
        return type(self).function(student, teacher, row_weight=row_weight, mask=mask, **self.options)

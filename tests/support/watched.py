"""A module whose functions are counted as they are asked for."""

from __future__ import annotations

from typing import Any


class Watched:
    """Stands for ``module``.

    Attributes:
        ran: What was asked for, in order.
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        self.ran: list[str] = []

    def __getattr__(self, name: str) -> Any:
        self.ran.append(name)
        return getattr(self.module, name)

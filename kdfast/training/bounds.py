"""Numbers that a run can use: a rate that is infinite, or no number, ends as NaN weights many steps later."""

from __future__ import annotations

import math
from typing import Any

from kdfast.documents import shown
from kdfast.errors import ConfigError


def check_finite(name: str, value: Any, low: float, *, above: bool = False) -> None:
    """Refuse what is no finite number of at least ``low`` (above it, with ``above``).

    Raises:
        ConfigError: Names the argument, what it got, and what is accepted.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not low <= value < math.inf or (above and value == low):
        bound = f"above {low:g}" if above else f"of at least {low:g}"
        raise ConfigError(f"{name}: got {shown(value)}, accepted: a finite number {bound}")

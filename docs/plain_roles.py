"""Shows what Markdown does not know of docstrings (``:func:`name```, ``.. math::``) as plain code."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:py:)?(?:func|class|meth|mod|attr|data):`~?(?:[\w.]+\.)?(\w+)`")
# A formula and the lines that continue it.
MATH = re.compile(r"^\.\. math:: *(.*(?:\n +\S.*)*)", re.MULTILINE)


def _code_block(match: re.Match[str]) -> str:
    return "\n".join(f"    {line.strip()}" for line in match[1].splitlines())


class PlainRoles(griffe.Extension):
    """Rewrites each docstring as it is collected."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for every module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = MATH.sub(_code_block, ROLE.sub(r"`\1`", obj.docstring.value))

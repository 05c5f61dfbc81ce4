"""Shows what Markdown does not know of docstrings (``:func:`name```, ``.. math::``, ``>>>``, ``::``) as plain code."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:py:)?(?:func|class|meth|mod|attr|data):`~?(?:[\w.]+\.)?(\w+)`")
# A formula and the lines that continue it.
MATH = re.compile(r"^\.\. math:: *(.*(?:\n +\S.*)*)", re.MULTILINE)

# Lines of a session at the prompt, which Markdown takes for quotations.
SESSION = re.compile(r"^( *)(?:>>>|\.\.\.)(?: .*)?(?:\n\1(?:>>>|\.\.\.)(?: .*)?)*", re.MULTILINE)
# The colons that announce an indented block of code, which Markdown sees by itself.
COLONS = re.compile(r"^ *::\n|(?<=\w):(?=:$)", re.MULTILINE)


def _session(match: re.Match[str]) -> str:
    code = re.sub(r"^( *)(?:>>>|\.\.\.) ?", r"\1", match[0], flags=re.MULTILINE)
    return f"{match[1]}```python\n{code}\n{match[1]}```"


def plain(docstring: str) -> str:
    """A docstring as Markdown."""
    without = MATH.sub(_code_block, ROLE.sub(r"`\1`", docstring))
    return COLONS.sub("", SESSION.sub(_session, without))


def _code_block(match: re.Match[str]) -> str:
    return "\n".join(f"    {line.strip()}" for line in match[1].splitlines())


class PlainRoles(griffe.Extension):
    """Rewrites each docstring as it is collected."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for every module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = plain(obj.docstring.value)

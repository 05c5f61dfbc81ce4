"""``--help`` of commands that take keys: their options, and below them every key with its default and a line."""

from __future__ import annotations

import io
from typing import Any

import typer
from typer.core import TyperCommand


class KeyedCommand(TyperCommand):
    """A command that takes ``KEY=VALUE`` words."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Options as ever, then the keys."""
        super().format_help(ctx, formatter)
        # Rich prints at once, click collects: either way the keys come last.
        collected = formatter.getvalue()
        if isinstance(getattr(formatter, "buffer", None), list):
            formatter.buffer.clear()
        typer.echo(collected + _keys(self.name or ""))


def _keys(command: str) -> str:
    from kdfast.errors import KDFastError
    from kdfast.experiments.keys import as_text, keys_of_command, keys_of_method

    out = io.StringIO()
    try:
        out.write(
            f"\nKeys, in the recipe or as KEY=VALUE, with their defaults (kdfast keys {command}: more):\n\n"
        )
        out.write(as_text(keys_of_command(command), brief=True))
        if command == "distill":
            from kdfast.experiments.distill.methods import METHODS

            out.write("\n\nA method's own (kdfast keys distill METHOD):\n")
            for name in METHODS:
                own = ", ".join(key.name for key in keys_of_method(name))
                out.write(_hanging(name, own))
    except (ImportError, KDFastError) as error:
        return f"\n(Keys cannot be shown: {error})"
    return out.getvalue().rstrip()


def _hanging(name: str, words: str) -> str:
    import textwrap

    wrapped = textwrap.wrap(words, 80, initial_indent=f"  {name:<11}", subsequent_indent=" " * 13)
    return "\n".join(wrapped) + "\n"

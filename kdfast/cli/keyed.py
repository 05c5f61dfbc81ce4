"""``--help`` of commands that take keys: their options, and below them every key with its default and a line."""

from __future__ import annotations

import io
from typing import Any

import typer
from typer.core import TyperCommand

from kdfast.cli.guard import USAGE, say


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

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        """A key that is written like an option is told how keys are written."""
        options = {"--help", *(option for item in self.params for option in item.opts)}
        for place, word in enumerate(args):
            option, _, value = word.partition("=")
            if option == "--":
                break
            name = option[2:].replace("-", "_")
            if not option.startswith("--") or option in options or name not in _names(self.name or ""):
                continue
            following = args[place + 1] if place + 1 < len(args) and "=" not in word else value
            value = "VALUE" if not following or following.startswith("--") else following
            say(f"{option}: {name} is a key, not an option: write {name}={value} at the end of the line")
            raise typer.Exit(USAGE)
        return super().parse_args(ctx, args)


def _names(command: str) -> set[str]:
    """Every key of a command; none where they cannot be known, and click says that there is no such option."""
    from kdfast.errors import KDFastError
    from kdfast.experiments.distill.methods import METHODS
    from kdfast.experiments.keys import keys_of_command, keys_of_method

    try:
        keys = [*keys_of_command(command)]
        for method in METHODS if command == "distill" else ():
            keys += keys_of_method(method)
    except (ImportError, KDFastError):
        return set()
    return {key.name for key in keys}


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

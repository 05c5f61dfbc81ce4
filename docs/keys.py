"""Writes the page of keys from the configs' own docstrings: ``python docs/keys.py``."""

from __future__ import annotations

from pathlib import Path

from kdfast.experiments.distill.methods import METHODS
from kdfast.experiments.keys import SCHEMAS, as_markdown, keys_of_command, keys_of_method

PAGE = Path(__file__).parent / "pages" / "keys.md"

HEAD = """# Keys

What each command takes in its recipe (`--recipe FILE`), or as `KEY=VALUE` at the end of the line; the line goes before
the recipe. In a shell, `kdfast keys COMMAND` prints the same, and `kdfast COMMAND --help` a line each.

A run says in its first lines what will happen with the values that it has, defaults included.

<!-- written by python docs/keys.py -->
"""


def page() -> str:
    """The page's text."""
    parts = [HEAD]
    for command in SCHEMAS:
        parts += [f"## {command}\n", as_markdown(keys_of_command(command)) + "\n"]
        if command == "distill":
            parts.append(
                "### Keys of one method\n\nBeside the keys above, a recipe takes those of its `method`.\n"
            )
            for name in METHODS:
                parts.append(
                    f"#### {name}\n\n" + as_markdown(keys_of_method(name)).partition("\n\n")[2] + "\n"
                )
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())

"""The ``kdfast`` command: parse, call, print. Everything it does lives in :mod:`kdfast.experiments`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit code.

    0: done. 1: failed. 2: usage, including a missing or invalid recipe. 130: interrupted.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    # Accepted anywhere, since it is added when a command has just failed.
    if "--debug" in words:
        words = ["--debug", *(word for word in words if word != "--debug")]
    try:
        from kdfast.cli.app import app
    except ImportError as error:
        if (error.name or "").split(".")[0] not in ("typer", "click", "rich"):
            raise
        if "doctor" in words:
            sys.exit(_doctor(words))
        print(
            f"kdfast: the command line needs {error.name}, which is not installed. "
            'Install it with: pip install "kdfast[train]"',
            file=sys.stderr,
        )
        sys.exit(1)
    app(words, prog_name="kdfast")


def _doctor(words: Sequence[str]) -> int:
    """``kdfast doctor`` where the command line's own packages are missing: that is what it is for."""
    import json

    from kdfast.experiments import doctor

    report = doctor.run()
    print(json.dumps(report.as_dict(), indent=1) if "--json" in words else report.as_text())
    return 0 if report.healthy else 1

"""The C++ extension, and what to do without it."""

from __future__ import annotations

import importlib
from types import ModuleType

from kdfast.errors import MissingExtraError


def extension() -> ModuleType:
    """``kdfast._C``.

    Raises:
        MissingExtraError: It was not built.
    """
    try:
        return importlib.import_module("kdfast._C")
    except ImportError as error:
        raise MissingExtraError(
            f"kdfast.replay needs kdfast's C++ extension, kdfast._C, which cannot be imported ({error}): it was "
            "not built when kdfast was installed, as a rule for want of a compiler. Install a C++17 compiler "
            "(g++ or clang++), then run: KDFAST_REQUIRE_EXTENSION=1 pip install --force-reinstall --no-deps "
            "--no-binary kdfast kdfast"
        ) from error

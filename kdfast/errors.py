"""Every error kdfast raises on purpose, and the one check for optional dependencies."""

from __future__ import annotations

import importlib
import math
import numbers
from collections.abc import Mapping
from types import ModuleType


class KDFastError(Exception):
    """Base of all errors that kdfast raises on purpose; the command line prints them as one line."""


class BackendError(KDFastError, RuntimeError):
    """A backend was asked for that cannot run here."""


class MissingExtraError(KDFastError, ImportError):
    """A part of kdfast needs an optional dependency that is not installed."""


class ConfigError(KDFastError, ValueError):
    """A recipe or option is missing, unreadable or invalid (the command line exits with 2)."""


class DataError(KDFastError):
    """A data set or image folder cannot be used."""


class ShardError(DataError):
    """A shard is damaged, or belongs to something else."""


class CheckpointError(KDFastError):
    """A checkpoint cannot be read, or does not fit what it is loaded into."""


def is_positive(value: object) -> bool:
    """Whether ``value`` is a finite number above 0: what a text is compared with is no error of its own."""
    return not isinstance(value, bool) and isinstance(value, numbers.Real) and 0 < float(value) < math.inf


def require(module: str, *, extra: str, feature: str) -> ModuleType:
    """Import ``module``, or raise :class:`MissingExtraError` that says which command installs it.

    Args:
        module: Dotted name to import.
        extra: The extra of kdfast's that brings it, e.g. ``"dali"``.
        feature: What the user was trying to use, for the message.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{feature} needs {module.split('.')[0]}, which cannot be imported ({error}). "
            f'Install it with: pip install "kdfast[{extra}]"'
        ) from error


def require_all(modules: Mapping[str, str], *, feature: str) -> None:
    """Look for several modules at once, so that one command brings all that are missing.

    Args:
        modules: Dotted names, each with the extra of kdfast's that brings it.
        feature: What the user was trying to use, for the message.

    Raises:
        MissingExtraError: Names every one that cannot be imported, and all their extras in one command.
    """
    missing = {}
    for module, extra in modules.items():
        try:
            importlib.import_module(module)
        except ImportError as error:
            missing[module] = (extra, error)
    if len(missing) == 1:
        ((module, (extra, _)),) = missing.items()
        require(module, extra=extra, feature=feature)
    if missing:
        names = ", ".join(f"{module.split('.')[0]} ({error})" for module, (_, error) in missing.items())
        extras = ",".join(sorted({extra for extra, _ in missing.values()}))
        raise MissingExtraError(
            f"{feature} needs what cannot be imported: {names}. "
            f'Install all of it with: pip install "kdfast[{extras}]"'
        )

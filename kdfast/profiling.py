"""Named ranges for profilers: public ops, phases of training and sampling, steps of a loader.

Whether there are ranges is decided once, when kdfast is imported: under Nsight Systems and other tools that listen to
NVTX, which leave their traces in the environment, or when ``KDFAST_PROFILE=1`` asks for them (``0`` never). Otherwise
:func:`annotate` gives back the very function that it was given and :func:`each` the very iterator, so that they cost
nothing, and :func:`phase` a context manager that does nothing.

On a CUDA build a range goes to NVTX: into the domain ``kdfast`` through the package ``nvtx`` (extra ``profile``), or
as ``kdfast::NAME`` through ``torch.cuda.nvtx``. While ``torch.profiler`` records, it is a ``kdfast::NAME`` there, on
any build. Inside ``torch.compile`` there are none: what is traced runs no Python.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ParamSpec, TypeVar

__all__ = ["annotate", "each", "enabled", "phase"]

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

#: What Nsight Systems, and any tool that takes NVTX ranges in, sets in the processes that it starts.
_TOOLS = ("NSYS_PROFILING_SESSION_ID", "NVTX_INJECTION64_PATH")
PREFIX = "kdfast::"


def _wanted(environment: Mapping[str, str]) -> bool:
    asked = environment.get("KDFAST_PROFILE")
    if asked is not None:
        return asked not in ("", "0")
    return any(name in environment for name in _TOOLS)


_ENABLED = _wanted(os.environ)


def enabled() -> bool:
    """Whether this process has ranges."""
    return _ENABLED


def annotate(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function with a range round each call; without a profiler it stays the function it is."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        if not _ENABLED:
            return function

        import torch

        @functools.wraps(function)
        def within(*args: P.args, **kwargs: P.kwargs) -> R:
            if torch.compiler.is_compiling():
                return function(*args, **kwargs)
            with _range(name):
                return function(*args, **kwargs)

        return within

    return decorate


def each(name: str, items: Iterator[T]) -> Iterator[T]:
    """The same items, with a range round the making of each; without a profiler the iterator itself."""
    return _each(name, items) if _ENABLED else items


def _each(name: str, items: Iterator[T]) -> Iterator[T]:
    while True:
        with phase(name):
            try:
                item = next(items)
            except StopIteration:
                return
        yield item


def phase(name: str) -> contextlib.AbstractContextManager[object]:
    """A range round a block: ``with phase("trainer.backward"): ...``."""
    if not _ENABLED:
        return _NOTHING
    import torch

    return contextlib.nullcontext() if torch.compiler.is_compiling() else _range(name)


_NOTHING = contextlib.nullcontext()


@contextlib.contextmanager
def _range(name: str) -> Iterator[None]:
    import torch

    recorder: contextlib.AbstractContextManager[object] = _NOTHING
    if torch.autograd.profiler._is_profiler_enabled:
        recorder = torch.autograd.profiler.record_function(PREFIX + name)
    begin, end = _nvtx()
    token = begin(name)
    try:
        with recorder:
            yield
    finally:
        end(token)


@functools.cache
def _nvtx() -> tuple[Callable[[str], Any], Callable[[Any], Any]]:
    """How a range begins and ends: what ``begin`` returns is what ``end`` takes."""
    import torch

    if torch.version.cuda is None:
        return (lambda name: None), (lambda token: None)
    try:
        import nvtx
    except ImportError:
        plain: Any = torch.cuda.nvtx
        return (lambda name: plain.range_push(PREFIX + name)), (lambda token: plain.range_pop())
    domain = nvtx.get_domain("kdfast")
    attributes = functools.cache(lambda name: domain.get_event_attributes(message=name))
    return (lambda name: domain.push_range(attributes(name))), (lambda token: domain.pop_range())

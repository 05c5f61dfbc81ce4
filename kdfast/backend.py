"""Which implementation runs an op: the fused Triton kernels or the plain PyTorch reference."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator, Mapping
from typing import Any, Literal, cast, get_args

import torch

from kdfast.errors import BackendError, ConfigError

Backend = Literal["auto", "triton", "reference"]
Resolved = Literal["triton", "reference"]

#: Asked for at every call of an op: looking the literal's arguments up each time would show.
_NAMES = get_args(Backend)
_choice: Backend | None = None
_FLOAT64 = torch.float64
#: What is in the environment, without a refusal for what is not: a miss of ``os.environ`` takes a microsecond.
_environment: Mapping[Any, Any] = getattr(os.environ, "_data", os.environ)
_VARIABLE: Any = "KDFAST_BACKEND"
if _environment is not os.environ:
    _VARIABLE = os.environ.encodekey(_VARIABLE)


def _checked(name: str, source: str) -> Backend:
    if name not in _NAMES:
        raise ConfigError(f"{source}: unknown backend {name!r}; accepted: {', '.join(_NAMES)}")
    return cast(Backend, name)


def set_backend(name: Backend) -> None:
    """Choose the backend for every op of this process.

    Args:
        name: ``"auto"`` (Triton for CUDA and ROCm tensors, the reference for CPU tensors), ``"triton"``, or
            ``"reference"``. Takes precedence over the environment variable ``KDFAST_BACKEND``.

    Raises:
        ConfigError: ``name`` is none of these.
    """
    global _choice
    _choice = _checked(name, "set_backend")


def get_backend() -> Backend:
    """The backend in force: what :func:`set_backend` chose, else ``KDFAST_BACKEND``, else ``"auto"``."""
    if _choice is not None:
        return _choice
    if not torch.compiler.is_compiling() and _VARIABLE not in _environment:
        return "auto"
    return _checked(os.environ.get("KDFAST_BACKEND", "auto"), "KDFAST_BACKEND")


@contextlib.contextmanager
def use_backend(name: Backend) -> Iterator[None]:
    """Run a block under another backend."""
    global _choice
    before = _choice
    set_backend(name)
    try:
        yield
    finally:
        _choice = before


# Looked up once, here: torch.compile traces what calls triton_available().
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def triton_available() -> bool:
    """Whether the ``triton`` package is installed (it may still lack a device to run on)."""
    return _TRITON_INSTALLED


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, which takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def resolve(*tensors: torch.Tensor | None) -> Resolved:
    """Pick the implementation for these inputs.

    float64 always takes the reference, since the kernels compute in float32.

    Raises:
        BackendError: ``triton`` was chosen and cannot run these tensors.
    """
    backend = _choice or get_backend()
    on_gpu, double = True, False
    for tensor in tensors:  # a loop: this is on the way of every op, and generators cost a microsecond each
        if tensor is not None:
            on_gpu = on_gpu and tensor.is_cuda
            double = double or tensor.dtype is _FLOAT64
    if backend == "reference" or double:
        return "reference"
    if backend == "triton":
        if not _TRITON_INSTALLED:
            raise BackendError("backend 'triton' was chosen, but the triton package is not installed")
        if not on_gpu and not interpreting():
            devices = sorted({str(tensor.device) for tensor in tensors if tensor is not None})
            raise BackendError(
                f"backend 'triton' was chosen, but the tensors are on {', '.join(devices)}; move them to a "
                "CUDA device, or set TRITON_INTERPRET=1 before importing kdfast to run kernels on the CPU"
            )
        return "triton"
    present = any([tensor is not None for tensor in tensors])
    return "triton" if present and on_gpu and triton_available() else "reference"

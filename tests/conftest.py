"""Fixtures shared by every test: one thread, fixed seeds, and the targets an op is tested on."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import kdfast

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
os.environ.pop("KDFAST_BACKEND", None)  # a test says which backend it means


def pytest_configure(config: pytest.Config) -> None:
    """Let torch.compile begin with nothing: what another version or a killed process left in /tmp must not decide.

    One folder a run, made before the workers are and inherited by them; nothing that was set is overridden.
    """
    if hasattr(config, "workerinput") or "TORCHINDUCTOR_CACHE_DIR" in os.environ:
        return
    cache = tempfile.TemporaryDirectory(prefix="kdfast-inductor-", ignore_cleanup_errors=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache.name
    config.add_cleanup(cache.cleanup)
    config.add_cleanup(lambda: os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Give longer proofs the time that they take on a busy machine."""
    for item in items if config.pluginmanager.hasplugin("timeout") else ():
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(1800))


@dataclass(frozen=True)
class Target:
    """Where an op runs: a backend on a device."""

    backend: str
    device: str

    def __str__(self) -> str:
        return (
            "interpreter"
            if (self.backend, self.device) == ("triton", "cpu")
            else f"{self.backend}-{self.device}"
        )


def targets() -> list[pytest.ParameterSet]:
    """The reference on the CPU, or in a TRITON_INTERPRET=1 process the kernels; CUDA marked ``gpu``."""
    if INTERPRETING:
        return [pytest.param(Target("triton", "cpu"), marks=pytest.mark.interpreter, id="interpreter")]
    return [
        pytest.param(Target("reference", "cpu"), id="reference"),
        pytest.param(Target("triton", "cuda"), marks=pytest.mark.gpu, id="cuda"),
    ]


@pytest.fixture(params=targets())
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    """Run the test once per target, with its backend in force."""
    with kdfast.use_backend(request.param.backend):
        yield request.param


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    # Small tensors are several times faster on one thread, and timing out on a busy machine is not a bug.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)
    yield
    torch.set_num_threads(threads)
    kdfast.backend._choice = None


@pytest.fixture
def heard() -> Iterator[None]:
    """SIGINT and SIGTERM with their default handlers: a run in the background or under nohup inherits them ignored."""
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)

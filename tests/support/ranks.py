"""Two gloo processes that run one function."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.multiprocessing as mp

__all__ = ["ranks"]


def ranks(work: Any, *args: Any) -> list[Any]:
    """What ``work(rank, *args)`` returns on each of two gloo processes."""
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    port = 20000 + os.getpid() % 20000
    children = [context.Process(target=_rank, args=(rank, port, results, work, *args)) for rank in range(2)]
    for child in children:
        child.start()
    found = dict(results.get() for _ in children)
    for child in children:
        child.join()
    for value in found.values():
        if isinstance(value, str):
            raise AssertionError(value)
    return [found[rank] for rank in range(2)]


def _rank(rank: int, port: int, results: Any, work: Any, *args: Any) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    try:
        value = work(rank, *args)
        results.put((rank, value.numpy() if isinstance(value, torch.Tensor) else value))
    except BaseException as error:
        results.put((rank, f"{type(error).__name__}: {error}"))

"""Timing that can be trusted: providers take turns sample by sample, inputs rotate, raw samples are kept.

On a CPU a sample is the wall time of as many calls as fill ``sample_seconds``. On CUDA it is taken twice: between
events round a loop of calls (``events``, what someone sees who calls it: launches included where they dominate), and
round the replay of a graph with all turns (``graph``, the work alone), where every call can be captured. Ratios
compare samples of one kind only.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch

from kdfast.benchmarks.case import Case, Provider, Settings, Work

#: torch's CUDA classes have no types.
cuda: Any = torch.cuda

Samples = dict[str, list[float]]
#: From the most telling kind of sample to the least.
KINDS = ("graph", "events", "wall")
#: No sample repeats a call more often.
MAX_CALLS = 20_000


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def collect(case: Case, works: Mapping[str, Work], settings: Settings) -> dict[str, Samples]:
    """Seconds a call, for each provider and kind of sample; providers alternate within each round."""
    timers: dict[tuple[str, str], Callable[[], float]] = {}
    for provider in case.providers:
        if provider.name in works:
            for kind, timer in _timers(case, provider, works[provider.name], settings).items():
                timers[provider.name, kind] = timer
    samples: dict[str, Samples] = {name: {} for name in works}
    for _ in range(settings.samples):
        for (name, kind), timer in timers.items():
            samples[name].setdefault(kind, []).append(timer())
    return samples


def _timers(case: Case, provider: Provider, work: Work, settings: Settings) -> dict[str, Callable[[], float]]:
    calls = _calibrate(case, work, settings)
    if settings.device != "cuda":
        return {"wall": lambda: _wall(work, calls)}
    timers = {"events": lambda: _events(lambda: _loop(work, calls), calls)}
    graph = _capture(case, work) if provider.graph else None
    if graph is not None:
        repeats = max(1, calls // case.turns)
        timers["graph"] = lambda: _events(lambda: _replay(graph, repeats), repeats * case.turns)
    return timers


def _calibrate(case: Case, work: Work, settings: Settings) -> int:
    """How many calls fill a sample; whole rounds of turns. Warms up on the way."""
    for turn in range(min(3, case.turns) or 1):
        work(turn)
    synchronize(settings.device)
    calls = case.turns
    while True:
        start = time.perf_counter()
        _loop(work, calls)
        synchronize(settings.device)
        taken = time.perf_counter() - start
        if taken >= settings.sample_seconds or calls >= MAX_CALLS:
            return calls
        calls = min(MAX_CALLS, calls * max(2, int(settings.sample_seconds / max(taken, 1e-9)) + 1))


def _loop(work: Work, calls: int) -> None:
    for turn in range(calls):
        work(turn)


def _wall(work: Work, calls: int) -> float:
    start = time.perf_counter()
    _loop(work, calls)
    return (time.perf_counter() - start) / calls


def _events(run: Callable[[], None], calls: int) -> float:
    torch.cuda.synchronize()
    begin, end = (cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / calls


def _replay(graph: Any, repeats: int) -> None:
    for _ in range(repeats):
        graph.replay()


def _capture(case: Case, work: Work) -> Any | None:
    """A graph of one call a turn, or None where the work synchronises or allocates on the host."""
    side = cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for turn in range(case.turns):
            work(turn)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for turn in range(case.turns):
                work(turn)
    except Exception:  # whatever cannot be captured is timed with events alone
        torch.cuda.synchronize()
        return None
    return graph


def cuda_facts(work: Work) -> dict[str, Any]:
    """Kernels launched, synchronisations and peak memory of one call; empty for what cannot be seen here."""
    facts: dict[str, Any] = {}
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work(0)
    torch.cuda.synchronize()
    facts["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            work(0)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    facts["syncs"] = sum("synchroniz" in str(warning.message) for warning in seen)
    torch.cuda.synchronize()
    try:
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
            work(0)
            torch.cuda.synchronize()
        events: Any = profiler.events()
        on_device = [event for event in events or () if event.device_type.name == "CUDA"]
        facts["launches"] = len(on_device)
    except Exception as error:  # no profiling permission, as in many containers
        facts["launches_unknown"] = f"{type(error).__name__}: {error}"[:160]
    return facts


def copy_bandwidth(settings: Settings) -> list[float]:
    """Bytes a second, read and written, of copying what no cache holds; one figure a sample."""
    if settings.device == "cuda":
        size = 1 << (22 if settings.tiny else 30)
    else:
        size = 1 << (20 if settings.tiny else 27)
    source = torch.ones(size, dtype=torch.uint8, device=settings.device)
    target = torch.empty_like(source)

    def copy(turn: int) -> None:
        target.copy_(source)

    copy(0)
    synchronize(settings.device)
    on_gpu = settings.device == "cuda"

    def time_once() -> float:
        return _events(lambda: copy(0), 1) if on_gpu else _wall(copy, 1)

    return [2 * size / time_once() for _ in range(max(5, settings.samples // 2))]

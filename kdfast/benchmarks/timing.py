"""Timing that can be trusted: providers take turns sample by sample, inputs rotate, raw samples are kept.

A machine whose clock or neighbours change within a run slows neighbouring samples alike, so two providers are compared
round by round (:func:`speedup`), and every other round goes through them backwards.

On a CPU a sample is the wall time of as many calls as fill ``sample_seconds``. On CUDA it is taken twice: between
events round a loop of calls (``events``, what someone sees who calls it: launches included where they dominate), and
round the replay of a graph with all turns (``graph``, the work alone), where every call can be captured. Ratios
compare samples of one kind only.
"""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from kdfast.benchmarks.case import Case, Provider, Settings, Work

#: torch's CUDA classes have no types.
cuda: Any = torch.cuda

Samples = dict[str, list[float]]
#: By kind: takes one sample.
Timers = dict[str, Callable[[], float]]
#: From the most telling kind of sample to the least.
KINDS = ("graph", "events", "wall")
#: No sample repeats a call more often.
MAX_CALLS = 20_000
#: A ratio this near to 1 is a draw until its standard error is below the second of these; a CPU's clock and neighbours
#: make 4 % of a step of 50 ms. What a draw may take, in rounds planned.
DRAW, SETTLED, PATIENCE = 0.05, 0.01, 4


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def prepare(case: Case, provider: Provider, work: Work, settings: Settings) -> Timers:
    """How to take a sample of each kind; a captured graph's results are checked first.

    Raises:
        AssertionError: The graph computes something else than the calls that it was captured from.
    """
    calls = _calibrate(case, work, settings)
    if settings.device != "cuda":
        return {"wall": lambda: _wall(work, calls)}
    timers: Timers = {"events": lambda: _events(lambda: _loop(work, calls), calls)}
    captured = _capture(case, work) if provider.graph else None
    if captured is not None:
        graph, first = captured
        check_replay(case, provider.name, graph.replay, first)
        torch.cuda.synchronize()
        repeats = max(1, calls // case.turns)
        timers["graph"] = lambda: _events(lambda: _replay(graph, repeats), repeats * case.turns)
    return timers


def check_replay(case: Case, name: str, replay: Callable[[], Any], first: Any) -> None:
    """See that a replay writes the results of turn 0, which are overwritten before it.

    A graph that recorded nothing would time as infinitely fast, and leave whatever its memory held.

    Raises:
        AssertionError: It does not, or what it writes is wrong.
    """
    with torch.no_grad():
        for tensor in _tensors(first):
            spoiled = tensor.detach()
            if 0 in spoiled.stride():  # expanded from fewer elements: not to be written
                continue
            spoiled.fill_(float("nan") if spoiled.is_floating_point() else 1)
    replay()
    try:
        case.check(name, first)
    except Exception as error:
        text = " ".join(str(error).split())
        raise AssertionError(f"as a captured graph: {type(error).__name__}: {text}") from error


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for part in value for tensor in _tensors(part)] if isinstance(value, tuple | list) else []


def collect(timers: Mapping[str, Timers], settings: Settings) -> dict[str, Samples]:
    """Seconds a call, for each provider and kind of sample; providers alternate, there and back.

    Sample *i* of everyone is of round *i*. On a CPU a draw between kdfast and another goes on until its error
    is small, whichever of them is ahead.
    """
    samples: dict[str, Samples] = {name: {} for name in timers}
    there = list(timers.items())
    longer = PATIENCE if settings.device == "cpu" and not settings.tiny else 1
    for turn in range(longer * settings.samples):
        if turn >= settings.samples and not _drawn(samples):
            break
        for name, kinds in there if turn % 2 == 0 else reversed(there):
            for kind, timer in kinds.items():
                samples[name].setdefault(kind, []).append(timer())
    return samples


def speedup(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """How many times as fast we are: the median of the rounds' quotients.

    A quotient of medians would compare rounds that may lie minutes and several hundred megahertz apart.

    Args:
        theirs: Seconds a call of the other provider, a sample a round.
        ours: Seconds a call of kdfast's, of the same rounds.

    Raises:
        ValueError: They have not one sample for each round.
    """
    return statistics.median(their / our for their, our in zip(theirs, ours, strict=True))


def _drawn(samples: Mapping[str, Samples]) -> bool:
    """Whether kdfast is as fast as another provider, as far as these samples tell."""
    ours = samples.get("kdfast", {}).get("wall", ())
    for name, theirs in samples.items():
        if name == "kdfast" or len(ours) < 2 or "wall" not in theirs:
            continue
        quotients = [their / our for their, our in zip(theirs["wall"], ours, strict=True)]
        low, middle, high = statistics.quantiles(quotients, n=4)
        # Of a median of normals: 1.253 deviations over √n, a deviation being 0.741 of the interquartile distance.
        error = 1.253 * 0.741 * (high - low) / math.sqrt(len(quotients))
        if abs(middle - 1) < DRAW and error > SETTLED * middle:
            return True
    return False


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


def _capture(case: Case, work: Work) -> tuple[Any, Any] | None:
    """A graph of one call a turn and turn 0's results in it; None where the work synchronises."""
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
            first = work(0)  # kept, so that no later turn takes its memory
            for turn in range(1, case.turns):
                work(turn)
    except Exception:  # whatever cannot be captured is timed with events alone
        torch.cuda.synchronize()
        return None
    return graph, first


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

"""Run suites: build each provider, check it, time all of them in turns, write down everything."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from kdfast.benchmarks import environment, timing
from kdfast.benchmarks.case import Absent, Case, Provider, Settings, Work
from kdfast.benchmarks.journal import replace
from kdfast.errors import ConfigError, MissingExtraError

#: In the order in which they run; each is a module beside this one, with `cases(settings)`.
SUITES = (
    "losses",
    "linear",
    "denoise",
    "feature",
    "images",
    "replay",
    "data",
    "surrogate",
    "synth",
    "distill",
    "diffkd",
    "kdiffusion",
    "ssdkd",
)
#: Each family of kernels, and the suites that have cases of it: `bench/test_FAMILY.py` runs those.
FAMILIES = {
    "kl": ("losses",),
    "pair": ("losses",),
    "dist": ("losses",),
    "topk": ("losses",),
    "linear": ("linear",),
    "denoise": ("denoise",),
    "replay": ("replay",),
    "feature": ("feature",),
    "norm": ("feature", "images"),
    "images": ("images",),
    "procedural": ("surrogate",),
}
FORMAT = 1
#: Why a provider has no times: it cannot run here, it raised, its result was not right.
OUT = ("absent", "failed", "wrong")
Say = Callable[[str], None]


def cases_of(family: str, settings: Settings) -> Iterator[Case]:
    """The cases of one family of kernels, out of every suite that has some.

    Raises:
        ConfigError: No such family.
    """
    if family not in FAMILIES:
        raise ConfigError(f"family: got {family}; accepted: {', '.join(FAMILIES)}")
    for suite in FAMILIES[family]:
        for case in import_module(f"kdfast.benchmarks.{suite}").cases(settings):
            if case.family == family:
                yield case


def run(
    suites: Sequence[str], settings: Settings, *, say: Say = print, out: Path | None = None
) -> dict[str, Any]:
    """Run suites and return what :func:`kdfast.benchmarks.table.markdown` and ``compare`` read.

    Args:
        suites: Of :data:`SUITES`.
        settings: Device, size and patience.
        say: Called with a line for each finished case.
        out: Where to :func:`write` after each case: what a kill ends loses the case that was being measured.

    Returns:
        JSON-able: environment, copy bandwidth, and a row for each case with raw samples of each provider.

    Raises:
        ConfigError: An unknown suite, or a device that is not there.
    """
    unknown = [name for name in suites if name not in SUITES]
    if unknown:
        raise ConfigError(f"suite: got {', '.join(unknown)}; accepted: {', '.join(SUITES)}")
    if settings.device not in ("cpu", "cuda"):
        raise ConfigError(f"device: got {settings.device!r}; accepted: cpu, cuda")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: got 'cuda', but torch finds no CUDA device here")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # comparisons of implementations, not of schedulers
    try:
        result: dict[str, Any] = {
            "format": FORMAT,
            "device": settings.device,
            "name": environment.device_name(settings.device),
            "quick": settings.quick,
            "tiny": settings.tiny,
            **measured_on(settings),
            "cases": [],
            "errors": [],
        }
        for suite in suites:
            _run_suite(suite, settings, result, say, out)
    finally:
        torch.set_num_threads(threads)
    return result


def measured_on(settings: Settings) -> dict[str, Any]:
    """When and on what: the part of a result that every row of it shares."""
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "environment": environment.describe(settings.device),
        "copy_bytes_per_second": timing.copy_bandwidth(settings),
    }


def _run_suite(suite: str, settings: Settings, result: dict[str, Any], say: Say, out: Path | None) -> None:
    try:
        for case in import_module(f"kdfast.benchmarks.{suite}").cases(settings):
            row = measure(case, settings)
            result["cases"].append(row)
            if out is not None:
                write(result, out, plots=False)
            say(line_of(row))
            if settings.device == "cuda":
                torch.cuda.empty_cache()
    except Exception as error:  # the other suites' results are worth keeping
        result["errors"].append(f"{suite}: {type(error).__name__}: {error}")
        say(f"{suite} stopped: {type(error).__name__}: {error}")
        if out is not None:
            write(result, out, plots=False)


def make_settings(device: str, *, quick: bool, tiny: bool = False) -> Settings:
    """Patience to match the size: a trial takes two samples, a quick run 13, a full one 40."""
    if tiny:
        return Settings(device, True, samples=2, sample_seconds=1e-4, tiny=True)
    return Settings(device, quick, 13, 0.02) if quick else Settings(device, quick, 40, 0.05)


def succeeded(result: dict[str, Any]) -> bool:
    """Whether every suite ran to its end, kdfast did not fail, and no provider was wrong."""
    providers = [provider for row in result["cases"] for provider in row["providers"]]
    broken = any("failed" in provider for provider in providers if provider["name"].startswith("kdfast"))
    return not result["errors"] and not broken and not any("wrong" in provider for provider in providers)


def measure(case: Case, settings: Settings, *, timed: bool = True) -> dict[str, Any]:
    """Check, then time, every provider of a case that can take part.

    Args:
        case: What to measure.
        settings: Device, size and patience.
        timed: False: only build, check and call twice, which fills the caches of compilers and says who is right.
    """
    timers: dict[str, timing.Timers] = {}
    described: list[dict[str, Any]] = []
    for provider in case.providers:
        entry: dict[str, Any] = {"name": provider.name, "config": provider.config}
        if provider.against != "kdfast":
            entry["against"] = provider.against
        if provider.traffic is not None:
            entry |= {"formula": provider.traffic.formula, "bytes": provider.traffic.num_bytes}
        described.append(entry)
        try:
            work = _checked(case, provider, settings, entry, timed=timed)
            if timed:
                timers[provider.name] = timing.prepare(case, provider, work, settings)
        except Absent as reason:
            entry["absent"] = str(reason)
        except AssertionError as error:
            entry["wrong"] = " ".join(str(error).split())[:300]
        except Exception as error:  # a peer that breaks is told of, and not timed
            entry["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    for name, samples in timing.collect(timers, settings).items():
        next(entry for entry in described if entry["name"] == name)["seconds"] = samples
    return {
        "key": case.key,
        "suite": case.suite,
        "case": case.name,
        "params": dict(case.params),
        "items": case.items,
        "unit": case.unit,
        "turns": case.turns,
        "working_set_bytes": case.working_set,
        "providers": described,
    }


def _checked(
    case: Case, provider: Provider, settings: Settings, entry: dict[str, Any], *, timed: bool
) -> Work:
    work = provider.build()
    case.check(provider.name, work(0))
    if not timed:
        work(0)
        timing.synchronize(settings.device)
        entry["right"] = True
    elif settings.device == "cuda":
        entry |= timing.cuda_facts(work)
    return work


def line_of(row: dict[str, Any]) -> str:
    """One case in one line: who took how long, or why not."""
    parts = []
    for provider in row["providers"]:
        if "seconds" in provider:
            kind = next(kind for kind in timing.KINDS if kind in provider["seconds"])
            parts.append(f"{provider['name']} {statistics.median(provider['seconds'][kind]) * 1e6:.1f} µs")
        elif "right" in provider:
            parts.append(f"{provider['name']} right")
        else:
            parts.append(f"{provider['name']} {next(why for why in OUT if why in provider).upper()}")
    return f"{row['key']}: {', '.join(parts)}"


def write(result: dict[str, Any], out: Path, *, plots: bool = True) -> list[Path]:
    """Write results.json and results.md into ``out``, and figures where matplotlib is installed."""
    from kdfast.benchmarks.table import markdown

    out.mkdir(parents=True, exist_ok=True)
    files = [out / "results.json", out / "results.md"]
    replace(files[0], json.dumps(result, indent=1) + "\n")
    replace(files[1], markdown(result))
    if plots:
        from kdfast.benchmarks.plots import draw

        try:
            files += draw(result, out)
        except MissingExtraError as error:
            files[1].write_text(f"{files[1].read_text()}\nNo figures: {error}\n")
    return files

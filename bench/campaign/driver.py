"""Runs a plan: one part after the other, each to the end of its share, nothing of it left behind.

The driver needs neither torch nor a GPU. What counts is in the journal, written by the workers; a part that is killed,
a worker that crashes and a driver that is killed lose the case in their hands and nothing else.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from bench.campaign.plan import Part
from kdfast.benchmarks.journal import Journal

#: A part that would get fewer seconds is not begun.
LEAST = 3.0
#: How a part ended, beside "failed ..." and "absent ...".
OK, LATE, NO_TIME = "ok", "ran out of its time", "no time left"
#: What a worker exits with when the device no longer answers; a fresh one goes on.
DEVICE_LOST = 70
Clock = Callable[[], float]
Execute = Callable[[Part, float], str]


def campaign(
    parts: Sequence[Part],
    journal: Journal,
    execute: Execute,
    *,
    budget: float,
    clock: Clock = time.monotonic,
    say: Callable[[str], None] = print,
) -> dict[str, str]:
    """Run the parts that the journal does not know as done; the verdict of each.

    A part may use its own share and what those before it left; the last second of the budget is the end of all.
    """
    began, planned = clock(), 0.0
    done = finished(journal)
    verdicts = {part.name: done[part.name] for part in parts if part.name in done}
    for part in parts:
        if part.name in done:
            say(f"== {part.name}: done before ({done[part.name]})")
            continue
        planned += part.seconds
        start = clock() - began
        left = min(planned, budget) - start
        say(f"== {part.name}: at {start:.0f} s, for {max(0.0, left):.0f} s")
        verdict = execute(part, left) if left >= LEAST else NO_TIME
        seconds = clock() - began - start
        journal.append(
            {"kind": "part", "part": part.name, "verdict": verdict, "at": start, "seconds": seconds}
        )
        say(f"   {part.name}: {verdict} after {seconds:.0f} s")
        verdicts[part.name] = verdict
    return verdicts


def finished(journal: Journal) -> dict[str, str]:
    """Parts that need not run again, with their verdicts."""
    found = {}
    for record in journal.records():
        if record.get("kind") == "part":
            found[record["part"]] = record["verdict"]
    return {name: verdict for name, verdict in found.items() if verdict == OK or verdict.startswith("absent")}


@dataclass
class Shell:
    """Executes parts with processes of this machine.

    Attributes:
        out: Where results go: results.jsonl, run.log, tests.xml, ncu.csv, and nothing else.
        stage: The tree that runs: kdfast with its kernels and recipes inside, bench and tests beside it.
        journal: Of ``out``.
        dry: Smallest sizes, on a CPU, and tools only looked up.
        processes: No part runs more side by side.
    """

    out: Path
    stage: Path
    journal: Journal
    dry: bool = False
    processes: int = 12
    python: str = sys.executable
    build: subprocess.Popen[bytes] | None = None
    _log: IO[bytes] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self._log = (self.out / "run.log").open("ab")

    def begin_build(self) -> None:
        """Compile the C++ extension while the first parts run."""
        self.build = self._start([self.python, "-m", "bench.campaign.build", str(self.stage)])

    def __call__(self, part: Part, seconds: float) -> str:
        """Run one part for at most so long; its verdict."""
        until = time.monotonic() + seconds
        assert self._log is not None
        self._log.write(f"\n== {part.name} ==\n".encode())
        self._log.flush()
        if part.kind == "time":
            self._end_build(until)
        return str(getattr(self, f"_{part.kind}")(part, until))

    def _end_build(self, until: float) -> None:
        """Timing wants a quiet machine: what is not built by then never will be."""
        if self.build is not None:
            codes = self._wait([self.build], until - LEAST)
            self.build = None
            if codes != [0]:
                why = "not done in time" if codes is None else f"exit {codes[0]}; see run.log"
                self.journal.append({"kind": "error", "part": "build", "error": why})

    def _environment(self, part: Part, until: float) -> str:
        return self._once(self._worker(part, "environment"), until)

    def _check(self, part: Part, until: float) -> str:
        # Configurations are chosen again when the GPU is quiet, so those chosen in the crowd are not kept.
        return self._workers(part, until, {"TORCHINDUCTOR_AUTOTUNE_LOCAL_CACHE": "0"})

    def _time(self, part: Part, until: float) -> str:
        return self._workers(part, until, {})

    def _smoke(self, part: Part, until: float) -> str:
        rows = ["--rows", str(self.journal.path)]
        return self._once([*self._smoke_command(), "--check", *rows], until)

    def _sanitizer(self, part: Part, until: float) -> str:
        tool = self._tool("compute-sanitizer")
        if tool is None:
            return "absent: compute-sanitizer is not installed"
        words = [tool, "--tool", "memcheck", "--error-exitcode", "1"]
        return self._once([*words, *self._smoke_command()], until, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})

    def _ncu(self, part: Part, until: float) -> str:
        tool = self._tool("ncu")
        if tool is None:
            return "absent: ncu is not installed"
        # The first launch of each kernel of ours; a count of launches would be spent on the first family alone.
        kernels = (
            "regex:^(kd_|pair_|dist_|topk_|denoise|bn_|noise_|add_noise|embedding_|reparam|replay_|crop)"
        )
        sections = [
            f"--section={s}" for s in ("SpeedOfLight", "LaunchStats", "Occupancy", "MemoryWorkloadAnalysis")
        ]
        words = [tool, "--clock-control", "none", "--kernel-id", f"::{kernels}:1", *sections]
        csv = ["--csv", "--log-file", str(self.out / "ncu.csv")]
        return self._once([*words, *csv, *self._smoke_command(), "--large"], until)

    def _tests(self, part: Part, until: float) -> str:
        workers = min(max(1, (os.cpu_count() or 2) - 1), 15)
        words = [self.python, "-m", "pytest", "-o", "addopts=", "-q", "--continue-on-collection-errors"]
        words += ["-p", "no:cacheprovider", "-p", "bench.campaign.rows", f"--rows={self.journal.path}"]
        words += [f"--junit-xml={self.out / 'tests.xml'}"]
        if self.dry:
            words += ["-m", "not gpu and not slow", "-k", "oracle", "tests/kernels/topk"]
        else:
            words += ["-m", "gpu", "-n", str(workers), "--dist", "load", "tests/gpu", "tests"]
        verdict = self._once(words, until)
        return OK if verdict == "failed with 1" else verdict  # tests that fail are results, each in its row

    def _worker(self, part: Part, kind: str, share: str = "0/1") -> list[str]:
        words = [
            self.python,
            "-m",
            "bench.campaign.worker",
            kind,
            part.name,
            "--rows",
            str(self.journal.path),
        ]
        return [*words, "--share", share, *(["--dry"] if self.dry else [])]

    def _smoke_command(self) -> list[str]:
        device = "cpu" if self.dry else "cuda"
        return [self.python, str(self.stage / "bench" / "kernel_smoke.py"), "--device", device]

    def _tool(self, name: str) -> str | None:
        if self.dry:
            return None
        local = f"/usr/local/cuda/bin/{name}"
        return shutil.which(name) or (local if os.access(local, os.X_OK) else None)

    def _workers(self, part: Part, until: float, extra: Mapping[str, str]) -> str:
        """Workers until no case is left; one that breaks down is followed by another, without the case it broke on."""
        count = max(1, min(part.processes, self.processes))
        while True:
            words = [self._worker(part, part.kind, f"{share}/{count}") for share in range(count)]
            running = [self._start(command, extra) for command in words]
            codes = self._wait(running, until)
            if codes is None:
                return LATE
            broken = [process.pid for process, code in zip(running, codes, strict=True) if code != 0]
            if not broken:
                return OK
            lost = self._note_crashes(part, broken)
            if not lost and DEVICE_LOST not in codes:
                return f"failed with {max(codes, key=abs)}"

    def _note_crashes(self, part: Part, broken: Sequence[int]) -> int:
        begun: dict[int, str] = {}
        for record in self.journal.records():
            if record.get("part") == part.name and record.get("pid") in broken:
                if record["kind"] == "begin":
                    begun[record["pid"]] = record["key"]
                elif record["kind"] in ("case", "check"):
                    begun.pop(record["pid"], None)
        for key in begun.values():
            self.journal.append({"kind": "crash", "part": part.name, "key": key})
        return len(begun)

    def _once(self, words: Sequence[str], until: float, extra: Mapping[str, str] | None = None) -> str:
        codes = self._wait([self._start(words, extra or {})], until)
        if codes is None:
            return LATE
        return OK if codes == [0] else f"failed with {codes[0]}"

    def _start(self, words: Sequence[str], extra: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            words,
            cwd=self.stage,
            env={**os.environ, **(extra or {})},
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )

    def _wait(self, running: Sequence[subprocess.Popen[bytes]], until: float) -> list[int] | None:
        """Exit codes, or None when the time came first; then none of them, nor what they started, is left."""
        try:
            return [process.wait(max(0.0, until - time.monotonic())) for process in running]
        except subprocess.TimeoutExpired:
            return None
        finally:
            for process in running:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _die_with_parent() -> None:
    """On Linux, so that a driver killed with -9 leaves nobody behind who would disturb the next one's timing."""
    try:
        libc: Any = ctypes.CDLL(None)
        libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    except (OSError, AttributeError):
        pass

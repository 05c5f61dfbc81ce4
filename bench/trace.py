"""Run a script or a module under torch.profiler; what bench/profile.sh does where there is no nsys.

KDFAST_PROFILE=1 python bench/trace.py OUT SCRIPT [ARGUMENTS...]
KDFAST_PROFILE=1 python bench/trace.py OUT -m MODULE [ARGUMENTS...]
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from kdfast.profiling import PREFIX, enabled


def command(words: list[str]) -> Callable[[], object]:
    """What to run, with ``sys.argv`` as it expects it."""
    if words[:1] == ["-m"] and len(words) > 1:
        sys.argv = words[1:]
        return lambda: runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    sys.argv = words
    return lambda: runpy.run_path(words[0], run_name="__main__")


def ranges(record: profile) -> str:
    """kdfast's ranges: how often, how long in all, each, and how much of it on the device."""
    lines = [f"{'range':<40} {'calls':>7} {'total ms':>10} {'each ms':>10} {'device ms':>10}"]
    averages = [event for event in record.key_averages() if event.key.startswith(PREFIX)]
    for event in sorted(averages, key=lambda event: -event.cpu_time_total):
        total, device = event.cpu_time_total / 1e3, event.device_time_total / 1e3
        name = event.key.removeprefix(PREFIX)
        lines.append(
            f"{name:<40} {event.count:>7} {total:>10.3f} {total / event.count:>10.3f} {device:>10.3f}"
        )
    sort = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    return "\n".join([*lines, "", record.key_averages().table(sort_by=sort, row_limit=20)])


def main() -> int:
    if len(sys.argv) < 3:
        print(__doc__, file=sys.stderr)
        return 2
    out, run = Path(sys.argv[1]), command(sys.argv[2:])
    if not enabled():
        print("no ranges: set KDFAST_PROFILE=1", file=sys.stderr)
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    status = 0
    with profile(activities=activities) as record:
        try:
            run()
        except SystemExit as end:  # a command line ends this way when all is well, too
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
    out.mkdir(parents=True, exist_ok=True)
    record.export_chrome_trace(str(out / "trace.json"))
    text = ranges(record)
    (out / "ranges.txt").write_text(text)
    print(text)
    return status


if __name__ == "__main__":
    sys.exit(main())

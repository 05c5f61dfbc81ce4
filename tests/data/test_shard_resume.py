"""A loader whose process is killed goes on, in another process, with the very next sample."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kdfast.data import ShardLoader
from tests.support.shards import numbers, write_numbered

# Reads batches, and after each leaves a line with their numbers and the state that names what comes next.
CONSUMER = """
import json, os, sys
from kdfast.data import ShardLoader
from tests.support.shards import numbers

folder, kind, log = sys.argv[1:]
loader = ShardLoader(folder, 4, loader=kind, seed=5)
with open(log, "w") as out:
    for epoch in range(3):
        for images, _ in loader:
            line = json.dumps({"numbers": numbers(images), "state": loader.state_dict()})
            print(line, file=out, flush=True)
            if epoch == 1 and loader.state_dict()["batch"] == 3:
                os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("kind", ["dali", "torch"])
def test_kill_minus_nine_in_mid_epoch(tmp_path: Path, kind: str) -> None:
    folder = write_numbered(tmp_path / "set", 30)
    command = [sys.executable, "-c", CONSUMER, str(folder), kind, str(tmp_path / "log")]
    path = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, env=path, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    with ShardLoader(folder, 4, loader=kind, seed=5) as loader:  # type: ignore[arg-type]
        whole = [[numbers(images) for images, _ in loader] for _ in range(3)]
    seen = [number for line in lines for number in line["numbers"]]
    with ShardLoader(folder, 4, loader=kind, seed=5) as loader:  # type: ignore[arg-type]
        loader.load_state_dict(lines[-1]["state"])
        rest = [number for _ in range(2) for images, _ in loader for number in numbers(images)]
    assert len(lines) == 8 + 3
    assert seen + rest == [number for epoch in whole for batch in epoch for number in batch]

"""bench/profile.sh: its two ways, the command lines of the one that needs a GPU, and what it leaves behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import INTERPRETING

pytestmark = pytest.mark.skipif(INTERPRETING, reason="nothing here launches a kernel")
ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys, torch
from kdfast.functional import kd_kl_div
kd_kl_div(torch.zeros(2, 3, requires_grad=True), torch.zeros(2, 3)).backward()
sys.exit(int(sys.argv[1]))
"""


def profiled(
    *words: object, path: str = "/usr/bin:/bin", python: str = sys.executable
) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "KDFAST_PROFILE"}
    return subprocess.run(
        ["bash", str(ROOT / "bench" / "profile.sh"), *map(str, words)],
        env={**kept, "PYTHON": python, "PATH": path, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )


def test_without_nsys_torch_profiler_writes_a_trace(tmp_path: Path) -> None:
    (tmp_path / "work.py").write_text(SCRIPT)
    done = profiled(tmp_path / "out", tmp_path / "work.py", 0)
    assert done.returncode == 0, done.stderr
    assert "torch.profiler instead" in done.stderr
    lines = (tmp_path / "out" / "ranges.txt").read_text().splitlines()
    found = {line.split()[0]: line.split() for line in lines[: lines.index("")]}
    assert found["kd_kl_div"][1] == "1"
    assert found["closed_loss.backward"][1] == "1"
    events = json.loads((tmp_path / "out" / "trace.json").read_text())["traceEvents"]
    assert "kdfast::kd_kl_div" in {event["name"] for event in events}


def test_what_fails_fails_and_leaves_its_trace(tmp_path: Path) -> None:
    (tmp_path / "work.py").write_text(SCRIPT)
    assert profiled(tmp_path / "out", tmp_path / "work.py", 3).returncode == 3
    assert (tmp_path / "out" / "trace.json").exists()


def test_with_nsys_and_a_gpu_it_is_nsys(tmp_path: Path) -> None:
    """Both made up: what matters is the command line, and that ranges are on."""
    tools = tmp_path / "tools"
    tools.mkdir()
    said = tmp_path / "said"
    (tools / "nsys").write_text(f'#!/bin/bash\necho "$KDFAST_PROFILE $*" >> "{said}"\n')
    (tools / "python").write_text("#!/bin/bash\nexit 0\n")  # torch.cuda.is_available(): yes
    for tool in tools.iterdir():
        tool.chmod(0o755)
    done = profiled(
        tmp_path / "out", "work.py", "-x", path=f"{tools}:/usr/bin:/bin", python=str(tools / "python")
    )
    assert done.returncode == 0, done.stderr
    record, stats = said.read_text().splitlines()
    assert record.startswith("1 profile --trace=cuda,nvtx,osrt")
    assert record.endswith(f"--output={tmp_path}/out/profile {tools}/python work.py -x")
    assert stats.split()[1] == "stats"
    assert stats.endswith(f"{tmp_path}/out/profile.nsys-rep")


def test_usage(tmp_path: Path) -> None:
    assert profiled().returncode == 2
    assert profiled("--help").returncode == 2

"""From a campaign's rows to results, and from a checkout to what travels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.collect import collect, result_of
from kdfast.benchmarks import compare
from kdfast.benchmarks.journal import Journal
from kdfast.errors import ConfigError
from tests.conftest import INTERPRETING

pytestmark = pytest.mark.skipif(INTERPRETING, reason="nothing here launches a kernel")
ROOT = Path(__file__).parents[2]
ENVIRONMENT: dict[str, Any] = {
    "kind": "environment",
    "format": 1,
    "device": "cuda",
    "name": "NVIDIA H100 80GB HBM3",
    "quick": True,
    "tiny": False,
    "started": "2026-12-01T10:00:00Z",
    "environment": {
        **{"kdfast": "0", "commit": "abc", "python": "3.12", "packages": {"torch": "2.11"}, "cpu": "c"},
        **{"cpus": 16, "gpu": "H100"},
    },
    "copy_bytes_per_second": [3e12],
}


def case(suite: str, name: str, part: str, **seconds: list[float]) -> dict[str, Any]:
    providers = [{"name": who, "config": "", "seconds": {"events": times}} for who, times in seconds.items()]
    row = {"suite": suite, "case": name, "key": f"{suite}/{name}[]", "params": {}, "items": 1, "unit": "call"}
    return {
        "kind": "case",
        "part": part,
        "key": row["key"],
        "row": {**row, "turns": 1, "providers": providers},
    }


RECORDS = [
    ENVIRONMENT,
    {"kind": "smoke", "part": "smoke", "name": "kd_kl_div 3x4", "error": 2e-7, "limit": 1e-4, "right": True},
    {"kind": "begin", "part": "replay", "key": "replay/sample[]", "pid": 1},
    case("replay", "sample", "replay", kdfast=[1e-6, 1e-6]),
    case("losses", "kl", "losses", kdfast=[1e-6, 1e-6], eager=[8e-6, 8e-6]),
    case("losses", "kl", "again", kdfast=[2e-6, 2e-6]),
    case("replay", "sample", "again", kdfast=[3e-6, 3e-6]),
    {"kind": "test", "part": "tests", "id": "t.py::a", "outcome": "passed", "seconds": 1.0},
    {
        "kind": "test",
        "part": "tests",
        "id": "t.py::b",
        "outcome": "failed",
        "seconds": 1.0,
        "text": "E off by 3",
    },
    {"kind": "crash", "part": "feature", "key": "feature/mix[]"},
    {"kind": "part", "part": "tests", "verdict": "ran out of its time", "at": 3.0, "seconds": 105.0},
]


def campaign(out: Path, records: list[dict[str, Any]]) -> Path:
    for record in records:
        Journal(out / "results.jsonl").append(record)
    return out


def test_a_campaign_becomes_results_and_tables(tmp_path: Path) -> None:
    out = campaign(tmp_path / "out", RECORDS)
    (out / "ncu.csv").write_text("kernel,time\n")
    files = collect(out, tmp_path / "results")
    target = tmp_path / "results" / "nvidia-h100-80gb-hbm3" / "2026-12-01" / "campaign"
    assert {path.name for path in files} == {"results.json", "results.md", "checks.md", "ncu.csv"}
    assert {path.parent for path in files} == {target}
    result = compare.load(target / "results.json")
    assert [row["suite"] for row in result["cases"]] == ["losses", "replay"]
    kl, sample = result["cases"]
    assert len(kl["providers"]) == 2  # the row with more providers stays
    assert sample["providers"][0]["seconds"]["events"] == [3e-6, 3e-6]  # of equal ones the later
    assert result["errors"] == ["feature/mix[]: the process ended"]
    assert "| 8.00× |" in (target / "results.md").read_text()
    checks = (target / "checks.md").read_text()
    assert "1 failed, 1 passed" in checks
    assert "E off by 3" in checks
    assert "| kd_kl_div 3x4 | 2.00e-07 | 0.0001 |" in checks
    assert "| tests | ran out of its time | 105 |" in checks


def test_what_is_no_measurement_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no rows in"):
        collect(tmp_path / "none", tmp_path)
    with pytest.raises(ConfigError, match="dry run"):
        collect(campaign(tmp_path / "dry", [ENVIRONMENT | {"tiny": True}]), tmp_path)
    with pytest.raises(ConfigError, match="no environment"):
        result_of(RECORDS[1:])
    with pytest.raises(ConfigError, match="rows of NVIDIA H100 80GB HBM3 and of another"):
        result_of([*RECORDS, ENVIRONMENT | {"name": "another"}])
    assert not (tmp_path / "nvidia-h100-80gb-hbm3").exists()


def prepared(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / "bench" / "gpu_prepare.sh"), *map(str, words)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")
def test_what_travels_is_small_and_says_its_revision(tmp_path: Path) -> None:
    done = prepared(tmp_path / "go", LEAVE_OUT_WHEELS="1")
    assert done.returncode == 0, done.stderr
    tree = tmp_path / "go" / "tree"
    head = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    )
    assert (tree / "REVISION").read_text().strip().rstrip("+") == head.stdout.strip()
    assert sum(path.stat().st_size for path in tree.rglob("*") if path.is_file()) < 20 << 20
    assert (tree / "bench" / "gpu_campaign.sh").exists()
    assert (tree / "kernels" / "kl" / "rows.py").exists()
    assert not list(tree.rglob("*.so"))
    assert not (tree / ".git").exists()


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")
def test_wheels_are_those_of_the_list(tmp_path: Path) -> None:
    """A made-up pip: what matters is what it is asked for, and that too much does not travel."""
    pip = tmp_path / "pip"
    pip.write_text(
        f"#!{sys.executable}\nimport json, pathlib, sys\n"
        "folder = pathlib.Path(sys.argv[sys.argv.index('-d') + 1])\nfolder.mkdir(parents=True, exist_ok=True)\n"
        "(folder / 'a.whl').write_bytes(bytes(SIZE))\n"
        f"pathlib.Path({str(tmp_path / 'said')!r}).write_text(json.dumps(sys.argv[1:]))\n".replace(
            "SIZE", "10"
        )
    )
    pip.chmod(0o755)
    done = prepared(tmp_path / "go", PIP=str(pip))
    assert done.returncode == 0, done.stderr
    said = json.loads((tmp_path / "said").read_text())
    assert said[0] == "download"
    assert {"--no-deps", "--only-binary=:all:", "3.12"} <= set(said)
    assert said[said.index("-r") + 1] == str(ROOT / "bench" / "gpu_wheels.txt")
    pip.write_text(pip.read_text().replace("bytes(10)", "bytes(70 << 20)"))
    full = prepared(tmp_path / "go", PIP=str(pip))
    assert full.returncode == 1
    assert "64 are meant to travel at once" in full.stderr
    dali = prepared(tmp_path / "go", "--dali", PIP=str(pip))
    assert dali.returncode == 0, dali.stderr
    parts = sorted((tmp_path / "go" / "dali").glob("a.whl.part-*"))
    assert [path.stat().st_size for path in parts] == [48 << 20, 22 << 20]
    assert prepared(tmp_path / "go", "--fast").returncode == 2
    assert prepared().returncode == 2

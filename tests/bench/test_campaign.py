"""The GPU campaign without a GPU: its journal, its plan under a made-up clock, and kills at any moment."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from bench.campaign.driver import LATE, LEAST, NO_TIME, OK, campaign
from bench.campaign.plan import BUDGET, CHECKERS, LOSSES, PARTS, Part, chosen
from kdfast.benchmarks import SUITES
from kdfast.benchmarks.case import Settings
from kdfast.benchmarks.journal import Journal
from kdfast.errors import KDFastError
from tests.conftest import INTERPRETING

pytestmark = pytest.mark.skipif(INTERPRETING, reason="nothing here launches a kernel")
ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "bench" / "gpu_campaign.sh"
FILES = {"results.jsonl", "run.log", "tests.xml", "ncu.csv"}


class Made:
    """A clock that parts move: each takes as long as it is said to, but no longer than it may."""

    def __init__(self, **takes: float) -> None:
        self.now, self.takes = 100.0, takes
        self.ran: list[tuple[str, float, float]] = []

    def clock(self) -> float:
        return self.now

    def __call__(self, part: Part, seconds: float) -> str:
        needed = self.takes.get(part.name, part.seconds)
        self.ran.append((part.name, self.now - 100.0, seconds))
        self.now += min(needed, seconds)
        return OK if needed <= seconds else LATE


def ran(made: Made, journal: Journal, budget: float = BUDGET) -> dict[str, str]:
    return campaign(PARTS, journal, made, budget=budget, clock=made.clock, say=len)


# --- the plan -----------------------------------------------------------------------------------------------------


def test_the_first_eight_minutes_are_in_order(tmp_path: Path) -> None:
    made = Made()
    verdicts = ran(made, Journal(tmp_path / "rows"))
    starts = {name: start for name, start, _ in made.ran}
    wanted = {
        "environment": 0,
        "smoke": 12,
        "warm": 30,
        "losses": 90,
        "denoise": 135,
        "replay": 160,
        "feature": 180,
    }
    wanted |= {"linear": 220, "ncu": 250, "tests": 275, "steps": 380, "sanitizer": 460}
    assert {name: starts[name] for name in wanted} == wanted
    assert [name for name, verdict in verdicts.items() if verdict == OK][: len(wanted)] == list(wanted)


def test_nothing_runs_beyond_the_budget(tmp_path: Path) -> None:
    made = Made(**{part.name: 1e9 for part in PARTS})
    verdicts = ran(made, Journal(tmp_path / "rows"))
    assert made.now - 100.0 <= BUDGET
    assert verdicts["losses"] == LATE
    assert verdicts["compiled"] == NO_TIME
    # All of it, with a minute for the machine's start and one for its end, is fifteen minutes in two commands.
    assert sum(part.seconds for part in PARTS) <= 13 * 60
    assert BUDGET <= 9 * 60 + 1


def test_what_a_part_leaves_over_is_the_next_ones(tmp_path: Path) -> None:
    made = Made(smoke=8, warm=80)
    ran(made, Journal(tmp_path / "rows"))
    given = {name: seconds for name, _, seconds in made.ran}
    assert given["warm"] == 60 + 10
    assert given["losses"] == 45  # warm took all that was there


def test_a_part_that_would_get_a_moment_is_not_begun(tmp_path: Path) -> None:
    made = Made()
    verdicts = ran(made, Journal(tmp_path / "rows"), budget=12 + LEAST - 1)
    assert verdicts["environment"] == OK
    assert verdicts["smoke"] == NO_TIME
    assert [name for name, *_ in made.ran] == ["environment"]


def test_resuming_skips_what_was_done_and_gives_its_time_to_the_rest(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "rows")
    ran(Made(losses=1e9), journal, budget=200)
    again = Made()
    verdicts = ran(again, journal)
    names = [name for name, *_ in again.ran]
    assert names[0] == "losses"  # cut short, and so not done
    assert not {"environment", "smoke", "warm", "denoise", "replay"} & set(names)
    assert again.ran[0][2] == 45
    assert verdicts["warm"] == OK


def test_the_plan_names_what_there_is() -> None:
    suites = {suite for part in PARTS for suite in part.suites}
    assert suites == set(SUITES)
    assert len({part.name for part in PARTS}) == len(PARTS)
    assert {part.name for part in PARTS if part.processes > 1} == {"warm"}  # timing is alone
    assert CHECKERS == 12
    with pytest.raises(ValueError, match="PARTS: got speed; accepted: environment smoke"):
        chosen("losses speed")
    assert [part.name for part in chosen("replay losses")] == ["losses", "replay"]
    assert chosen("") == PARTS


def test_the_most_wanted_cases_come_first_and_exist() -> None:
    """On a GPU's sizes: the keys are made there, too, and no tensor is."""
    from kdfast.benchmarks import losses

    keys = [f"losses/kd_kl_div[{_named(shape)}]" for shape in losses._kl_shapes(Settings("cuda", quick=True))]
    keys += ["losses/jsd_loss[x]", "losses/dkd_loss[x]"]
    (part,) = chosen("losses")
    order = part.order(reversed(keys))
    assert [next(head for head in LOSSES if key.startswith(head)) for key in order[: len(LOSSES)]] == list(
        LOSSES
    )
    assert set(order) == set(keys)
    assert Part("x", 1, "time", first=("b", "a"), only=True).order(["a1", "c", "b1"]) == ["b1", "a1"]


def _named(shape: Any) -> str:
    dims, dtype = "x".join(map(str, shape.dims)), str(shape.dtype).removeprefix("torch.")
    return f"shape={dims}, dtype={dtype}" + (f", dim={shape.dim}" if shape.dim != -1 else "")


# --- the journal --------------------------------------------------------------------------------------------------


def test_a_line_cut_short_costs_itself_alone(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "deep" / "rows")
    assert journal.records() == []
    journal.append({"n": 1})
    with journal.path.open("ab") as handle:
        handle.write(b'{"n": 2, "tex')
    assert journal.records() == [{"n": 1}]
    with journal.path.open("ab") as handle:  # nested beyond what Python can follow; no text; a list
        handle.write(b"[" * 100_000 + b"\n\xff\n[1]\n")
    assert journal.records() == [{"n": 1}]
    journal.append({"n": 3})
    assert journal.records() == [{"n": 1}, {"n": 3}]


def test_processes_append_side_by_side(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    code = (
        "import sys; from pathlib import Path; from kdfast.benchmarks.journal import Journal\n"
        "for n in range(50): Journal(Path(sys.argv[1])).append({'who': sys.argv[2], 'n': n, 'text': 'x' * 9000})"
    )
    running = [subprocess.Popen([sys.executable, "-c", code, str(path), who], cwd=ROOT) for who in "ab"]
    assert [process.wait(120) for process in running] == [0, 0]
    records = Journal(path).records()
    assert Counter(record["who"] for record in records) == {"a": 50, "b": 50}
    for who in "ab":
        assert [record["n"] for record in records if record["who"] == who] == list(range(50))


# --- the script ---------------------------------------------------------------------------------------------------


def begin(out: Path, *words: str, **environment: str) -> subprocess.Popen[str]:
    cache = os.environ.get("CACHE", str(out.parent / "cache"))
    given = {
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        "PROCESSES": "2",
        "CACHE": cache,
        **environment,
    }
    return subprocess.Popen(
        ["bash", str(SCRIPT), str(out), *words],
        env={**os.environ, **given},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def kill(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):  # it came to its end
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def rows(out: Path) -> list[dict[str, Any]]:
    return Journal(out / "results.jsonl").records()


def results(out: Path) -> Counter[tuple[str, str]]:
    """Everything that the campaign knows, and how often it found it out."""
    named = {"case": "key", "check": "key", "test": "id", "smoke": "name"}
    return Counter(
        (r.get("part", r["kind"]), r[named[r["kind"]]])
        for r in rows(out)
        if r["kind"] in named and r.get("outcome") != "failed"
    )


def until(out: Path, count: int, process: subprocess.Popen[str], limit: float = 200) -> None:
    end = time.monotonic() + limit
    while sum(results(out).values()) < count and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)


@pytest.mark.timeout(900)
def test_a_killed_campaign_goes_on_where_it_was(tmp_path: Path) -> None:
    """Killed after the second row: no row is lost, and none is measured twice."""
    out, parts = tmp_path / "out", "environment replay"
    process = begin(out, "--dry-run", PARTS=parts)
    until(out, 2, process)
    before = rows(out)
    kill(process)
    assert rows(out)[: len(before)] == before
    assert process.returncode == -signal.SIGKILL, process.stdout and process.stdout.read()
    refused = begin(out, "--dry-run", PARTS=parts)
    assert "--resume goes on" in refused.communicate(timeout=200)[0]
    assert refused.returncode == 2
    last = begin(out, "--dry-run", "--resume", PARTS=parts)
    said = last.communicate(timeout=500)[0]
    assert last.returncode == 0, said
    assert {path.name for path in out.iterdir()} <= FILES
    assert set(results(out).values()) == {1}
    assert len(results(out)) == 9
    assert "environment: done before" in said


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_whole_campaign_survives_a_kill_after_each_part_and_twenty_more(tmp_path: Path) -> None:
    """Every step at its smallest on a CPU; then everything is there once, of every suite."""
    out, moments, kills, runs = tmp_path / "out", random.Random(0), 0, 0
    known: Counter[tuple[str, str]] = Counter()
    parts, wanted = 0, chosen(os.environ.get("PARTS", ""))

    def done() -> int:
        """Parts that are: one that ran out of its time, on a slow machine, is begun again."""
        ended = (r for r in rows(out) if r["kind"] == "part" and r["verdict"] not in (LATE, NO_TIME))
        return len({record["part"] for record in ended})

    while kills < 20 or parts < len(wanted):
        runs += 1
        assert runs < 80
        process = begin(out, "--dry-run", "--resume")
        seen, more, end = len(rows(out)), moments.randint(0, 4), time.monotonic() + 900
        while process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
            now = rows(out)
            if kills < 20 and len(now) - seen >= more:
                time.sleep(moments.choice((0, moments.random(), 3 * moments.random())))
                break
            if kills >= 20 and done() > parts:
                break
        alive = process.poll() is None
        kill(process)
        kills += alive
        parts = done()
        assert not known - results(out), "a finished row was lost"
        known = results(out)
        print(f"kill {kills}: {len(known)} rows, {parts} parts done", flush=True)
        if not alive and kills < 20:  # through with it: from the beginning
            assert set(known.values()) == {1}, "a row was measured twice"
            out, parts, known = tmp_path / f"out{kills}", 0, Counter()
    assert set(known.values()) == {1}, "a row was measured twice"
    suites = {suite for part in wanted for suite in part.suites if part.kind == "time"}
    assert {key.partition("/")[0] for part, key in known if part not in ("tests", "warm", "smoke")} == suites
    assert {path.name for path in out.iterdir()} <= FILES


def test_the_script_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for words, environment in (
        ([str(out), "--fast"], {}),
        ([], {}),
        ([str(out), "--dry-run"], {"PARTS": "speed"}),
    ):
        done = subprocess.run(
            ["bash", str(SCRIPT), *words],
            env={**os.environ, "PYTHON": sys.executable, **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2, done.stderr
        assert "usage" in done.stderr or "got speed; accepted: environment" in done.stderr
    assert not out.exists()


def test_what_the_caller_has_on_its_path_is_kept(tmp_path: Path) -> None:
    """Wheels that were carried along lie there."""
    (tmp_path / "carried").mkdir()
    (tmp_path / "carried" / "sitecustomize.py").write_text(
        "import os, sys\nif 'bench.campaign' in sys.orig_argv: print('path', os.environ['PYTHONPATH'])\n"
    )
    process = begin(tmp_path / "out", "--dry-run", PARTS="ncu", PYTHONPATH=str(tmp_path / "carried"))
    said = process.communicate(timeout=200)[0]
    (line,) = [line for line in said.splitlines() if line.startswith("path ")]
    assert line.split(":")[-1] == str(tmp_path / "carried")
    assert json.loads((tmp_path / "out" / "results.jsonl").read_text())["verdict"].startswith("absent: ncu")


def test_a_pipe_is_no_journal(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows")
    with pytest.raises(KDFastError, match="rows: cannot be read: is a pipe"):
        Journal(tmp_path / "rows").records()

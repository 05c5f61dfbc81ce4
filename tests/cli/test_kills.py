"""Every command killed at any moment, and run again: what is there in the end is what an undisturbed run leaves."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import random
import re
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kdfast import commands
from kdfast.cli.app import app
from kdfast.disk import TEMPORARY
from kdfast.experiments.common.stored_labels import HEADER
from kdfast.experiments.reproduce import run as reproduce
from kdfast.experiments.reproduce.config import ReproduceConfig
from tests.data.test_splits import classes_of

TABLE = """
title: a small table
common: {{method: kd, student: resnet8, data: {data}, test_data: {data}, epochs: 1, batch_size: 8, image_size: 8,
  tensorboard: false}}
cells:
  one: {{teacher: {teacher}, temperature: 1.0, paper: 50}}
  two: {{teacher: {teacher}, temperature: 4.0, paper: 60}}
"""
#: The fraction whose multiples are spread most evenly.
GOLDEN = 0.6180339887498949
#: What changes a folder, as Python announces it before it is done.
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink")
#: Keys of records that are measured: no two runs have the same.
MEASURED = ("second", "time", "per_s", "memory")


def child(work: Callable[[], object], folder: Path, at: int = 0, later: float = 0.0) -> int | None:
    """Run ``work`` in a forked process that dies before its ``at``-th change to ``folder``, or so many seconds later.

    Returns:
        How often it was about to change something; None: it was killed.
    """
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        count = 0

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal count
            writes = (
                event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            )
            if not (writes or event in CHANGES) or str(folder) not in str(arguments[0]):
                return
            count += 1
            if count == at:
                if not later:
                    os.kill(os.getpid(), signal.SIGKILL)
                # Nobody handles it: it kills wherever the process then is, between two machine instructions.
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.setitimer(signal.ITIMER_REAL, later)

        code = 1
        try:
            os.close(reading)
            torch.set_num_threads(1)
            sys.addaudithook(watch)
            work()
            os.write(writing, str(count).encode())
            code = 0
        except BaseException as error:
            os.write(writing, f"{type(error).__name__}: {error}".encode()[:4000])
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    _, status = os.waitpid(process, 0)
    if os.WIFSIGNALED(status):
        return None
    assert os.WEXITSTATUS(status) == 0, said
    return int(said)


def unmeasured(document: Any) -> Any:
    if isinstance(document, dict):
        known = {k: v for k, v in document.items() if k != "date" and not any(word in k for word in MEASURED)}
        return {key: unmeasured(value) for key, value in known.items()}
    return [unmeasured(one) for one in document] if isinstance(document, list) else document


#: How long a run took, in its page and in a table of runs.
TIMES = re.compile(
    r'(?<=seconds</td><td class="value">)[0-9.]+|(?<=<td class="number">)[0-9.]+ (s|min|h)(?=</td>)'
)


def left(folder: Path) -> dict[str, Any]:
    """Everything in a folder: digests, and of records what was not measured."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        assert TEMPORARY not in name, name
        if not path.is_file() or path.name.endswith(".lock"):
            continue
        data = path.read_bytes()
        if path.suffix in (".json", ".jsonl") and path.name != "checkpoint.json":
            lines = data.decode().splitlines() if path.suffix == ".jsonl" else [data.decode()]
            found[name] = [unmeasured(json.loads(line)) for line in lines]
        elif path.suffix == ".html":
            found[name] = TIMES.sub("", data.decode())
        elif path.name != "checkpoint.json":  # which holds the digests of its neighbours
            found[name] = hashlib.sha256(data).hexdigest()
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images; and imported is what would take most of a child's time."""
    for module in ("distill", "synth", "select", "report", "data_report", "teach", "label"):
        importlib.import_module(
            f"kdfast.experiments.{module}.run" if module != "report" else "kdfast.report.page"
        )
    root = tmp_path_factory.mktemp("kills")
    classes_of(root / "images", 16)
    return root


def brought(place: Path, name: str) -> None:
    """What a command reads: made in a child, which leaves no threads in this process."""
    needed = {"select": ["teacher"], "report": ["teacher"], "distill": ["teacher"], "reproduce": ["teacher"]}
    makers = {"teacher": teach, "set": synth}
    for one in needed.get(name, ["teacher", "set"] if name in ("data-report", "label") else []):
        if not (place / one).exists():
            child(lambda one=one: makers[one](place, place / one), place)  # type: ignore[misc]


def teach(root: Path, out: Path) -> None:
    commands.teach(
        data=root / "images", out=out, resume=True, progress=False, model="resnet8", image_size=8, epochs=2,
        batch_size=8, tensorboard=False, checkpoint_steps=1, log_every=1,
    )  # fmt: skip


def distill(root: Path, out: Path) -> None:
    commands.distill(
        out=out, resume=True, progress=False, method="kd", teacher=root / "teacher", student="resnet8",
        data=root / "images", test_data=root / "images", image_size=8, epochs=2, batch_size=8, tensorboard=False,
        checkpoint_steps=1, log_every=1,
    )  # fmt: skip


def synth(root: Path, out: Path) -> None:
    commands.synth(
        source="noise", out=out, images=40, image_size=8, num_classes=2, samples_per_shard=8, batch_size=8,
        progress=False, resume=True,
    )  # fmt: skip


def select(root: Path, out: Path) -> None:
    commands.select(
        data=root / "images", teacher=root / "teacher", out=out, budget=12, progress=False, resume=True
    )


def data_report(root: Path, out: Path) -> None:
    commands.data_report(data=root / "set", teacher=root / "teacher", out=out, progress=False)


def report(root: Path, out: Path) -> None:
    commands.report([out])


def reproduced(root: Path, out: Path) -> None:
    table = root / "table.yaml"
    table.write_text(TABLE.format(data=root / "images", teacher=root / "teacher"))
    config = ReproduceConfig(table=str(table), out=str(out), progress=False)
    reproduce.run(config, lambda words: app([*words, "--quiet"], standalone_mode=False) or 0)


def label(root: Path, out: Path) -> None:
    if not (out / HEADER).exists():  # labels that are whole are refused, not made again
        commands.label(
            data=root / "set", teacher=root / "teacher", out=out, views=2, augment=["flip"], progress=False
        )


COMMANDS: dict[str, Callable[[Path, Path], None]] = {
    "teach": teach,
    "distill": distill,
    "synth": synth,
    "select": select,
    "report": report,
    "data-report": data_report,
    "reproduce": reproduced,
    "label": label,
}


def endure(name: str, place: Path, folder: Path, kills: int) -> None:
    """Die at moments that are spread evenly over a run, and again in the run that goes on; then run to the end."""
    work, chance = COMMANDS[name], random.Random(name)
    brought(place, name)
    out = folder / "out"  # always the same: pages name it
    if name == "report":
        shutil.copytree(place / "teacher", out)
    changes = child(lambda: work(place, out), out)
    assert changes is not None
    whole = left(out)
    died = runs = 0
    while died < kills:
        if name != "report":
            shutil.rmtree(out)
        at = 1 + int(changes * (runs * GOLDEN % 1))
        # Half of them before a change, half anywhere until the next ones.
        later = chance.choice([0.0, chance.uniform(1e-4, 0.02)])
        died += child(lambda: work(place, out), out, at, later) is None
        died += child(lambda: work(place, out), out, chance.randint(1, changes)) is None
        child(lambda: work(place, out), out)
        assert left(out) == whole, f"{name}, killed at change {at} of {changes} and {later} s"
        runs += 1
    print(f"{name}: {changes} changes a run, {runs} runs, {died} kills")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name != "teach" else []) for name in COMMANDS]
)
def test_a_few_kills(name: str, place: Path, tmp_path: Path) -> None:
    endure(name, place, tmp_path, 2)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_hundred_kills(name: str, place: Path, tmp_path: Path) -> None:
    endure(name, place, tmp_path, 100)

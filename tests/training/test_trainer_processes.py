"""The loop in processes of its own: killed, and shared by two."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from kdfast.training import ScheduleConfig, Trainer, read_metrics
from tests.training.test_trainer import QUIET, Batches

RUN = """
    import sys, json, torch
    sys.path[:0] = [{root!r}]
    from dataclasses import replace
    import time
    from tests.training.test_trainer import *
    slow = {slow}
    def paced(model, batch):
        time.sleep(slow)
        return step(model, batch)
    config = replace(QUIET, epochs=6, checkpoint_steps=1)
    result = fit(config, Resumable(), resume=True, out=sys.argv[1], step=paced)
    torch.save(result.model.state_dict(), sys.argv[1] + "/final.pt")
    print(json.dumps(result.metrics))
"""


def script(tmp_path: Path, slow: float) -> Path:
    file = tmp_path / f"run-{slow}.py"
    file.write_text(textwrap.dedent(RUN.format(root=str(Path(__file__).parents[2]), slow=slow)))
    return file


@pytest.mark.slow
def test_kill_nine_and_resume_ends_in_the_same_bits(tmp_path: Path) -> None:
    expected, out = tmp_path / "whole", tmp_path / "killed"
    torch.set_num_threads(1)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, script(tmp_path, 0), expected], check=True, env=environment)
    for _ in range(2):  # killed twice, wherever it happens to be
        before = _latest(out)
        victim = subprocess.Popen([sys.executable, script(tmp_path, 0.2), out], env=environment)
        while _latest(out) <= before + 2 and victim.poll() is None:
            time.sleep(0.02)
        victim.send_signal(signal.SIGKILL)
        assert victim.wait() == -signal.SIGKILL
    assert 0 < _latest(out) < 30
    subprocess.run([sys.executable, script(tmp_path, 0), out], check=True, env=environment)
    whole, resumed = (torch.load(folder / "final.pt", weights_only=True) for folder in (expected, out))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def _latest(out: Path) -> int:
    steps = [int(path.name[5:]) for path in (out / "checkpoints").glob("step-*")]
    return max(steps, default=0)


DISTRIBUTED = """
    import json, os, signal, sys, torch
    sys.path[:0] = [{root!r}]
    from dataclasses import replace
    from tests.training.test_trainer import *

    class Share(Batches):
        def __iter__(self):
            rank = int(os.environ["RANK"])
            for number, (images, labels) in enumerate(super().__iter__()):
                half = slice(0, 3) if rank == 0 else slice(3, 6)
                yield images[half], labels[half]

    def plain(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    out, stop = sys.argv[1], int(sys.argv[2])
    torch.manual_seed(5)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    calls = iter(range(1, 1000))
    def stopping(m, batch):
        if next(calls) == stop and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGINT)
        return plain(m, batch)
    trainer = Trainer(model, stopping, replace(QUIET, schedule=ScheduleConfig()), out=out, evaluate=accuracy)
    try:
        result = trainer.fit(Share(), resume=True)
    except TrainingInterrupted as stopped:
        # In one piece: both ranks write to one pipe.
        os.write(1, f"stopped at {{stopped.checkpoint.name}}\\n".encode())
        sys.exit(0)
    if os.environ["RANK"] == "0":
        torch.save(result.model.state_dict(), out + "/final.pt")
        print(json.dumps(result.metrics))
"""


@pytest.mark.usefixtures("heard")
@pytest.mark.slow
def test_two_processes_train_as_one_and_resume(tmp_path: Path) -> None:
    file = tmp_path / "two.py"
    file.write_text(textwrap.dedent(DISTRIBUTED.format(root=str(Path(__file__).parents[2]))))

    def torchrun(out: str, stop: int) -> str:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node=2",
            f"--master_port={port}",
        ]
        done = subprocess.run(
            [*command, file, tmp_path / out, str(stop)],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            timeout=240,
        )
        return done.stdout

    torchrun("whole", 0)
    # One rank is asked to stop; both stop at the same step, with one checkpoint.
    assert torchrun("parts", 7).count("stopped at step-00000008") == 2
    torchrun("parts", 0)
    whole, parts = (torch.load(tmp_path / o / "final.pt", weights_only=True) for o in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)

    # And both ranks together did what one process does with the whole batch of six.
    class Six(Batches):
        def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            yield from ((images[:6], labels[:6]) for images, labels in super().__iter__())

    torch.manual_seed(5)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    config = replace(QUIET, schedule=ScheduleConfig())
    one = Trainer(model, lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]), config).fit(Six())
    torch.testing.assert_close(one.model.state_dict(), whole)
    evaluations = [
        line for line in read_metrics(tmp_path / "parts" / "metrics.jsonl") if line["kind"] == "eval"
    ]
    assert [line["epoch"] for line in evaluations] == [1, 2, 3, 4]

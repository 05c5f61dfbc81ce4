"""Ranks that stop or die: the others end, say which, and the run goes on from its checkpoint."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed import HashStore  # type: ignore[attr-defined]

from kdfast.training import heartbeat
from kdfast.training.heartbeat import LOST, Listener

RUN = """
    import os, signal, sys, time
    sys.path[:0] = [{root!r}]
    import torch
    from dataclasses import replace
    from kdfast.training import heartbeat
    from tests.training.test_trainer import *
    heartbeat.INTERVAL, heartbeat.LIMIT = 0.2, {limit}
    out, deed, victim = sys.argv[1], sys.argv[2], sys.argv[3]
    torch.set_num_threads(1)
    calls = 0
    def at_seven(model, batch):
        global calls
        calls += 1
        if calls == 7 and os.environ["RANK"] == victim:
            if deed == "stops":
                os.kill(os.getpid(), signal.SIGSTOP)
            elif deed == "dies":
                os._exit(9)
            elif deed == "is slow":
                time.sleep(3 * heartbeat.LIMIT)
        return step(model, batch)
    torch.manual_seed(5)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    config = replace(QUIET, checkpoint_steps=2)
    trainer = Trainer(model, at_seven, config, out=out)
    result = trainer.fit(Resumable(), resume=True)
    if os.environ["RANK"] == "0":
        torch.save(result.model.state_dict(), out + "/final.pt")
    print("done", result.steps)
"""


@pytest.mark.parametrize(("rank", "silent"), [(0, 2), (1, 2), (2, 0)])
def test_the_rank_that_does_not_count_is_lost(
    monkeypatch: pytest.MonkeyPatch, rank: int, silent: int
) -> None:
    monkeypatch.setattr(heartbeat, "INTERVAL", 0.01)
    store, lost, told = HashStore(), [], threading.Event()

    def lose(which: int) -> None:
        lost.append(which)
        told.set()

    others = [Listener(store, one, 3, lost.append) for one in range(3) if one not in (rank, silent)]
    one = Listener(store, rank, 3, lose)
    one.heard[silent] -= 2 * heartbeat.LIMIT
    for each in (*others, one):
        each.start()
    try:
        assert told.wait(30)
    finally:
        for each in (*others, one):
            each.end()
    assert lost == [silent]


def test_ranks_that_count_are_heard_and_both_threads_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "INTERVAL", 0.01)
    store, lost = HashStore(), []
    both = [Listener(store, rank, 2, lost.append) for rank in range(2)]
    before = [dict(one.heard) for one in both]
    threads = threading.active_count()
    for one in both:
        one.start()
    while any(one.heard[1 - rank] == before[rank][1 - rank] for rank, one in enumerate(both)):
        time.sleep(0.01)
    for one in both:
        one.end()
    assert not lost
    assert threading.active_count() == threads


class _Cut(HashStore):
    """A store whose process is gone."""

    def set(self, key: str, value: str) -> None:
        raise torch.distributed.DistNetworkError("connection was reset")


def test_where_the_store_is_gone_rank_0_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds the store: no rank can be heard of without it."""
    monkeypatch.setattr(heartbeat, "INTERVAL", 0.01)
    monkeypatch.setattr(heartbeat, "LIMIT", 0.2)
    lost: list[int] = []
    one = Listener(_Cut(), 2, 3, lost.append)
    one.start()
    while not lost:
        time.sleep(0.01)
    one.end()
    assert lost == [0]


@pytest.mark.parametrize("counts", [False, True])
def test_a_collective_that_fails_for_want_of_a_rank_names_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], counts: bool
) -> None:
    """Another rank missed it first and has ended: gloo then speaks of that one's socket, and exits with 1."""
    monkeypatch.setattr(heartbeat, "INTERVAL", 0.01)
    monkeypatch.setattr(heartbeat, "LIMIT", 30.0)
    store = HashStore()
    lost: list[int] = []
    monkeypatch.setattr(heartbeat, "_meet", lambda _: store)
    monkeypatch.setattr(Listener, "_end_process", lambda _, rank: lost.append(rank))
    accelerator = SimpleNamespace(num_processes=3, process_index=0, wait_for_everyone=lambda: None)

    def train() -> None:
        with heartbeat.hearing(accelerator):
            (one,) = (each for each in threading.enumerate() if isinstance(each, Listener))
            if not counts:
                one.heard[2] -= 20.0
            raise RuntimeError("Connection closed by peer")

    with pytest.raises(RuntimeError, match="closed by peer"):
        train()
    assert lost == ([] if counts else [2])
    assert ("closed by peer" in capsys.readouterr().err) == (not counts)


def start(file: Path, out: Path, ranks: int, deed: str, victim: int) -> list[subprocess.Popen[str]]:
    """Ranks without a launcher, which would end them itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    meeting = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": str(ranks),
        "OMP_NUM_THREADS": "1",
    }
    return [
        subprocess.Popen(
            [sys.executable, str(file), str(out), deed, str(victim)],
            env={**os.environ, **meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]


@pytest.fixture
def script(tmp_path: Path) -> Path:
    file = tmp_path / "run.py"
    file.write_text(textwrap.dedent(RUN.format(root=str(Path(__file__).parents[2]), limit=6.0)))
    return file


def finish(file: Path, out: Path, ranks: int, deed: str = "nothing") -> None:
    running = start(file, out, ranks, deed, ranks - 1)
    said = [one.communicate(timeout=200) for one in running]
    assert [one.returncode for one in running] == [0] * ranks, said
    assert all("done 20" in text for text, _ in said)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(("deed", "victim"), [("stops", 1), ("stops", 0), ("dies", 1), ("dies", 0)])
def test_a_rank_that_is_lost_ends_the_others_and_nothing_is_lost(
    script: Path, tmp_path: Path, ranks: int, deed: str, victim: int
) -> None:
    running = start(script, tmp_path / "out", ranks, deed, victim)
    try:
        for rank, one in enumerate(running):
            if rank == victim:
                continue
            _, said = one.communicate(timeout=200)  # gloo would wait for half an hour
            assert one.returncode != 0, said
            if deed == "stops":
                assert one.returncode == LOST, said
                assert f"kdfast: rank {victim} of {ranks} " in said
                assert f"rank {rank} ends; --resume goes on from the last checkpoint" in said
    finally:
        for one in running:
            one.send_signal(signal.SIGKILL)
            one.communicate()
    assert (tmp_path / "out" / "checkpoints" / "step-00000006").is_dir()
    finish(script, tmp_path / "out", ranks)
    finish(script, tmp_path / "whole", ranks)
    left, whole = (torch.load(tmp_path / name / "final.pt", weights_only=True) for name in ("out", "whole"))
    assert all(torch.equal(left[name], whole[name]) for name in whole)


@pytest.mark.slow
def test_ranks_that_are_all_stopped_for_a_while_go_on(script: Path, tmp_path: Path) -> None:
    """A laptop that is closed, a job that its scheduler suspends."""
    running = start(script, tmp_path / "out", 2, "is slow", 1)
    while not (tmp_path / "out" / "checkpoints" / "step-00000006").is_dir():
        time.sleep(0.05)
    for one in running:
        one.send_signal(signal.SIGSTOP)
    time.sleep(8)
    for one in running:
        one.send_signal(signal.SIGCONT)
    said = [one.communicate(timeout=200) for one in running]
    assert [one.returncode for one in running] == [0, 0], said


@pytest.mark.slow
def test_a_rank_that_is_slow_is_waited_for_and_another_number_of_ranks_is_refused(
    script: Path, tmp_path: Path
) -> None:
    finish(script, tmp_path / "out", 2, "is slow")
    running = start(script, tmp_path / "out", 3, "nothing", 0)
    said = [one.communicate(timeout=200)[1] for one in running]
    assert all(one.returncode for one in running)
    assert all(
        "was written by 2 processes, this run has 3; resume with as many as before" in text for text in said
    )

"""The loop: it learns, it resumes to the same bits, it stops when asked, on one process or two."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kdfast.errors import BackendError, CheckpointError, ConfigError, KDFastError
from kdfast.training import (
    OptimizerConfig,
    Progress,
    ScheduleConfig,
    Trainer,
    TrainerConfig,
    TrainingInterrupted,
    TrainResult,
    load_checkpoint,
    read_metrics,
)
from kdfast.training.optim import learning_rate_factor

pytestmark = pytest.mark.usefixtures("heard")

QUIET = TrainerConfig(
    epochs=4,
    device="cpu",
    progress=False,
    tensorboard=False,
    log_every=2,
    optimizer=OptimizerConfig(lr=0.1),
    schedule=ScheduleConfig("cosine", warmup_epochs=1),
)


def step(model: nn.Module, batch: Any) -> torch.Tensor:
    images, labels = batch
    # Noise from the global generator: a resumed run must find it where it was.
    return nn.functional.cross_entropy(model(images + 0.1 * torch.randn_like(images)), labels)


class Batches:
    """Five batches of seven whose order follows from the epoch; says where it is if asked to."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(35, 3, 4, 4, generator=generator)
        self.labels = (self.images.mean((1, 2, 3)) > 0).long()
        self.epoch = 0
        self.read = 0

    def __len__(self) -> int:
        return 5

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        order = torch.randperm(35, generator=torch.Generator().manual_seed(self.epoch))
        for rows in order.split(7):
            self.read += 1
            yield self.images[rows], self.labels[rows]


class Resumable(Batches):
    """Like a shard loader: after the last batch it stands at the next epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.place = (0, 0)

    def set_epoch(self, epoch: int) -> None:
        self.place = (epoch, 0)

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place = tuple(state["place"])

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        self.epoch, first = self.place
        for number, batch in enumerate(super().__iter__()):
            self.place = (self.epoch, number + 1) if number < 4 else (self.epoch + 1, 0)
            if number >= first:
                yield batch


class Drawing(Batches):
    """Like a DataLoader that shuffles: its order comes from the global generator."""

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        self.epoch = int(torch.randint(1000, ()))
        return super().__iter__()


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)
    )


def accuracy(model: nn.Module) -> dict[str, float]:
    data = Batches()
    model.eval()
    with torch.no_grad():
        return {"accuracy": float((model(data.images).argmax(1) == data.labels).float().mean())}


def fit(
    config: TrainerConfig = QUIET, batches: Any = None, resume: bool = False, **kwargs: Any
) -> TrainResult:
    trainer = Trainer(network(), kwargs.pop("step", step), config, evaluate=accuracy, **kwargs)
    return trainer.fit(Batches() if batches is None else batches, resume=resume)


def assert_same(a: TrainResult, b: TrainResult) -> None:
    assert (a.metrics, a.steps, a.images) == (b.metrics, b.steps, b.images)
    for (name, x), y in zip(a.model.state_dict().items(), b.model.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


def interrupting(at: int, number: int = signal.SIGINT) -> Any:
    """A step that sends this process a signal while it runs for the ``at``-th time."""
    calls = iter(range(1, 10_000))

    def interrupted(model: nn.Module, batch: Any) -> torch.Tensor:
        if next(calls) == at:
            os.kill(os.getpid(), number)
        return step(model, batch)

    return interrupted


def test_it_learns_and_logs(tmp_path: Path) -> None:
    result = fit(replace(QUIET, epochs=30, tensorboard=True, eval_every=10), out=tmp_path)
    assert result.metrics["accuracy"] > 0.9
    assert (result.steps, result.images) == (150, 1050)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    train = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in train] == list(range(2, 151, 2))
    # 0.11 … 0.35 over 11 seeds and 4 roundings (avx512, avx2, no vectors, without oneDNN), 17 runs; accuracy 1.0.
    losses = [line["loss"] for line in train]
    assert sum(losses[-15:]) < 0.7 * sum(losses[:15])
    assert [line["epoch"] for line in lines if line["kind"] == "eval"] == [10, 20, 30]
    assert list((tmp_path / "tensorboard").glob("events*"))
    assert result.metrics["best_accuracy"] == max(
        line["accuracy"] for line in lines if line["kind"] == "eval"
    )


@pytest.mark.parametrize("batches", [Batches, Resumable, Drawing])
@pytest.mark.parametrize("at", [3, 5, 6, 20], ids=["mid-epoch", "epoch-end", "epoch-start", "last"])
def test_resumed_is_uninterrupted_bit_for_bit(tmp_path: Path, batches: type[Batches], at: int) -> None:
    expected = fit(batches=batches())
    # In the very last step there is nothing left to stop: the run ends as if nobody had asked.
    with nullcontext() if at == 20 else pytest.raises(TrainingInterrupted, match=f"step-{at:08d}"):
        fit(batches=batches(), out=tmp_path, step=interrupting(at))
    torch.manual_seed(99)
    assert_same(fit(batches=batches(), out=tmp_path, resume=True), expected)


def test_checkpoints_that_a_kill_left_are_removed_by_the_run_that_goes_on(tmp_path: Path) -> None:
    """Killed after its last checkpoint and before it removed older ones: no further checkpoint would come to it."""
    fit(replace(QUIET, keep=2), out=tmp_path)
    folder = tmp_path / "checkpoints"
    kept = sorted(path.name for path in folder.iterdir())
    shutil.copytree(folder / kept[0], folder / "step-00000001")
    shutil.copytree(folder / kept[0], folder / ".tmp-old-step-00000002")
    fit(replace(QUIET, keep=2), out=tmp_path, resume=True)
    assert sorted(path.name for path in folder.iterdir()) == kept


def test_everything_else_in_the_state_resumes_too(tmp_path: Path) -> None:
    config = replace(
        QUIET,
        ema_decay=0.8,
        accumulate=2,
        clip_grad_norm=0.5,
        optimizer=OptimizerConfig("adamw", lr=0.01),
        schedule=ScheduleConfig("multistep", milestones=(1, 2)),
    )

    class Counter:
        value = 0

        def state_dict(self) -> dict[str, Any]:
            return {"value": self.value}

        def load_state_dict(self, state: Any) -> None:
            self.value = state["value"]

    def counted(counter: Counter, inner: Any) -> Any:
        def run(model: nn.Module, batch: Any) -> torch.Tensor:
            counter.value += 1
            return (1 + 0.01 * counter.value) * inner(model, batch)

        return run

    first, second, third = Counter(), Counter(), Counter()
    expected = fit(config, step=counted(first, step), state={"c": first})
    with pytest.raises(TrainingInterrupted):
        fit(config, out=tmp_path, step=counted(second, interrupting(8)), state={"c": second})
    assert_same(
        fit(config, out=tmp_path, step=counted(third, step), state={"c": third}, resume=True), expected
    )
    assert third.value == first.value


def test_a_resumable_loader_is_not_read_over(tmp_path: Path) -> None:
    with pytest.raises(TrainingInterrupted):
        fit(batches=Resumable(), out=tmp_path, step=interrupting(8))
    loader = Resumable()
    loader.read = 0
    fit(batches=loader, out=tmp_path, resume=True)
    assert loader.epoch == 3


def test_the_log_has_every_step_once_after_a_resume(tmp_path: Path) -> None:
    with pytest.raises(TrainingInterrupted):
        fit(replace(QUIET, log_every=1), out=tmp_path, step=interrupting(7))
    with open(tmp_path / "metrics.jsonl", "a") as handle:
        handle.write(
            '{"kind": "train", "step": 9, "loss": 0}\n{"kind": "tr'
        )  # written after the checkpoint; torn
    fit(replace(QUIET, log_every=1), out=tmp_path, resume=True)
    steps = [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl") if line["kind"] == "train"]
    assert steps == list(range(1, 21))


def test_accumulated_batches_are_one_large_batch() -> None:
    def plain(model: nn.Module, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    data = Batches()
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    whole = [(data.images[:28], data.labels[:28])]
    parts = [(data.images[i : i + 7], data.labels[i : i + 7]) for i in range(0, 28, 7)]
    config = replace(QUIET, epochs=1, schedule=ScheduleConfig())
    results = []
    for batches, accumulate in ((whole, 1), (parts, 4)):
        torch.manual_seed(0)
        copy = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
        copy.load_state_dict(model.state_dict())
        result = Trainer(copy, plain, replace(config, accumulate=accumulate)).fit(batches)
        results.append(torch.cat([p.flatten() for p in result.model.parameters()]))
        assert result.steps == 1
    torch.testing.assert_close(results[0], results[1])


def test_a_short_last_group_is_averaged_over_what_it_has() -> None:
    seen = []

    class Watched(Trainer):
        def _optimize(self, group: list[Any]) -> torch.Tensor:
            seen.append(len(group))
            return super()._optimize(group)

    result = Watched(network(), step, replace(QUIET, epochs=1, accumulate=2)).fit(Batches())
    assert seen == [2, 2, 1]
    assert result.steps == 3


def test_max_steps_ends_the_run() -> None:
    result = fit(replace(QUIET, max_steps=7))
    assert result.steps == 7


def test_the_moving_average_is_what_comes_back() -> None:
    config = replace(QUIET, ema_decay=0.5, epochs=1, max_steps=2, schedule=ScheduleConfig())
    trainer = Trainer(nn.Linear(1, 1, bias=False), lambda m, b: m(b).sum(), config)
    before = float(trainer.network.weight.detach())
    weights = []
    trainer._step_function = lambda m, b: (weights.append(float(m.weight.detach())), m(b).sum())[1]
    result = trainer.fit([torch.ones(1, 1)] * 2)
    last = float(trainer._bare.weight.detach())
    assert weights[0] == before
    # The average begins as a copy of the weights after the first step.
    assert float(result.model.weight.detach()) == pytest.approx(0.5 * weights[1] + 0.5 * last)


def test_bf16_runs_the_step_under_autocast() -> None:
    seen = []

    def watched(model: nn.Module, batch: Any) -> torch.Tensor:
        seen.append(model[5](torch.randn(2, 16)).dtype)
        return step(model, batch)

    result = fit(replace(QUIET, epochs=1, precision="bf16"), step=watched)
    assert set(seen) == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in result.model.parameters())
    fit(
        replace(QUIET, epochs=1), step=lambda m, b: (seen.clear(), step(m, b))[1]
    )  # and fp32 again afterwards


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    with pytest.raises(KDFastError, match="the loss became nan by step 2"):
        fit(step=lambda model, batch: step(model, batch) * float("nan"))


def test_dry_run_takes_one_step_and_writes_nothing(tmp_path: Path) -> None:
    model = network()
    before = model[0].weight.clone()
    trainer = Trainer(model, step, QUIET, out=tmp_path / "out")
    assert trainer.dry_run(Batches()) > 0
    assert not torch.equal(before, model[0].weight)
    assert not (tmp_path / "out").exists()


def test_sigterm_also_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(TrainingInterrupted) as stopped:
        fit(out=tmp_path, step=interrupting(2, signal.SIGTERM))
    assert stopped.value.signal == signal.SIGTERM
    assert load_checkpoint(tmp_path / "checkpoints").step == 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_ignored_signal_stays_ignored(tmp_path: Path, number: int) -> None:
    """Under nohup, or in the background of a script: whoever started the run so wants it to go on."""
    signal.signal(number, signal.SIG_IGN)
    assert fit(out=tmp_path, step=interrupting(2, number)).steps == 20
    assert signal.getsignal(number) is signal.SIG_IGN


def test_another_runs_checkpoint_is_refused(tmp_path: Path) -> None:
    fit(replace(QUIET, epochs=1), out=tmp_path, fingerprint={"lr": 0.1, "a": 1})
    with pytest.raises(CheckpointError, match=r"other settings \(lr: 0.1 before, 0.2 now\)"):
        fit(out=tmp_path, resume=True, fingerprint={"lr": 0.2, "a": 1})


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    fit(replace(QUIET, epochs=1), out=tmp_path)
    trainer = Trainer(nn.Linear(2, 2), step, QUIET, out=tmp_path)
    with pytest.raises(CheckpointError, match="does not fit this run"):
        trainer.fit(Batches(), resume=True)


@pytest.mark.parametrize("field", ["epochs", "accumulate", "keep", "log_every"])
def test_counts_below_one_are_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=f"{field}: got 0"):
        replace(QUIET, **{field: 0})


def test_unknown_devices_and_precisions_are_refused() -> None:
    with pytest.raises(ConfigError, match="device: got 'tpu'"):
        Trainer(network(), step, replace(QUIET, device="tpu"))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="precision: got 'int3'"):
        Trainer(network(), step, replace(QUIET, precision="int3"))  # type: ignore[arg-type]
    if not torch.cuda.is_available():
        with pytest.raises(BackendError, match="sees no CUDA device"):
            Trainer(network(), step, replace(QUIET, device="cuda"))


def test_batches_without_a_length_or_empty_are_refused() -> None:
    with pytest.raises(TypeError, match="without a length"):
        fit(batches=iter([1]))
    with pytest.raises(KDFastError, match="batches: got none"):
        fit(batches=_Empty())


class _Empty(Batches):
    def __len__(self) -> int:
        return 0


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (ScheduleConfig(), [1, 1, 1, 1]),
        (ScheduleConfig("multistep", milestones=(1, 1.5)), [1, 1, 0.1, 0.01]),
        (ScheduleConfig("cosine"), [1, 0.853553, 0.5, 0.146447]),
        (ScheduleConfig("cosine", warmup_epochs=1), [0.5, 1, 1, 0.5]),
        (ScheduleConfig("cosine", min_ratio=0.2), [1, 0.882843, 0.6, 0.317157]),
    ],
)
def test_schedules(config: ScheduleConfig, expected: list[float]) -> None:
    factors = [learning_rate_factor(config, s, steps_per_epoch=2, total_steps=4) for s in range(4)]
    assert factors == pytest.approx(expected, abs=1e-6)


def test_milestones_must_ascend() -> None:
    with pytest.raises(ConfigError, match="ascending"):
        ScheduleConfig("multistep", milestones=(20, 10))
    with pytest.raises(ConfigError, match="milestones: got none"):
        ScheduleConfig("multistep")


def test_progress_without_a_terminal_prints_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress() as progress:
        task = progress.task("count", total=3, unit="thing")
        for _ in range(3):
            task.advance(note="x")
    out = capsys.readouterr()
    assert out.out == ""
    assert out.err.startswith("count 3/3 · ")
    assert "thing/s · x" in out.err

"""A run whose numbers end keeps its last good checkpoint; signals and damaged files cost no more than they must."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from kdfast.errors import CheckpointError, KDFastError
from kdfast.models import create_model
from kdfast.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from kdfast.training.model_io import ModelConfig, load_model, load_model_config, save_model
from kdfast.training.state import first_not_finite
from kdfast.training.trainer import Trainer, TrainerConfig, TrainingInterrupted

BATCHES = [torch.randn(4, 3, generator=torch.Generator().manual_seed(i)) for i in range(2)]


def trainer(out: Path, poison: Callable[[int, nn.Module], float], **config: Any) -> Trainer:
    calls = [0]

    def step(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        return model(batch).square().mean() * poison(calls[0], model)

    settings = TrainerConfig(epochs=8, device="cpu", tensorboard=False, progress=False, **config)
    return Trainer(nn.Linear(3, 2), step, settings, out=out)


def finite(checkpoint: Path) -> bool:
    return all(
        bool(tensor.isfinite().all()) for tensor in load_file(checkpoint / "model.safetensors").values()
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e38])
@pytest.mark.parametrize("config", [{}, {"ema_decay": 0.9}, {"checkpoint_steps": 1}])
def test_what_is_not_finite_never_replaces_a_good_checkpoint(
    tmp_path: Path, bad: float, config: dict[str, Any]
) -> None:
    run = trainer(tmp_path, lambda call, _: bad if call >= 5 else 1.0, **config)
    with pytest.raises(
        KDFastError, match=r"(finite|became).*the last checkpoint from before is .*step-0000000"
    ):
        run.fit(BATCHES)
    kept = sorted((tmp_path / "checkpoints").iterdir())
    assert len(kept) == 2
    assert all(map(finite, kept))
    assert load_checkpoint(tmp_path / "checkpoints").step in (4, 5)


def test_a_weight_alone_is_enough(tmp_path: Path) -> None:
    def spoil(call: int, model: nn.Module) -> float:
        if call == 5:
            model.register_buffer("seen", torch.tensor(float("nan")))
        return 1.0

    run = trainer(tmp_path, spoil)
    with pytest.raises(KDFastError, match="seen is no longer finite"):
        run.fit(BATCHES)
    assert all(map(finite, (tmp_path / "checkpoints").iterdir()))


def test_sums_that_overflow_are_no_fault() -> None:
    huge = torch.full((4,), 1.7e308, dtype=torch.float64)
    assert first_not_finite({"a": huge, "b": [torch.ones(2), torch.arange(3)]}) is None
    assert first_not_finite({"a": huge, "b": {"c": torch.tensor([1.0, float("inf")])}}) == "b.c"


@pytest.mark.parametrize("number", ["SIGHUP", "SIGUSR1", "SIGUSR2", "SIGTERM", "SIGINT"])
def test_every_warning_writes_a_checkpoint(
    tmp_path: Path, number: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = getattr(signal, number)
    before = signal.signal(sent, signal.default_int_handler)
    try:
        run = trainer(tmp_path, lambda call, _: (os.kill(os.getpid(), sent), 1.0)[1] if call == 3 else 1.0)
        with pytest.raises(TrainingInterrupted) as caught:
            run.fit(BATCHES)
    finally:
        signal.signal(sent, before)
    assert caught.value.signal == sent
    assert load_checkpoint(tmp_path / "checkpoints").step == 3


def test_an_intact_older_checkpoint_is_offered(tmp_path: Path) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, {"model": {"a": torch.ones(2)}}, step=step)
    (tmp_path / "step-00000002" / "model.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"step-00000002.*; .*step-00000001 is intact: remove"):
        load_checkpoint(latest_checkpoint(tmp_path) or "")


def edited(folder: Path, **changes: Any) -> None:
    path = folder / "checkpoint.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"files": []}, "files: got"),
        ({"files": {"states.json": {}}}, "lacks bytes"),
        ({"files": {"states.json": 3}}, "states.json: got 3"),
        ({"files": {}}, r"lacks states\.json"),
        ({"files": {"states.json": {"bytes": 1, "sha256": ""}, "/dev/zero": {}}}, "accepted|bytes"),
        ({"files": {"../secret.safetensors": {"bytes": 1, "sha256": ""}}}, "lacks|accepted"),
        ({"step": None}, "step"),
        ({"step": -1}, "step"),
        ({"step": True}, "step"),
        ({"info": [1]}, "info"),
        ({"version": [1]}, "version"),
    ],
    ids=str,
)
def test_a_wrong_value_in_a_checkpoint_is_named(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = save_checkpoint(tmp_path, {"model": {"a": torch.ones(2)}}, step=1)
    edited(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(folder)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    config = ModelConfig("resnet8", 3, 16, classes=("a", "b", "c"))
    return save_model(tmp_path / "run", create_model("resnet8", 3), config)


def test_the_named_weights_are_loaded_and_no_others(saved: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    best = {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    save_file(best, saved / "best.safetensors")
    loaded = load_model(saved / "best.safetensors").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in best.items())
    for name in ("ema.pth", "other.bin", "x.pt", "config.json"):
        if name != "config.json":
            (saved / name).write_bytes(b"x")
        with pytest.raises(CheckpointError, match=rf"{name}: is no \.safetensors file"):
            load_model(saved / name)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_wrappers_prefixes_are_understood(saved: Path, prefix: str) -> None:
    weights = load_file(saved / "model.safetensors")
    save_file({prefix + name: tensor for name, tensor in weights.items()}, saved / "model.safetensors")
    loaded = load_model(saved).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize(
    "changes",
    [
        {"model": None},
        {"model": 3},
        {"image_size": "16"},
        {"image_size": 0},
        {"image_size": 10**12},
        {"std": [0, 0, 0]},
        {"std": [1, 1]},
        {"std": "x"},
        {"std": [1, 1, None]},
        {"mean": [0, 0]},
        {"mean": 0.5},
        {"mean": [True, 0, 0]},
        {"classes": "abc"},
        {"classes": [1, 2, 3]},
        {"classes": ["a", "b", "c", "d"]},
        {"num_classes": "3"},
        {"num_classes": 10**9},
        {"in_channels": 0},
        {"options": [1]},
    ],
    ids=str,
)
def test_a_wrong_value_in_a_config_is_named(saved: Path, changes: dict[str, Any]) -> None:
    path = saved / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointError, match=rf"config\.json: {next(iter(changes))}"):
        load_model_config(saved)

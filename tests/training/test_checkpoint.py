"""Checkpoints: what goes in comes out, a crash leaves the old one, damage is named."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kdfast.errors import CheckpointError
from kdfast.models import create_model
from kdfast.training import (
    ModelConfig,
    TrainResult,
    files,
    latest_checkpoint,
    load_checkpoint,
    load_model,
    load_model_config,
    save_checkpoint,
    save_model,
)
from kdfast.training.rng import rng_state, set_rng_state
from kdfast.training.state import flatten, unflatten


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))  # type: ignore[arg-type]
    return type(a) is type(b) and (a == b or (a != a and b != b))


leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5)
    | st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool]).map(
        lambda dtype: torch.arange(6).reshape(2, 3).to(dtype)
    )
    | st.just(torch.tensor(2.5))
    | st.just(np.arange(3, dtype=np.uint32))
)
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(trees)
@settings(deadline=None, max_examples=150)
def test_any_state_survives_json_and_safetensors(tree: object) -> None:
    document, tensors = flatten(tree)
    document = json.loads(json.dumps(document))
    tensors = safetensors.torch.load(safetensors.torch.save(tensors))
    assert same(unflatten(document, tensors), tree)


def test_a_state_that_only_pickle_could_write_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"optimizer\.hooks\.1: a function"):
        save_checkpoint(tmp_path, {"optimizer": {"hooks": [1, lambda: 0]}}, step=1)
    assert list(tmp_path.iterdir()) == []


def test_tied_weights_and_views_each_get_their_own_bytes(tmp_path: Path) -> None:
    weight = torch.arange(12.0).reshape(3, 4)
    state = {"a": weight, "b": weight, "row": weight[1], "t": weight.T}
    loaded = load_checkpoint(save_checkpoint(tmp_path, {"model": state}, step=1)).states["model"]
    assert same(loaded, state)


def test_random_states_come_back(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, {"rng": rng_state()}, step=0)
    expected = (torch.rand(3), np.random.rand(3))
    torch.rand(7), np.random.rand(5)
    set_rng_state(load_checkpoint(path).states["rng"])
    assert same((torch.rand(3), np.random.rand(3)), expected)


def test_the_last_two_stay_and_the_latest_is_found(tmp_path: Path) -> None:
    for step in (5, 20, 100):
        save_checkpoint(tmp_path, {"x": {"v": step}}, step=step, info={"epoch": step}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000020", "step-00000100"]
    assert latest_checkpoint(tmp_path) == tmp_path / "step-00000100"
    found = load_checkpoint(tmp_path)
    assert (found.step, found.states["x"]["v"], found.info["epoch"]) == (100, 100, 100)


def test_writing_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    for value in (1, 2):
        save_checkpoint(tmp_path, {"x": value}, step=3)
    assert load_checkpoint(tmp_path).states["x"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_no_checkpoint_is_not_an_empty_one(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "none") is None
    with pytest.raises(CheckpointError, match="does not exist"):
        load_checkpoint(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"holds no checkpoint\.json"):
        load_checkpoint(tmp_path)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    states = {"model": {"w": torch.arange(1000.0)}, "place": {"epoch": 3}}
    return save_checkpoint(tmp_path, states, step=7)


@pytest.mark.parametrize("name", ["model.safetensors", "states.json"])
@pytest.mark.parametrize("damage", ["missing", "short", "flipped"])
def test_damage_is_named(written: Path, name: str, damage: str) -> None:
    file = written / name
    data = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "short":
        file.write_bytes(data[:-3])
    else:
        data[-3] ^= 1
        file.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{name}: is (missing|damaged)"):
        load_checkpoint(written)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "cannot be read as JSON"), ("[]", "a JSON list"), ('{"format": "x"}', "not the manifest")],
)
def test_a_bad_manifest_is_named(written: Path, text: str, message: str) -> None:
    (written / "checkpoint.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(written)


def test_a_newer_version_is_refused(written: Path) -> None:
    manifest = json.loads((written / "checkpoint.json").read_text())
    (written / "checkpoint.json").write_text(json.dumps({**manifest, "version": 99}))
    with pytest.raises(CheckpointError, match="version 99"):
        load_checkpoint(written)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_full_disk_leaves_the_old_checkpoint(
    written: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def fail(path: Path) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patched:
        patched.setattr(files, "sync_file", fail)
        with pytest.raises(
            CheckpointError, match="disk is full" if code == errno.ENOSPC else "cannot be written"
        ):
            save_checkpoint(written.parent, {"x": 1}, step=8)
    assert [path.name for path in written.parent.iterdir()] == [written.name]
    assert load_checkpoint(written.parent).step == 7


def test_a_full_disk_inside_safetensors_is_recognised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise safetensors.SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        )

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(CheckpointError, match="disk is full"):
        save_checkpoint(tmp_path, {"x": torch.ones(2)}, step=1)


def test_a_leftover_of_a_killed_writer_is_swept(tmp_path: Path) -> None:
    (tmp_path / ".tmp-123-step-00000001").mkdir(parents=True)
    save_checkpoint(tmp_path, {"x": 1}, step=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


CONFIG = ModelConfig("resnet8", 10, 16, (0.1, 0.2, 0.3), (1.0, 1.0, 1.0), classes=("a", "b"))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_model(tmp_path / "run", CONFIG.build(), CONFIG)


def test_a_model_comes_back(saved: Path) -> None:
    network, again = CONFIG.build().eval(), load_model(saved)
    network.load_state_dict(again.state_dict())
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(network(images), again(images))
    assert not again.training
    assert load_model_config(saved) == load_model_config(saved / "model.safetensors") == CONFIG


def test_a_model_loads_without_kdfast(saved: Path) -> None:
    network = create_model("resnet8", 10)
    network.load_state_dict(safetensors.torch.load_file(saved / "model.safetensors"))


def test_tied_model_weights_are_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    network[1].weight = network[0].weight
    save_model(tmp_path, network, CONFIG)
    assert set(safetensors.torch.load_file(tmp_path / "model.safetensors")) == set(network.state_dict())


def damage_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"not safetensors")


def change_config(folder: Path, **values: object) -> None:
    document = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**document, **values}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (damage_weights, "model.safetensors: is not a readable safetensors"),
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors: does not exist"),
        (lambda f: (f / "config.json").unlink(), "holds no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "config.json: cannot be read as JSON"),
        (lambda f: change_config(f, num_classes=7), "model.safetensors: does not fit 'resnet8'"),
        (lambda f: change_config(f, model="resnet9"), "unknown model 'resnet9'"),
        (lambda f: change_config(f, sizes=1), "unknown keys sizes"),
    ],
)
def test_an_unreadable_model_is_named(saved: Path, spoil: object, message: str) -> None:
    spoil(saved)  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=message):
        load_model(saved)


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: does not exist"):
        load_model(tmp_path / "nowhere")


def test_a_checkpoint_prints_as_a_line(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, {"model": {"w": torch.zeros(9)}, "rng": {}}, step=1200)
    assert repr(load_checkpoint(path)) == f"Checkpoint('{path}': step 1,200, states model, rng)"


def test_a_result_prints_as_a_line() -> None:
    result = TrainResult(torch.nn.Sequential(torch.nn.Linear(2, 2)), {"accuracy": 0.5}, 1200, 48000, 3.25)
    assert repr(result) == "TrainResult(Sequential: 1,200 steps, 48,000 images, 3.2 s, accuracy 0.5)"

"""``kdfast export``: files that give the network's own logits, in a process that has never seen kdfast."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import kdfast
from kdfast.cli.app import app
from kdfast.data import load_dataset
from kdfast.errors import ConfigError, KDFastError, MissingExtraError
from kdfast.experiments.export import run as exporting
from kdfast.models import create_model
from kdfast.training import ModelConfig, load_model, save_model

ROOT = Path(__file__).parents[2]
CLASSES = ("ant", "bee", "cat")
READ = {
    "torchscript": "network = torch.jit.load(sys.argv[1])",
    "torch.export": "network = torch.export.load(sys.argv[1]).module()",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with weights, and others that measured better."""
    folder = tmp_path_factory.mktemp("runs") / "student"
    config = ModelConfig("resnet8", 3, 16, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), classes=CLASSES)
    torch.manual_seed(1)
    save_model(folder, create_model("resnet8", 3), config)
    (folder / "model.safetensors").rename(folder / "best.safetensors")
    save_model(folder, create_model("resnet8", 3), config)
    return folder


@pytest.mark.parametrize("to", READ)
@pytest.mark.parametrize("weights", ["last", "best"])
def test_files_run_without_kdfast(finished: Path, tmp_path: Path, to: str, weights: str) -> None:
    result = kdfast.export(finished, to=to, weights=weights, out=tmp_path)
    images = torch.randn(5, 3, 16, 16)
    torch.save(images, tmp_path / "images")
    script = f"""
import sys, torch
{READ[to]}
torch.save(network(torch.load(sys.argv[2])), sys.argv[3])
assert not [name for name in sys.modules if name.startswith("kdfast")]
"""
    words = [sys.executable, "-c", script, result["file"], *(str(tmp_path / n) for n in ("images", "out"))]
    subprocess.run(words, check=True, cwd=tmp_path)
    source = finished / ("best.safetensors" if weights == "best" else "model.safetensors")
    torch.testing.assert_close(torch.load(tmp_path / "out"), load_model(source)(images))
    other = finished / ("model.safetensors" if weights == "best" else "best.safetensors")
    assert not torch.allclose(torch.load(tmp_path / "out"), load_model(other)(images))


def test_weights_alone_say_what_prepares_their_images(finished: Path, tmp_path: Path) -> None:
    from safetensors import safe_open

    result = kdfast.export(finished, to="safetensors", out=tmp_path)
    with safe_open(result["file"], "pt") as opened:
        facts = json.loads(opened.metadata()["preprocess"])
    assert facts == json.loads((tmp_path / "preprocess.json").read_text())
    assert (facts["classes"], facts["mean"], facts["centre_crop"]) == (list(CLASSES), [0.4, 0.5, 0.6], 16)


def test_onnx_runs_elsewhere(finished: Path, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    result = kdfast.export(finished, to="onnx", out=tmp_path)
    session = runtime.InferenceSession(result["file"])
    images = torch.randn(5, 3, 16, 16)
    found = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    torch.testing.assert_close(found, load_model(finished)(images), rtol=1e-4, atol=1e-5)
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == list(CLASSES)


def test_the_page_prepares_a_picture_as_training_did(tmp_path: Path) -> None:
    """The functions of the page, run on a picture that has to be turned, shrunk and cropped."""
    page = (ROOT / "docs" / "pages" / "inference.md").read_text()
    code = next(block for block in re.findall(r"```python\n(.*?)```", page, re.S) if "def prepare" in block)
    scope: dict[str, Any] = {}
    exec(code, scope)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    for name in ("a", "b"):
        (tmp_path / "set" / name).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / "set" / name / "1.png")
    image, _ = load_dataset(tmp_path / "set", image_size=16)[0]
    facts = {"centre_crop": 16, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]}
    mean, std = (torch.tensor(facts[name]).view(-1, 1, 1) for name in ("mean", "std"))
    prepared = scope["prepare"](Image.open(tmp_path / "set" / "a" / "1.png"), facts)
    torch.testing.assert_close(prepared[0], (image / 255 - mean) / std)
    config = ModelConfig("resnet8", 2, 16, tuple(facts["mean"]), tuple(facts["std"]), classes=("a", "b"))
    save_model(tmp_path / "run", create_model("resnet8", 2), config)
    file = kdfast.export(tmp_path / "run", to="torch.export")["file"]
    picture = Image.open(tmp_path / "set" / "a" / "1.png")
    name, sure = scope["classify"](file, tmp_path / "run" / "export" / "preprocess.json", picture)
    expected = load_model(tmp_path / "run")(prepared).softmax(1)[0]
    assert (name, sure) == ("ab"[int(expected.argmax())], pytest.approx(float(expected.max())))


def test_a_file_that_gives_other_logits_is_refused(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(exporting._WRITERS, "torchscript", lambda *_: lambda images: torch.zeros(3, 3))
    with pytest.raises(KDFastError, match="gives other logits"):
        kdfast.export(finished, to="torchscript", out=tmp_path)


def test_refusals(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="to: got 'tflite', accepted: 'safetensors', 'torchscript'"):
        kdfast.export(finished, to="tflite")
    save_model(tmp_path / "run", create_model("resnet8", 2), ModelConfig("resnet8", 2, 16))
    with pytest.raises(ConfigError, match=r"holds no best\.safetensors"):
        kdfast.export(tmp_path / "run", to="torchscript", weights="best")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingExtraError, match=r"pip install \"kdfast\[export\]\""):
        kdfast.export(tmp_path / "run", to="onnx")
    result = CliRunner().invoke(app, ["export", str(tmp_path / "none"), "--to", "torchscript"])
    assert (result.exit_code, "does not exist" in result.output) == (1, True)


def test_the_command_says_where_the_files_are(finished: Path, tmp_path: Path) -> None:
    words = ["export", str(finished), "--to", "safetensors", "--out", str(tmp_path / "there"), "--json"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert Path(json.loads(result.output)["file"]) == tmp_path / "there" / "model.safetensors"

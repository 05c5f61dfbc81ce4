"""`kdfast synth` without a network: shaders, leaves, GLSL and noise, through the writer, by rank, resumed."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from kdfast.cli.app import app
from kdfast.data import ShardLoader, read_manifest, surrogate
from kdfast.data.surrogate.leaves import leaves as draw_leaves
from kdfast.errors import ConfigError, DataError, MissingExtraError, ShardError
from kdfast.experiments.synth import procedural as synth_procedural
from kdfast.experiments.synth import run as synth
from tests.data.test_glsl import BROKEN, CONVENTIONS, folder_of, needs_egl

SMALL = {"images": 14, "image_size": 8, "batch_size": 4, "samples_per_shard": 6, "image_format": "png"}


def config(out: Path, source: str, **values: Any) -> synth.SynthConfig:
    settings: dict[str, Any] = {"source": source, "device": "cpu", "progress": False, **SMALL, **values}
    return synth.SynthConfig(out=str(out), **settings)


def images_of(folder: Path) -> torch.Tensor:
    with ShardLoader(folder, 1000, shuffle=False, loader="torch") as loader:
        found: torch.Tensor = next(iter(loader))[0]
    return (found * 255).round().to(torch.uint8)


def rank(number: int, world: int) -> Any:
    return SimpleNamespace(
        process_index=number, num_processes=world, is_main_process=number == 0, device=torch.device("cpu")
    )


def files(folder: Path) -> dict[str, bytes]:
    return {
        p.name: p.read_bytes()
        for p in sorted(folder.iterdir())
        if p.suffix in (".tar", ".idx", ".json", ".png")
    }


def quiet(done: int, total: int) -> None:
    pass


def test_shaders_with_their_programs_and_a_sheet(tmp_path: Path) -> None:
    result = synth.run(config(tmp_path, "shaders", programs=5, seed=2))
    assert (result["images"], result["refused"]) == (14, 0)
    assert json.loads((tmp_path / "metrics.json").read_text()) == result
    assert torch.equal(images_of(tmp_path), surrogate.shaders(14, (8, 8), seed=2, programs=5))
    programs = surrogate.load_programs(tmp_path / "programs.json")
    assert programs == surrogate.random_programs(5, seed=2)
    manifest = read_manifest(tmp_path)
    assert manifest.complete
    assert (manifest.num_classes, manifest.num_samples) == (10, 14)
    facts = {"generator": "shaders", "seed": 2, "image_size": 8, "programs": 5, "antialias": 2}
    assert facts.items() <= manifest.metadata.items()
    sheet = np.asarray(Image.open(tmp_path / "samples.png"))
    assert sheet.shape == (
        2 * 12 * 9 - 12,
        12 * 12 * 9 - 12,
        4,
    )  # 12 a row, each pixel a square of 12, gaps of one
    corner = images_of(tmp_path)[0, :, 0, 0].tolist()
    assert sheet[5, 5].tolist() == [*corner, 255]


def test_a_set_is_rendered_again_from_its_programs(tmp_path: Path) -> None:
    synth.run(config(tmp_path / "first", "shaders", programs=4))
    file = tmp_path / "first" / "programs.json"
    synth.run(config(tmp_path / "again", "shaders", programs_file=str(file), seed=9))
    assert torch.equal(images_of(tmp_path / "first"), images_of(tmp_path / "again"))
    larger = config(tmp_path / "large", "shaders", programs_file=str(file), image_size=16)
    synth.run(larger)
    assert images_of(tmp_path / "large").shape[-1] == 16


def test_leaves(tmp_path: Path) -> None:
    synth.run(config(tmp_path, "leaves", seed=3, leaves=40, image_format="png"))
    assert torch.equal(images_of(tmp_path), draw_leaves(14, (8, 8), seed=3, limit=40))
    assert read_manifest(tmp_path).metadata["leaves"] == 40
    assert (tmp_path / "samples.png").exists()
    assert not (tmp_path / "programs.json").exists()


@needs_egl
def test_glsl_and_what_was_left_out(tmp_path: Path) -> None:
    shaders = folder_of(tmp_path / "in", {"good.frag": CONVENTIONS["geekest"], "bad.frag": BROKEN})
    result = synth.run(config(tmp_path / "out", "glsl", folder=str(shaders), seconds=4))
    assert result["refused"] == 1
    assert result["left_out"][0].startswith("bad.frag:3: ")
    manifest = read_manifest(tmp_path / "out")
    assert list(manifest.metadata["files"]) == ["good.frag"]
    assert "seed" not in manifest.metadata
    (shaders / "good.frag").write_text(CONVENTIONS["geeker"])
    with pytest.raises(ShardError, match="belongs to another run"):
        synth.run(config(tmp_path / "out", "glsl", folder=str(shaders), seconds=4, resume=True))


@pytest.mark.parametrize("source", ["shaders", "leaves", "noise"])
def test_ranks_write_the_set_that_one_process_writes(tmp_path: Path, source: str) -> None:
    whole, shared = (config(tmp_path / name, source, programs=5, leaves=30) for name in ("whole", "shared"))
    synth_procedural.write(whole, rank(0, 1), quiet)
    counted = []
    for number in (1, 2, 0):  # the last of four has no shard to write
        written, _, complete = synth_procedural.write(shared, rank(number, 4), quiet)
        counted.append((written, complete))
    written, _, complete = synth_procedural.write(shared, rank(3, 4), quiet)
    assert [done for _, done in counted] == [False, False, False]
    assert complete
    assert sum(count for count, _ in counted) + written == 14
    assert files(tmp_path / "whole") == files(tmp_path / "shared")


@pytest.mark.parametrize("source", ["shaders", "leaves"])
def test_a_stopped_run_resumes_to_the_same_set(tmp_path: Path, source: str) -> None:
    class Stop(Exception):
        pass

    synth.run(config(tmp_path / "whole", source, programs=5, leaves=30))

    def stop(done: int, total: int) -> None:
        if done >= 8:
            raise Stop

    stopped = config(tmp_path / "stopped", source, programs=5, leaves=30)
    with pytest.raises(Stop):
        synth_procedural.write(stopped, rank(0, 1), stop)
    assert read_manifest(tmp_path / "stopped").num_samples == 6
    with pytest.raises(ShardError, match="resume=True"):
        synth.run(stopped)
    synth.run(config(tmp_path / "stopped", source, programs=5, leaves=30, resume=True))
    whole, again = files(tmp_path / "whole"), files(tmp_path / "stopped")
    del whole["metrics.json"], again["metrics.json"]
    assert whole == again


def test_a_finished_set_grows(tmp_path: Path) -> None:
    synth.run(config(tmp_path, "shaders", programs=20))
    first = (tmp_path / "shard-000000.tar").read_bytes()
    synth.run(config(tmp_path, "shaders", programs=20, images=18, extend=True))
    assert (tmp_path / "shard-000000.tar").read_bytes() == first
    assert read_manifest(tmp_path).num_samples == 18
    assert json.loads((tmp_path / "metrics.json").read_text())["images"] == 18
    assert torch.equal(images_of(tmp_path), surrogate.shaders(18, (8, 8), programs=20))
    assert len(surrogate.load_programs(tmp_path / "programs.json")) == 18
    with pytest.raises(ShardError, match="antialias is 2 there, 1 here"):
        synth.run(config(tmp_path, "shaders", programs=20, antialias=1, images=20, extend=True))


def test_a_set_grows_on_purpose_only(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"extend: got true, but .* holds no set yet"):
        synth.run(config(tmp_path, "noise", extend=True))
    synth.run(config(tmp_path, "noise"))
    before = files(tmp_path)
    for size in (13, 15):
        with pytest.raises(ConfigError, match=rf"images: got {size}, accepted: 14, .* --extend grows it"):
            synth.run(config(tmp_path, "noise", images=size, resume=True))
    for size in (13, 14):
        with pytest.raises(ConfigError, match=rf"images: got {size}, accepted with extend: above 14"):
            synth.run(config(tmp_path, "noise", images=size, extend=True))
    assert files(tmp_path) == before
    words = ["--out", str(tmp_path), "--images", "20", "--extend", "-q", "noise=uniform", "image_size=8"]
    words += ["samples_per_shard=6", "batch_size=4", "image_format=png"]
    result = CliRunner().invoke(app, ["synth", "--source", "noise", *words])
    assert result.exit_code == 0, result.output
    whole = config(tmp_path / "whole", "noise", images=20)
    synth.run(whole)
    assert torch.equal(images_of(tmp_path), images_of(tmp_path / "whole"))


def test_every_flag_changes_the_images(tmp_path: Path) -> None:
    made = {}
    for name, source, values in (
        ("plain", "shaders", {}),
        ("seed", "shaders", {"seed": 1}),
        ("programs", "shaders", {"programs": 3}),
        ("antialias", "shaders", {"antialias": 1}),
        ("image_size", "shaders", {"image_size": 9}),
        ("leaves", "leaves", {}),
        ("fewer", "leaves", {"leaves": 3}),
    ):
        synth.run(config(tmp_path / name, source, sheet=False, **values))
        made[name] = read_manifest(tmp_path / name).shards[-1].sha256
        assert not (tmp_path / name / "samples.png").exists()
    assert len(set(made.values())) == len(made)


def test_without_matplotlib_it_is_said_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.image", None)
    with pytest.raises(MissingExtraError, match=r"sheet=false.*kdfast\[report\]"):
        synth.run(config(tmp_path / "a", "leaves"))
    synth.run(config(tmp_path / "b", "leaves", leaves=5, sheet=False))


def test_refusals(tmp_path: Path) -> None:
    for values, match in (
        ({"source": "glsl"}, "folder: missing; source=glsl needs"),
        (
            {"source": "leaves", "folder": "x"},
            "folder: got x, but source=leaves reads none; accepted with glsl",
        ),
        ({"source": "leaves", "programs_file": "x"}, "programs_file: got x, .*; accepted with shaders"),
    ):
        with pytest.raises(ConfigError, match=match):
            config(tmp_path, **values)
    with pytest.raises(DataError, match="cannot be read"):
        synth.run(config(tmp_path / "set", "shaders", programs_file=str(tmp_path / "missing.json")))
    with pytest.raises(DataError, match="does not exist"):
        synth.run(config(tmp_path / "set", "glsl", folder=str(tmp_path / "missing")))
    assert not (tmp_path / "set").exists()

"""`kdfast label`, and students that learn from what it stored: the same losses, the same views, no teacher."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from kdfast import commands
from kdfast.cli.app import app
from kdfast.data import ShardLoader, ShardWriter
from kdfast.errors import CheckpointError, ConfigError, DataError
from kdfast.experiments.common.networks import load_teacher
from kdfast.experiments.common.opening import parameters_of
from kdfast.experiments.common.recipe import load_recipe
from kdfast.experiments.common.stored_labels import HEADER, TENSORS, StoredLabels, Views
from kdfast.experiments.distill import run as distill
from kdfast.experiments.distill.stored import METHODS
from kdfast.models import create_model
from kdfast.training.model_io import ModelConfig, save_model
from tests.data.test_splits import classes_of
from tests.support.shards import pictures

CLASSES = 5
NAMES = tuple("abcde")
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
SHORT: dict[str, Any] = {
    "student": "resnet8",
    "epochs": 1,
    "batch_size": 16,
    "lr": 0.01,
    "tensorboard": False,
    "loader": "torch",
    "device": "cpu",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of shards, and a teacher of the same classes."""
    root = tmp_path_factory.mktemp("label")
    with ShardWriter(root / "set", samples_per_shard=16, image_format="png", num_classes=CLASSES) as writer:
        writer.write(pictures(40, 12), torch.arange(40) % CLASSES)
    torch.manual_seed(3)
    network = create_model("resnet8", CLASSES)
    for parameter in network.parameters():  # of fresh weights the outputs hardly differ
        parameter.data.mul_(1.5)
    save_model(root / "teacher", network, ModelConfig("resnet8", CLASSES, 12, MEAN, STD, classes=NAMES))
    return root


def label(made: Path, out: Path, *words: str, data: str = "set") -> Result:
    arguments = ["label", str(made / data), str(made / "teacher"), "--out", str(out), "-q", "--json"]
    return CliRunner().invoke(app, [*arguments, "loader=torch", "device=cpu", *words])


def labelled(made: Path, out: Path, *words: str, data: str = "set") -> StoredLabels:
    result = label(made, out, *words, data=data)
    assert result.exit_code == 0, result.output
    said = json.loads(result.output)
    assert said["bytes"] == (out / HEADER).stat().st_size + (out / TENSORS).stat().st_size
    return StoredLabels(out)


def everything(made: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """All images in [0, 1] and their numbers, in order."""
    with ShardLoader(made / "set", 40, shuffle=False, loader="torch", records=True) as loader:
        (batch,) = loader
    return batch


def asked(made: Path, images: torch.Tensor) -> torch.Tensor:
    """What the teacher itself says of images in [0, 1]."""
    network, described = load_teacher(str(made / "teacher"))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (described.mean, described.std))
    with torch.no_grad():
        return network((images - mean) / std)  # type: ignore[no-any-return]


def test_what_is_stored_is_what_the_teacher_says(made: Path, tmp_path: Path) -> None:
    stored = labelled(made, tmp_path / "l")
    images, rows = everything(made)
    assert rows.tolist() == list(range(40))
    found = stored.outputs(rows, torch.zeros_like(rows))
    torch.testing.assert_close(found, asked(made, images), rtol=1e-3, atol=1e-3)
    assert found.std(0).min() > 0.01, "a teacher that says the same of every image tells nothing"
    assert stored.seen(images, rows, torch.zeros_like(rows)) is images
    assert stored.described.classes == NAMES


def test_every_view_is_labelled_as_the_student_will_see_it(made: Path, tmp_path: Path) -> None:
    stored = labelled(made, tmp_path / "l", "--views", "3", "augment=[crop,flip]", "batch_size=7")
    images, rows = everything(made)
    differing = 0
    order = torch.randperm(40)  # batches of another composition than the teacher's
    for view in range(3):
        which = torch.full_like(rows, view)
        seen = stored.seen(images[order], rows[order], which)
        torch.testing.assert_close(
            stored.outputs(rows[order], which), asked(made, seen), rtol=1e-3, atol=1e-3
        )
        differing += int((seen != images[order]).flatten(1).any(1).sum())
    assert differing > 100
    offsets, flips = Views(1, ("crop", "flip"), 0).draws(4000, 0)
    assert offsets.min() == 0
    assert offsets.max() == 8
    assert 0.45 < flips.float().mean() < 0.55
    assert not Views(1, ("flip",), 0).draws(100, 0)[0].any()
    assert not Views(1, ("crop",), 0).draws(100, 0)[1].any()


def test_the_largest_outputs_and_the_mass_of_the_others(made: Path, tmp_path: Path) -> None:
    images, rows = everything(made)
    kept = labelled(made, tmp_path / "two", "--top-k", "2", "temperature=3")
    wanted = (asked(made, images) / 3).softmax(1)
    found = (kept.outputs(rows, torch.zeros_like(rows)) / 3).softmax(1)
    top = wanted.topk(2, 1)
    torch.testing.assert_close(found.gather(1, top.indices), top.values, rtol=2e-3, atol=1e-4)
    rest = (1 - top.values.sum(1, keepdim=True)) / (CLASSES - 2)
    others = found.scatter(1, top.indices, 0.0)
    torch.testing.assert_close(
        others, rest.expand(-1, CLASSES).scatter(1, top.indices, 0.0), rtol=5e-3, atol=1e-4
    )
    every = labelled(made, tmp_path / "five", "--top-k", str(CLASSES))
    torch.testing.assert_close(
        every.outputs(rows, torch.zeros_like(rows)).softmax(1),
        asked(made, images).softmax(1),
        rtol=3e-3,
        atol=1e-4,
    )


PLAIN: dict[str, dict[str, Any]] = {
    "dmkd": {"cutmix_alpha": None},
    "surrogate": {"regime": "none", "mixup": False},
    "kd": {},
    "dkd": {},
    "dist": {},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_student_learns_the_same_without_the_teacher(made: Path, tmp_path: Path, method: str) -> None:
    """The loss of the same batch, with float16's rounding between; the teacher's folder is not even there."""
    shutil.copytree(made / "set", tmp_path / "set")
    result = label(made, tmp_path / "set")
    assert result.exit_code == 0, result.output
    values = {**SHORT, "method": method, "data": str(tmp_path / "set"), **PLAIN[method]}
    config, own = distill.parse({**values, "teacher": str(made / "teacher")})
    wanted = distill.run(config, own, tmp_path / "t", dry_run=True, progress=False)
    hidden = made / "teacher"
    hidden.rename(made / "gone")
    try:
        config, own = distill.parse({**values, "labels": "stored"})
        assert (config.teacher, config.labels_from) == (str(hidden), str(tmp_path / "set"))
        found = distill.run(config, own, tmp_path / "s", dry_run=True, progress=False)
        metrics = distill.run(config, own, tmp_path / "s", progress=False)
    finally:
        (made / "gone").rename(hidden)
    assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-2)
    assert metrics["steps"] == 3
    if method in ("dmkd", "surrogate"):  # what a report plots against
        assert metrics["settings"].items() >= {"student": "resnet8", "images": 40}.items()
    assert metrics["teacher_parameters"] == parameters_of(load_teacher(str(made / "teacher"))[0])
    again, _ = distill.parse(load_recipe(tmp_path / "s" / "recipe.yaml"))  # what was written down runs again
    assert again == config


def test_labels_of_a_folder_and_of_several_views_in_a_shell(made: Path, tmp_path: Path) -> None:
    data = classes_of(tmp_path / "pictures", 16)
    said = commands.label(
        data=data,
        teacher=made / "teacher",
        out=tmp_path / "l",
        views=2,
        augment=["flip"],
        progress=False,
        device="cpu",
    )
    assert (said["images"], said["views"]) == (32, 2)
    words = [f"{key}={value}" for key, value in SHORT.items()]
    words += ["method=kd", f"data={data}", f"labels_from={tmp_path / 'l'}"]
    result = CliRunner().invoke(app, ["distill", "--out", str(tmp_path / "run"), "-q", "--json", *words])
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["steps"] == 2


def values(made: Path, labels: Path, **changed: Any) -> dict[str, Any]:
    base = {**SHORT, "method": "dmkd", "cutmix_alpha": None, "data": str(made / "set")}
    return {**base, "labels_from": str(labels), **changed}


def refused(made: Path, labels: Path, **changed: Any) -> Any:
    given = {k: v for k, v in values(made, labels, **changed).items() if v != "left out"}
    return distill.run(*distill.parse(given), labels.parent / "run", dry_run=True, progress=False)


def test_what_stored_labels_cannot_serve_is_refused(made: Path, tmp_path: Path) -> None:
    plain, viewed = tmp_path / "plain", tmp_path / "viewed"
    labelled(made, plain)
    labelled(made, viewed, "augment=[crop]")
    assert refused(made, plain)["loss"] > 0
    assert refused(made, plain, augment=["flip"])["loss"] > 0
    with pytest.raises(ConfigError, match=r"cutmix_alpha: got 0\.25, accepted with stored labels: null"):
        refused(made, plain, cutmix_alpha=0.25)
    with pytest.raises(ConfigError, match=r"mixup: got true, .*; attack: got true.*; regime: got high"):
        refused(made, plain, method="surrogate", cutmix_alpha="left out", attack=True)
    with pytest.raises(ConfigError, match=r"stored for method at, which needs the teacher itself"):
        refused(made, plain, method="at")
    with pytest.raises(
        ConfigError, match=r"augment: got flip, accepted: none; .* augmented already, by crop"
    ):
        refused(made, viewed, augment=["flip"])
    with pytest.raises(ConfigError, match=r"image_size: got 8, accepted: 12"):
        refused(made, viewed, image_size=8)
    with pytest.raises(ConfigError, match=r"teacher: got runs/other, accepted: .*teacher, whose outputs"):
        refused(made, plain, teacher="runs/other")
    with pytest.raises(ConfigError, match=r"labels: got stored without data"):
        distill.parse({"method": "kd", "student": "resnet8", "labels": "stored"})
    with pytest.raises(CheckpointError, match=rf"holds no {HEADER}; kdfast label"):
        distill.parse({**SHORT, "method": "kd", "data": str(made / "set"), "labels": "stored"})


def test_labels_of_other_images_are_refused(made: Path, tmp_path: Path) -> None:
    labelled(made, tmp_path / "l")
    with ShardWriter(
        tmp_path / "other", samples_per_shard=16, image_format="png", num_classes=CLASSES
    ) as writer:
        writer.write(pictures(41, 12), torch.arange(41) % CLASSES)
    with pytest.raises(DataError, match=r"are of 40 images of .*set at side 12, which are not the 41"):
        refused(made, tmp_path / "l", data=str(tmp_path / "other"))
    assert (
        refused(made, tmp_path / "l", data_images=24)["loss"] > 0
    )  # the first of a set go by the same numbers


def test_damaged_labels_are_told_of(made: Path, tmp_path: Path) -> None:
    labelled(made, tmp_path / "l")
    header = json.loads((tmp_path / "l" / HEADER).read_text())

    def told(match: str, **changed: Any) -> None:
        (tmp_path / "l" / HEADER).write_text(json.dumps({**header, **changed}))
        with pytest.raises(CheckpointError, match=match):
            StoredLabels(tmp_path / "l").outputs(torch.zeros(1).long(), torch.zeros(1).long())

    told("is not the header of kdfast's labels", format="x")
    told("has version 9; this kdfast reads version 1", version=9)
    told("images", images=0)
    told(r"augment: got .*accepted: crop, flip, not zoom", augment=["zoom"])
    told(r"network.*lacks model", network={"num_classes": 5, "image_size": 12})
    told(r"holds .*\(40, 1, 5\).*, expected .*\(41, 1, 5\)", images=41)
    told("temperature", temperature=0)
    told(r"expected \{'indices'", top_k=2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--views", "2"], "views: got 2 without augment, accepted: 1, or augment=[crop,flip]"),
        (["temperature=4"], "temperature: got 4 without top_k, accepted: 1"),
        (["--top-k", "6"], "top_k: got 6, accepted: 1 to the teacher's 5 classes"),
        (["augment=[erase]"], "augment: got 'erase', accepted: 'crop' or 'flip'"),
        (["viws=3"], "unknown key 'viws' (did you mean 'views'?)"),
    ],
)
def test_what_label_refuses(made: Path, tmp_path: Path, words: list[str], message: str) -> None:
    result = label(made, tmp_path / "l", *words)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "l" / HEADER).exists()


def test_labels_are_not_written_over_and_need_a_place(made: Path, tmp_path: Path) -> None:
    labelled(made, tmp_path / "l")
    result = label(made, tmp_path / "l")
    assert result.exit_code == 2
    assert "holds labels already, accepted: another directory" in " ".join(result.output.split())
    result = CliRunner().invoke(app, ["label", "digits", str(made / "teacher")])
    assert result.exit_code == 2
    assert "--out: missing; labels of digits" in " ".join(result.output.split())


def test_outputs_that_float16_does_not_hold_are_refused(made: Path, tmp_path: Path) -> None:
    network, described = load_teacher(str(made / "teacher"))
    for parameter in network.parameters():
        parameter.data.mul_(1e9)
    save_model(tmp_path / "teacher", network, described)
    shutil.copytree(made / "set", tmp_path / "set")
    result = label(tmp_path, tmp_path / "l")
    assert result.exit_code == 1
    assert "are not finite numbers within float16's range" in " ".join(result.output.split())


def test_digits_at_a_size_of_their_own_are_measured_by_the_student_alone(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a newcomer does: labels at another side than the teacher's, no size in the recipe, held-out images."""
    torch.manual_seed(1)
    save_model(tmp_path / "t", create_model("resnet8", 10), ModelConfig("resnet8", 10, 12))
    commands.label(
        data="digits", teacher=tmp_path / "t", out=tmp_path / "l", image_size=8, progress=False, device="cpu"
    )
    values = {
        **SHORT,
        "method": "kd",
        "data": "digits",
        "test_data": "digits",
        "labels_from": str(tmp_path / "l"),
    }
    distill.run(*distill.parse(values), tmp_path / "run", dry_run=True)
    said = capsys.readouterr().err
    assert "          the test images\n" in said
    assert "accuracy" not in said, "nobody measured the teacher"
    with pytest.raises(DataError, match=r"of digits at side 8, which are not the 1,437 of data"):
        distill.run(
            *distill.parse({**values, "image_size": 16}), tmp_path / "run", dry_run=True, progress=False
        )

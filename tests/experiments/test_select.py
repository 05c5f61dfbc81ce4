"""`kdfast select`: what it picks, what it writes, what it says, and what it refuses."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

from kdfast.cli.app import app
from kdfast.data import ShardLoader, ShardWriter, read_manifest, relative_entropy, select_long_tail
from kdfast.data.records import ShardRecords
from kdfast.experiments.common import networks
from kdfast.training.model_io import ModelConfig, save_model
from tests.support.shards import good, label, tar

CLASSES = 6


class ByColour(nn.Module):
    """Sees class ⌊6·red⌋ in an image, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.centres = nn.Parameter((torch.arange(CLASSES) + 0.5) / CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return -100 * (images[:, 0].mean((1, 2))[:, None] - self.centres).abs()


@pytest.fixture
def teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A saved network's folder, whose network sees colours."""
    from kdfast.models import create_model

    torch.manual_seed(0)
    save_model(tmp_path / "teacher", create_model("resnet8", CLASSES), ModelConfig("resnet8", CLASSES, 8))
    monkeypatch.setattr(networks, "load_model", lambda path: ByColour())
    return tmp_path / "teacher"


def flat(classes: list[int], jitter: float = 0.0) -> torch.Tensor:
    """Images that the teacher puts into these classes: uint8 ``[N, 3, 8, 8]``."""
    red = (torch.tensor(classes) + 0.5) / CLASSES
    images = torch.rand(len(classes), 3, 8, 8)
    images[:, 0] = red[:, None, None]
    return (images * 255).round().to(torch.uint8)


COUNTS = {0: 40, 1: 25, 2: 3, 4: 12}  # classes 3 and 5 are never seen
SEEN = [label for label, count in COUNTS.items() for _ in range(count)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    with ShardWriter(tmp_path / "data", num_classes=2, samples_per_shard=32, image_format="png") as writer:
        writer.write(flat(SEEN), torch.arange(len(SEEN)) % 2)
    return tmp_path / "data"


def call(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def select(data: object, teacher: Path, out: Path, *words: object) -> dict[str, Any]:
    result = call("select", data, teacher, "--out", out, "-q", "--json", "loader=torch", "device=cpu", *words)
    assert result.exit_code == 0, result.output
    printed: dict[str, Any] = json.loads(result.stdout)
    assert printed == json.loads((out / "metrics.json").read_text())
    return printed


def refused(code: int, message: str, *words: object) -> None:
    result = call("select", *words, "-q", "loader=torch", "device=cpu")
    assert message in result.stderr, result.output
    assert result.exit_code == code
    assert "Traceback" not in result.output


def records(folder: Path) -> list[tuple[dict[str, Any], int, bytes]]:
    """What a set holds, in its order: the JSON, the label and the image file of each sample."""
    from kdfast.data.untar import members

    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(folder.glob("*.tar")):
        with open(path, "rb") as stream:
            for member in list(members(stream)):
                stream.seek(member.offset)
                found.setdefault(member.key, {})[member.extension] = stream.read(member.size)
    return [
        (json.loads(parts["json"]), int.from_bytes(parts["i32"], "little"), parts.get("png") or parts["jpg"])
        for _, parts in sorted(found.items())
    ]


def test_a_balanced_set_of_the_same_files(teacher: Path, data: Path, tmp_path: Path) -> None:
    printed = select(data, teacher, tmp_path / "new", "--budget", 40)
    written = records(tmp_path / "new")
    assert Counter(number for _, number, _ in written) == {0: 10, 1: 10, 2: 10, 4: 10}
    source = ShardRecords(data, loader="torch")
    for extra, number, file in written:
        assert SEEN[extra["source"]] == number
        assert extra["label"] == extra["source"] % 2
        assert file == source.stored([extra["source"]])[0]
    assert (printed["images"], printed["of"], printed["classes_predicted"]) == (40, 80, 4)
    assert printed["replicated"] == 7
    raw = relative_entropy([40, 25, 3, 0, 12, 0])
    assert printed["relative_entropy_raw"] == pytest.approx(raw)
    assert printed["relative_entropy_selected"] == pytest.approx(relative_entropy([1, 1, 1, 0, 1, 0]))
    manifest = read_manifest(tmp_path / "new")
    assert manifest.metadata["relative_entropy_mixup"] == printed["relative_entropy_mixup"]
    assert manifest.num_classes == CLASSES
    with ShardLoader(tmp_path / "new", 8, loader="torch") as loader:
        assert sum(len(labels) for _, labels in loader) == 40


def test_augmented_entropies_are_of_augmented_images(teacher: Path, data: Path, tmp_path: Path) -> None:
    plain = select(data, teacher, tmp_path / "a", "--budget", 40, "regime=none")
    strong = select(data, teacher, tmp_path / "b", "--budget", 40, "regime=extreme")
    few = select(data, teacher, tmp_path / "c", "--budget", 40, "regime=none", "entropy_images=1")
    assert plain["relative_entropy_augmented"] == pytest.approx(plain["relative_entropy_selected"])
    assert strong["relative_entropy_augmented"] != plain["relative_entropy_augmented"]
    # Mixed reds lie in between, and so in classes that no image was in.
    assert plain["relative_entropy_mixup"] > plain["relative_entropy_selected"]
    assert few["relative_entropy_augmented"] == 0


def test_the_seed_decides_and_nothing_else(teacher: Path, data: Path, tmp_path: Path) -> None:
    for name, words in {"a": [], "b": ["batch_size=7"], "c": ["seed=1"]}.items():
        select(data, teacher, tmp_path / name, "--budget", 12, *words)
    a, b, c = (records(tmp_path / name) for name in "abc")
    assert a == b != c


def test_a_long_tail(teacher: Path, data: Path, tmp_path: Path) -> None:
    printed = select(data, teacher, tmp_path / "new", "--budget", 40, "--long-tail", 20)
    counts = Counter(number for _, number, _ in records(tmp_path / "new"))
    assert list(dict(counts.most_common())) == [0, 1, 4, 2]
    assert counts[0] > 2 * counts[1] > 4 * counts[4] > 4 * counts[2] >= 4
    assert printed["relative_entropy_selected"] < printed["relative_entropy_raw"]


@pytest.mark.parametrize("ratio", [1.0, 10.0, 1e6])
def test_long_tails_fall_off_as_they_should(ratio: float) -> None:
    predictions = np.repeat(np.arange(5), [9, 100, 50, 200, 70])
    chosen = select_long_tail(predictions, 300, 7, ratio=ratio, seed=0)
    counts = np.bincount(predictions[chosen], minlength=7)
    assert counts.sum() == 300
    assert counts[5:].tolist() == [0, 0]
    falling = counts[[3, 1, 4, 2, 0]]  # most predicted first
    assert (np.diff(falling) <= 0).all()
    assert falling.min() >= 1
    if ratio <= 10:
        steps = falling[1:-1] / falling[2:]
        assert steps == pytest.approx(ratio ** (1 / 4), rel=0.1)
    with pytest.raises(ValueError, match=r"ratio: got 0\.5; must be at least 1"):
        select_long_tail(predictions, 300, 7, ratio=0.5, seed=0)
    with pytest.raises(ValueError, match="budget: got 4 for 5 predicted classes"):
        select_long_tail(predictions, 4, 7, ratio=2, seed=0)


def test_indices_alone(teacher: Path, data: Path, tmp_path: Path) -> None:
    select(data, teacher, tmp_path / "new", "--budget", 8, "--index-only")
    numbers = [int(line) for line in (tmp_path / "new" / "indices.txt").read_text().split()]
    assert Counter(SEEN[number] for number in numbers) == {0: 2, 1: 2, 2: 2, 4: 2}
    assert not list((tmp_path / "new").glob("*.tar"))


def test_real_images_by_what_they_share_with_the_teacher(teacher: Path, tmp_path: Path) -> None:
    from PIL import Image

    names = ("ant", "bee", "cat")
    for i, (image, name) in enumerate(zip(flat([0, 1] * 15), names * 10)):
        (tmp_path / "real" / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "real" / name / f"{i}.png")
    (tmp_path / "shared.txt").write_text("# both know these\nbee\n2\n\n")
    words = ("--shared", tmp_path / "shared.txt", "split=all", "--budget", 15, "image_size=12")
    printed = select(tmp_path / "real", teacher, tmp_path / "new", *words)
    inside, outside = (records(tmp_path / "new" / name) for name in ("in-domain", "out-of-domain"))
    assert {extra["label"] for extra, _, _ in inside} == {1, 2}
    assert {extra["label"] for extra, _, _ in outside} == {0}
    # 20 shared ones are capped and balanced, the 10 others stay whole.
    assert (len(inside), len(outside)) == (15, 10)
    assert {extra["source"] for extra, _, _ in outside} == set(range(10))
    assert abs(sum(number for _, number, _ in inside) - 7.5) <= 0.5
    assert printed["in_domain_of"] == 20
    with ShardLoader(tmp_path / "new" / "in-domain", 4, loader="torch") as loader:
        assert next(iter(loader))[0].shape == (4, 3, 12, 12)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no class"),
        ("dog\n", "no class 'dog', accepted: numbers from 0 to 1"),
        ("7\n", "no class '7'"),
        ("0\n1\n", "leaves the out-of-domain subset"),
        (None, "cannot be read: No such file"),
    ],
)
def test_shared_classes_that_make_no_sense(
    teacher: Path, data: Path, tmp_path: Path, text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / "shared.txt").write_text(text)
    refused(2, message, data, teacher, "--out", tmp_path / "new", "--shared", tmp_path / "shared.txt")


def test_a_teacher_that_sees_one_class_everywhere(teacher: Path, tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "same", image_format="png") as writer:
        writer.write(flat([3] * 20), [0] * 20)
    message = "the teacher puts all 20 images into class 3, so there is nothing to balance"
    refused(1, message, tmp_path / "same", teacher, "--out", tmp_path / "new")


def test_budgets_below_the_number_of_classes(teacher: Path, data: Path, tmp_path: Path) -> None:
    message = "budget: got 3, accepted for"
    refused(2, message, data, teacher, "--out", tmp_path / "new", "--budget", 3)


def test_other_refusals(teacher: Path, data: Path, tmp_path: Path) -> None:
    refused(1, "no data set or folder", tmp_path / "none", teacher, "--out", tmp_path / "new")
    refused(1, "does not exist", data, tmp_path / "none", "--out", tmp_path / "new")
    refused(2, "which is a file", data, teacher, "--out", data / "manifest.json")
    refused(2, "unknown key 'budgett'", data, teacher, "--out", tmp_path / "new", "budgett=3")
    select(data, teacher, tmp_path / "new", "--budget", 8)
    refused(2, "holds a selection already", data, teacher, "--out", tmp_path / "new")


def test_damaged_images_stop_or_are_left_out(teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    tar(tmp_path / "bad" / "a.tar", [*good(12), ("x.jpg", b"garbage"), ("x.i32", label(0))])
    refused(1, "is neither JPEG nor PNG", tmp_path / "bad", teacher, "--out", tmp_path / "new")
    printed = select(tmp_path / "bad", teacher, tmp_path / "new", "on_error=skip")
    assert printed["of"] == 12


def test_a_stopped_selection_goes_on_to_the_same_set(
    teacher: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--budget", 40, "samples_per_shard=8", "batch_size=8")
    select(data, teacher, tmp_path / "whole", *words)
    original, calls = ShardWriter.write, []

    def failing(self: ShardWriter, *args: Any, **kwargs: Any) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        original(self, *args, **kwargs)

    monkeypatch.setattr(ShardWriter, "write", failing)
    command = ("select", data, teacher, "--out", tmp_path / "new", "-q", "loader=torch", *words)
    assert call(*command).exit_code == 130
    assert read_manifest(tmp_path / "new").num_samples == 24
    looked = []
    monkeypatch.setattr("kdfast.experiments.select.run.view", lambda *a, **k: looked.append(1))
    assert call(*command, "--resume").exit_code == 0
    assert looked == []  # the teacher's predictions were kept
    assert records(tmp_path / "new") == records(tmp_path / "whole")


def test_files_are_written_as_they_are_or_refused(tmp_path: Path) -> None:
    files = [data for name, data in good(3) if name.endswith("jpg")]
    with ShardWriter(tmp_path / "set", image_format="jpg") as writer:
        writer.write(files, [1, 2, 3], [{"source": 0}] * 3)
    assert [file for _, _, file in records(tmp_path / "set")] == files
    with ShardWriter(tmp_path / "png", image_format="png") as writer:
        for wrong, error, message in (
            (files, ValueError, "row 0 is of another format than this png set"),
            ([b""], ValueError, "the file at row 0 has 0 bytes"),
            ([files[0][:-30]], ValueError, "the file at row 0 JPEG has no end-of-image marker"),
            ([1], TypeError, "got int at row 0"),
        ):
            with pytest.raises(error, match=message):
                writer.write(wrong, [0] * len(wrong))  # type: ignore[arg-type]

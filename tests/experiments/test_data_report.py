"""`kdfast data-report`: numbers known beforehand, the words that follow from them, a page that stands alone."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from kdfast.cli.app import app
from kdfast.data import ShardWriter, relative_entropy
from kdfast.data.quality import class_spread, duplicate_groups, effective_directions, picture_hashes
from kdfast.experiments.common import networks
from kdfast.experiments.data_report import run as data_report
from kdfast.experiments.data_report import verdict as data_verdict
from kdfast.experiments.data_report.config import DataReportConfig
from kdfast.models import create_model
from kdfast.training.model_io import ModelConfig, save_model
from tests.experiments.test_select import CLASSES, ByColour, flat
from tests.support.shards import good, label, pictures, tar

COUNTS = {0: 60, 1: 25, 2: 3, 4: 22}
SEEN = [number for number, count in COUNTS.items() for _ in range(count)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set with ten copies of its first image, a teacher's folder, and two of networks that can be drawn."""
    folder = tmp_path_factory.mktemp("report")
    torch.manual_seed(0)
    images = torch.cat([flat(SEEN), flat([0])[:1].expand(10, -1, -1, -1)])
    images[-10:] = images[0]
    with ShardWriter(folder / "data", image_format="png") as writer:
        writer.write(images, [0] * len(images))
    save_model(folder / "teacher", create_model("resnet8", CLASSES), ModelConfig("resnet8", CLASSES, 8))
    for name in ("plane", "student"):
        save_model(folder / name, create_model("gap2", 10), ModelConfig("gap2", 10, 8))
    return folder


@pytest.fixture(scope="module")
def report(root: Path) -> tuple[Path, dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(networks, "load_model", lambda path: ByColour())
        data_report.run(config(root, root / "out"))
    return root / "out", json.loads((root / "out" / "metrics.json").read_text())


def config(root: Path, out: Path, **values: Any) -> DataReportConfig:
    common = {
        "data": str(root / "data"),
        "teacher": str(root / "teacher"),
        "out": str(out),
        "loader": "torch",
    }
    return DataReportConfig(**{**common, "device": "cpu", "progress": False, "attacked": 64, **values})


def test_the_numbers_are_those_of_the_set(report: tuple[Path, dict[str, Any]]) -> None:
    _, m = report
    counts = [70, 25, 3, 0, 22, 0]
    assert m["class_counts"] == counts
    assert (m["images"], m["looked_at"], m["classes"], m["classes_predicted"]) == (120, 120, 6, 4)
    assert m["relative_entropy_raw"] == pytest.approx(relative_entropy(counts))
    assert m["relative_entropy_balanced"] == pytest.approx(math.log(4) / math.log(6))
    assert m["relative_entropy_supported"] == pytest.approx(math.log(3) / math.log(6))
    assert m["thin_classes"] == 1
    assert m["largest_share"] == pytest.approx(70 / 120)
    assert (m["duplicate_share"], m["largest_duplicate_group"]) == (pytest.approx(10 / 120), 11)
    # This teacher is as sure as can be in the middle of a class's colours, where these images lie.
    assert m["confidence_mean"] > 0.99
    assert m["unsure_share"] == 0
    assert 0 <= m["boundary_reachable"] <= 1
    assert m["effective_directions"] == pytest.approx(2, abs=1)


def test_the_page_stands_alone_and_says_what_the_numbers_say(report: tuple[Path, dict[str, Any]]) -> None:
    folder, m = report
    html = (folder / "report.html").read_text()
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)""", re.sub(r"<image .*?>", "", html, flags=re.S))
    assert not re.search(r"<script|@import|url\((?!#)", html)
    assert m["verdict"] in html
    assert f"{m['relative_entropy_raw']:.3f}" in html
    assert "prefers-color-scheme: dark" in html
    for heading in ("How even it is", "What it looks like to the teacher", "Copies", "All numbers"):
        assert f"<h2>{heading}</h2>" in html
    assert len(list((folder / "plots").glob("*.svg"))) >= 6
    assert html.count('class="grade') == 6


def test_a_plane_is_drawn_with_its_boundaries_and_students(root: Path) -> None:
    out = root / "planes"
    values = {"teacher": str(root / "plane"), "students": (str(root / "student"),), "test_data": "digits"}
    data_report.run(config(root, out, **values, attacked=8))
    html = (out / "report.html").read_text()
    titles = re.findall(r"<h3>((?:Teacher|Student).*?)</h3>", html)
    assert len(titles) == 3
    assert titles[0] == "Teacher"
    assert re.fullmatch(r"Student student: \d+\.\d % of digits", titles[2])


def test_options_change_what_is_looked_at(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kdfast.experiments.data_report import page as data_page

    monkeypatch.setattr(networks, "load_model", lambda path: ByColour())
    monkeypatch.setattr(data_page, "build", lambda *a: data_page.Page("nothing"))

    def numbers(**values: Any) -> dict[str, Any]:
        data_report.run(config(root, tmp_path / "out", **values))
        found: dict[str, Any] = json.loads((tmp_path / "out" / "metrics.json").read_text())
        found.pop("seconds")
        return found

    plain = numbers()
    assert numbers() == plain
    other = numbers(batch_size=7, sample=120)  # augmentation draws batch by batch
    assert {key for key in plain if plain[key] != other[key]} <= {
        "relative_entropy_augmented",
        "relative_entropy_mixup",
    }
    few = numbers(limit=30)
    assert (few["looked_at"], few["images"]) == (30, 120)
    assert numbers(limit=30, seed=1)["class_counts"] != few["class_counts"]
    assert numbers(sample=12)["relative_entropy_sample"] != plain["relative_entropy_sample"]
    assert numbers(regime="none")["relative_entropy_augmented"] == pytest.approx(
        plain["relative_entropy_raw"]
    )
    assert numbers(regime="extreme")["relative_entropy_augmented"] != plain["relative_entropy_augmented"]


def test_one_class_for_everything_is_reported_not_refused(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(networks, "load_model", lambda path: ByColour())
    with ShardWriter(tmp_path / "same", image_format="png") as writer:
        writer.write(flat([3] * 20), [0] * 20)
    words = ["data-report", tmp_path / "same", root / "teacher", "--out", tmp_path / "out", "-q", "--json"]
    result = CliRunner().invoke(app, [*map(str, words), "loader=torch", "device=cpu", "attacked=4"])
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert (printed["grade"], printed["verdict"]) == ("poor", "Not usable for this teacher")
    assert printed["relative_entropy_raw"] == 0
    assert "one single class" in Path(printed["report"]).read_text()


def test_damaged_records_are_counted_or_refused(root: Path, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    tar(tmp_path / "bad" / "a.tar", [*good(12), ("x.jpg", b"garbage"), ("x.i32", label(0))])
    words = [
        "data-report",
        tmp_path / "bad",
        root / "teacher",
        "--out",
        tmp_path / "out",
        "-q",
        "loader=torch",
    ]
    result = CliRunner().invoke(app, [*map(str, words), "on_error=raise"])
    assert result.exit_code == 1
    assert "is neither JPEG nor PNG" in result.stderr


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["{root}/none", "{root}/teacher"], 1, "no data set or folder"),
        (["{root}/data", "{root}/none"], 1, "does not exist"),
        (["{root}/data", "{root}/teacher", "sampel=3"], 2, "did you mean 'sample'"),
        (["{root}/data", "{root}/plane", "--student", "{root}/student"], 2, "test_data: missing"),
        (
            ["{root}/data", "{root}/teacher", "--student", "{root}/student", "--test-data", "digits"],
            2,
            "teacher has no two pooled features to draw",
        ),
    ],
)
def test_refusals(root: Path, tmp_path: Path, words: list[str], code: int, message: str) -> None:
    given = [word.format(root=root) for word in words]
    result = CliRunner().invoke(
        app, ["data-report", *given, "--out", str(tmp_path / "out"), "-q", "device=cpu"]
    )
    assert message in result.stderr, result.output
    assert result.exit_code == code


# The words.

GOOD: dict[str, Any] = {
    "classes": 10,
    "classes_predicted": 10,
    "thin_classes": 0,
    "largest_share": 0.1,
    "relative_entropy_raw": 0.98,
    "relative_entropy_balanced": 1.0,
    "relative_entropy_supported": 1.0,
    "relative_entropy_sample": 0.98,
    "relative_entropy_augmented": 0.97,
    "relative_entropy_mixup": 0.96,
    "regime": "high",
    "unsure_share": 0.2,
    "boundary_reachable": 0.6,
    "feature_dimensions": 64,
    "effective_directions": 9.0,
    "class_spread": 0.5,
    "duplicate_share": 0.0,
    "largest_duplicate_group": 1,
    "faults": 0,
    "first_fault": "",
}


@pytest.mark.parametrize(
    ("change", "grade", "headline"),
    [
        ({}, "good", "A good set for this teacher"),
        ({"relative_entropy_raw": 0.3}, "fair", "Good once it is selected from"),
        (
            {"relative_entropy_raw": 0.3, "thin_classes": 4, "relative_entropy_supported": 0.78},
            "fair",
            "Usable, with gaps",
        ),
        (
            {"relative_entropy_raw": 0.3, "classes_predicted": 3, "relative_entropy_supported": 0.48},
            "poor",
            "Weak for this teacher",
        ),
        ({"classes_predicted": 1, "relative_entropy_raw": 0.0}, "poor", "Not usable for this teacher"),
        ({"effective_directions": 1.5}, "poor", "Too narrow for this teacher"),
        ({"duplicate_share": 0.5}, "fair", "Even, but repetitive"),
        (
            {"classes": 6, "classes_predicted": 6, "largest_share": 0.48, "relative_entropy_raw": 0.86},
            "fair",
            "Good once it is selected from",
        ),
        ({"classes": 2, "classes_predicted": 2, "largest_share": 0.7}, "good", "A good set for this teacher"),
        (
            {"classes": 2, "classes_predicted": 2, "largest_share": 0.8, "relative_entropy_supported": 0.7},
            "fair",
            "Usable, with gaps",
        ),
        ({"smallest_share": 0.01, "smallest_class": "owl"}, "fair", "Good once it is selected from"),
        ({"smallest_share": 0.0, "classes_predicted": 9}, "fair", "Good once it is selected from"),
        ({"smallest_share": 0.03}, "good", "A good set for this teacher"),
    ],
)
def test_the_verdict(change: dict[str, Any], grade: str, headline: str) -> None:
    found = data_verdict.verdict({**GOOD, **change})
    assert found[:2] == (grade, headline)
    assert found[2]
    assert ("evenly" in found[2]) <= (not data_verdict.worst_class({**GOOD, **change}))


@pytest.mark.parametrize(
    ("change", "title", "grade", "words"),
    [
        ({}, "Coverage of the classes", "good", "all 10 classes"),
        (
            {"largest_share": 0.3, "largest_class": "owl"},
            "Coverage of the classes",
            "fair",
            "class (owl) takes 30 %",
        ),
        ({"relative_entropy_raw": 0.7}, "Coverage of the classes", "fair", "0.700"),
        ({"relative_entropy_raw": 0.5}, "Coverage of the classes", "poor", "0.500"),
        ({}, "What selection can do", "good", "nothing to add"),
        (
            {"relative_entropy_raw": 0.5, "thin_classes": 2, "relative_entropy_supported": 0.9},
            "What selection can do",
            "good",
            "2 of the predicted classes have fewer than 20",
        ),
        ({"relative_entropy_augmented": 0.5}, "Under augmentation", "fair", "lowers"),
        ({"relative_entropy_sample": 0.5}, "Under augmentation", "note", "raises"),
        ({}, "Under augmentation", "note", "leaves"),
        ({"effective_directions": 1.2}, "Variety", "poor", "1.2 directions"),
        ({"class_spread": None}, "Variety", "note", "9.0 directions."),
        ({"duplicate_share": 0.1}, "Copies", "fair", "10.0 %"),
        ({"duplicate_share": 0.3}, "Copies", "poor", "30.0 %"),
        ({"faults": 3, "first_fault": "a.tar: x"}, "Damage", "poor", "3 records or shards are damaged"),
    ],
)
def test_the_findings(change: dict[str, Any], title: str, grade: str, words: str) -> None:
    (found,) = [f for f in data_verdict.findings({**GOOD, **change}) if f.title == title]
    assert found.grade == grade
    assert words in found.text


def test_the_papers_points_argue_for_the_bounds() -> None:
    """What the page says of the paper's sets is so: those above the bound teach, those below it mostly do not."""
    points = [point for group in data_verdict.PAPER_POINTS.values() for point in group]
    assert len(points) == 36
    above = [kept for entropy, kept in points if entropy >= data_verdict.EVEN]
    below = [kept for entropy, kept in points if entropy < data_verdict.UNEVEN]
    assert min(above) > 0.75
    assert np.median(below) < 0.5
    assert np.corrcoef(*zip(*points))[0, 1] > 0.8


# The measures.


def test_effective_directions_of_known_clouds(generator: torch.Generator) -> None:
    cloud = torch.randn(4000, 6, generator=generator).numpy()
    assert effective_directions(cloud) == pytest.approx(6, rel=0.01)
    assert effective_directions(cloud * [1, 1, 1, 0, 0, 0] * 50 + 7) == pytest.approx(3, rel=0.01)
    assert effective_directions(cloud[:, :1]) == pytest.approx(1)
    assert effective_directions(np.ones((10, 4))) == 0
    assert effective_directions(cloud[:1]) == 0
    with pytest.raises(ValueError, match=r"features: got shape \[4\]"):
        effective_directions(np.ones(4))


def test_class_spread_of_known_clouds(generator: torch.Generator) -> None:
    classes = np.arange(3000) % 3
    centres = 10 * np.eye(3)[classes]
    noise = torch.randn(3000, 3, generator=generator).numpy()
    # √(3 σ² / (|c|² · 2/3)), c of length 10.
    assert class_spread(centres + noise, classes) == pytest.approx(math.sqrt(3 / (100 * 2 / 3)), rel=0.05)
    assert class_spread(centres, classes) == 0
    assert class_spread(noise, np.zeros(3000, int)) == math.inf


def test_copies_are_found_through_compression_and_nothing_else_is() -> None:
    import io

    from PIL import Image

    from kdfast.data.codec import decode

    images = pictures(60, 32)
    again = []
    for image in images[:5]:
        buffer = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "PNG")
        again.append(torch.from_numpy(decode(buffer.getvalue()).copy()).permute(2, 0, 1))
    keys = picture_hashes(torch.stack([*images, *again, *again[:1]]).float() / 255)
    groups = duplicate_groups(keys)
    assert [sorted(group.tolist()) for group in groups] == [[0, 60, 65], *([n, 60 + n] for n in range(1, 5))]
    plain = torch.stack([torch.full((3, 16, 16), value) for value in (0.2, 0.2, 0.8)])
    assert [group.tolist() for group in duplicate_groups(picture_hashes(plain))] == [[0, 1]]

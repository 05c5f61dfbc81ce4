"""The report: complete from metrics files alone, in one file that fetches nothing."""

from __future__ import annotations

import base64
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch

from kdfast.errors import DataError
from kdfast.experiments import report as reporting
from kdfast.report import read_run, write_grid, write_report
from kdfast.report.plots import bars, curves

DEMO = {
    "teacher_accuracy": 0.9917,
    "student_accuracy": 0.9778,
    "student_hard_label_accuracy": 0.9028,
    "student_noise_accuracy": 0.1,
    "images": 2000,
    "seconds": 123.4,
}


def a_run(folder: Path, metrics: dict[str, Any] | None = None, epochs: int = 3) -> Path:
    folder.mkdir(parents=True)
    if metrics is not None:
        (folder / "metrics.json").write_text(json.dumps(metrics))
    lines = [{"kind": "train", "step": 10 * n, "epoch": n, "loss": 1 / n} for n in range(1, epochs + 1)]
    lines += [{"kind": "eval", "step": 10 * n, "epoch": n, "accuracy": 0.3 * n} for n in range(1, epochs + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def a_demo(folder: Path) -> Path:
    folder.mkdir()
    captions = {"samples-1.png": "What <they> saw"}
    (folder / "metrics.json").write_text(json.dumps({**DEMO, "captions": captions, "settings": {"seed": 3}}))
    write_grid(folder / "samples-1.png", torch.zeros(4, 3, 8, 8, dtype=torch.uint8), columns=2)
    for name in ("teacher", "diffusion", "student-soft", "student-hard", "student-noise"):
        a_run(folder / name, {"accuracy": 0.9})
    return folder


class Page(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [
            v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "srcset", "data", "action")
        ]

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def test_a_demos_page_says_the_numbers_and_shows_the_pictures(tmp_path: Path) -> None:
    page = Page(write_report([a_demo(tmp_path / "demo")]).read_text())
    for said in ("99.2 %", "97.8 %", "90.3 %", "10.0 %", "2,000", "What <they> saw", "seed"):
        assert said in page.text, said
    pictures = [a for a in page.addresses if a.startswith("data:image/png;base64,")]
    assert len(pictures) == 1
    assert base64.b64decode(pictures[0].split(",", 1)[1]).startswith(b"\x89PNG")
    assert page.tags.count("svg") == 3


def test_the_page_fetches_nothing(tmp_path: Path) -> None:
    html = write_report([a_demo(tmp_path / "demo")]).read_text()
    page = Page(html)
    assert all(a.startswith(("data:", "#")) for a in page.addresses), page.addresses
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert not re.search(r"@import|url\((?!#)", html)


def test_the_page_follows_the_readers_colour_scheme(tmp_path: Path) -> None:
    html = write_report([a_demo(tmp_path / "demo")]).read_text()
    assert "prefers-color-scheme: dark" in html
    figures = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    assert figures
    for figure in figures:
        assert "currentColor" in figure
        assert not re.search(r"#0{6}|#010203|fill: #fff|black", figure)  # ink that a dark page would swallow


def test_the_same_runs_give_the_same_page(tmp_path: Path) -> None:
    demo = a_demo(tmp_path / "demo")
    first = write_report([demo]).read_bytes()
    assert write_report([demo]).read_bytes() == first


def test_a_training_runs_page_has_its_curves_and_numbers(tmp_path: Path) -> None:
    run = a_run(tmp_path / "cifar", {"accuracy": 0.7158, "steps": 12000, "best": "yes", "milestones": [1, 2]})
    page = Page(write_report([run]).read_text())
    for said in ("cifar", "71.6 %", "12,000", "yes", "1, 2", "epoch", "loss"):
        assert said in page.text, said
    assert page.tags.count("svg") == 2


def test_a_run_in_progress_has_a_page(tmp_path: Path) -> None:
    run = a_run(tmp_path / "running")
    with open(run / "metrics.jsonl", "a") as log:
        log.write('{"kind": "train", "st')
    assert len(read_run(run).log) == 6
    assert "svg" in Page(write_report([run]).read_text()).tags


def test_an_attacks_success_is_a_curve(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", {"accuracy": 0.9})
    title = "Attack: images that a pair at the boundary was found for"
    assert title not in write_report([run]).read_text()
    lines = [{"kind": "train", "step": n, "loss": 1.0, "attack_success": n / 4} for n in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert title in write_report([run]).read_text()


def test_several_runs_are_compared(tmp_path: Path) -> None:
    runs = [a_run(tmp_path / name, {"accuracy": value}) for name, value in (("soft", 0.98), ("hard", 0.9))]
    page = Page(write_report(runs, tmp_path / "out" / "both.html").read_text())
    assert page.text.index("Comparison") < page.text.index("98.0 %") < page.text.index("90.0 %")
    assert (tmp_path / "out" / "both.html").exists()


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [a_run(tmp_path / parent / "run", {"accuracy": 0.5}) for parent in ("a", "b")]
    html = write_report(runs).read_text()
    assert str(runs[0]) in html
    assert str(runs[1]) in html


def test_the_plots_are_files_too_and_old_ones_go(tmp_path: Path) -> None:
    demo = a_demo(tmp_path / "demo")
    (demo / "plots").mkdir()
    (demo / "plots" / "09-stale.svg").write_text("")
    written = reporting.run([demo])
    assert written[0] == demo / "report.html"
    assert len(written) == 4
    for figure in written[1:]:
        assert ElementTree.parse(figure).getroot().tag.endswith("svg")


@pytest.mark.parametrize(
    ("prepare", "names"),
    [
        (lambda p: None, "does not exist"),
        (lambda p: p.mkdir(), "holds neither metrics.json nor metrics.jsonl"),
        (
            lambda p: (p.mkdir(), (p / "metrics.json").write_text("{")),
            r"metrics\.json: cannot be read as JSON",
        ),
        (lambda p: (p.mkdir(), (p / "metrics.json").write_text("[1]")), r"metrics\.json: holds a JSON list"),
        (
            lambda p: (p.mkdir(), (p / "metrics.jsonl").write_text("no\n{}\n")),
            r"metrics\.jsonl: line 1 is not JSON",
        ),
        (
            lambda p: (p.mkdir(), (p / "metrics.jsonl").write_bytes(b"\xff\xfe\n")),
            r"metrics\.jsonl: cannot be read",
        ),
    ],
)
def test_a_folder_without_a_readable_run_is_refused(tmp_path: Path, prepare: Any, names: str) -> None:
    prepare(tmp_path / "run")
    with pytest.raises(DataError, match=names):
        write_report([tmp_path / "run"])


def test_no_runs_are_refused() -> None:
    with pytest.raises(DataError, match="got no runs"):
        write_report([])


def test_a_grid_shows_every_image_in_its_place(tmp_path: Path) -> None:
    images = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, 3, 4, 6) * 50
    sheet = matplotlib.image.imread(write_grid(tmp_path / "grid.png", images, columns=3, scale=2))
    assert sheet.shape == (2 * (2 * 4 + 1), 2 * (3 * 6 + 2), 4)
    for number in range(5):
        row, column = divmod(number, 3)
        pixel = sheet[2 * (row * 5 + 1), 2 * (column * 7 + 1)]
        np.testing.assert_allclose(pixel, [number * 50 / 255] * 3 + [1], atol=1e-6)
    assert sheet[-1, -1, 3] == 0  # where a sixth would be, the page shows through


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(2, 1, 4, 4, dtype=torch.uint8),
        torch.zeros(2, 3, 4, 4),
        torch.zeros(0, 3, 4, 4, dtype=torch.uint8),
    ],
)
def test_a_grid_of_something_else_is_refused(tmp_path: Path, images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"images: got .*accepted: uint8"):
        write_grid(tmp_path / "grid.png", images, columns=2)


def test_a_grid_needs_a_column(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="columns: got 0"):
        write_grid(tmp_path / "grid.png", torch.zeros(1, 3, 4, 4, dtype=torch.uint8), columns=0)


def test_figures_name_what_they_show() -> None:
    svg = curves(
        {"soft": ([1, 2], [0.5, 0.9]), "hard": ([1], [0.4])}, xlabel="epoch", ylabel="accuracy", percent=True
    )
    for said in ("soft", "hard", "epoch", "accuracy", "80 %"):
        assert said in svg, said
    assert "97.5 %" in bars({"soft": 0.975}, xlabel="accuracy")


def test_a_name_cannot_break_out_of_a_figure() -> None:
    ElementTree.fromstring(bars({"a <b> & c": 0.5}, xlabel="x"))


def test_a_run_prints_as_a_line(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    (folder / "seed-0").mkdir(parents=True)
    lines = [{"kind": "train", "step": 900, "loss": 1.0}, {"kind": "eval", "step": "odd"}, {"kind": "eval"}]
    (folder / "seed-0" / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert repr(read_run(folder / "seed-0")) == f"Run('{folder}/seed-0': 900 steps, not finished)"
    (folder / "metrics.json").write_text(json.dumps({"accuracy_mean": 0.975}))
    assert repr(read_run(folder)) == f"Run('{folder}': accuracy 97.5 %, runs seed-0)"
    (folder / "metrics.json").write_text(json.dumps({"images": 4}))
    (folder / "seed-0" / "metrics.jsonl").unlink()
    assert repr(read_run(folder)) == f"Run('{folder}': finished)"


def test_a_runs_page_says_first_what_was_kept_and_last_what_it_was_told(tmp_path: Path) -> None:
    folder = tmp_path / "student"
    folder.mkdir()
    metrics = {
        "seed": 3,
        "steps": 70,
        "accuracy": 0.9,
        "seconds": 12.0,
        "teacher_accuracy": 0.96,
        "share_kept": 0.9375,
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "recipe.yaml").write_text("lr: 0.003\nweights: null\naugment: [crop, flip]\nbatch_size: 32\n")
    page = write_report([folder]).read_text()
    cards = re.findall(r'<div class="card[^>]*><b>([^<]*)</b><span>([^<]*)', page)
    wanted = [
        ("90.0 %", "accuracy"),
        ("96.0 %", "teacher accuracy"),
        ("93.8 %", "share kept"),
        ("12", "seconds"),
    ]
    assert cards == wanted
    told = page[page.index("<h2>Recipe</h2>") :]
    assert re.findall(r"<td[^>]*>([^<]*)</td>", told) == [
        "lr", "0.003", "augment", "crop, flip", "batch size", "32",
    ]  # fmt: skip

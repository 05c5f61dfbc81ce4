"""The README's figures are those of bench/results, and none is typed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from bench import readme_table
from kdfast.benchmarks import plots
from kdfast.report.plots import PALETTE
from tests.conftest import INTERPRETING

pytestmark = pytest.mark.skipif(INTERPRETING, reason="nothing here launches a kernel")


def provider(name: str, seconds: float, **more: Any) -> dict[str, Any]:
    return {"name": name, "config": "", "seconds": {"wall": [seconds, 1.01 * seconds, seconds]}} | more


def row(case: str, size: int, *providers: dict[str, Any]) -> dict[str, Any]:
    return {
        "suite": "losses",
        "case": case,
        "params": {"shape": f"{size}x10", "batch": 2},
        "working_set_bytes": size,
        "providers": list(providers),
    }


RESULT: dict[str, Any] = {
    "name": "A machine",
    "device": "cpu",
    "tiny": False,
    "started": "2030-01-02T00:00:00Z",
    "environment": {"packages": {"torch": "9"}, "cpus": 4, "load_average": [0.5, 0, 0]},
    "copy_bytes_per_second": [1e9],
    "cases": [
        row("kl", 8, provider("eager", 2.0), {"name": "gone", "absent": "no"}, provider("kdfast", 1.0)),
        row("kl", 16, provider("eager", 1.0), provider("Lib", 4.0), provider("kdfast", 2.0, bytes=5e8)),
    ],
}


def test_the_readme_and_its_pictures_are_what_the_results_say() -> None:
    text = readme_table.README.read_text()
    assert text == readme_table.rewritten(text), "run: python -m bench.readme_table"
    for path, picture in readme_table.pictures().items():
        assert path.exists(), "run: python -m bench.readme_table"
        assert not readme_table.differs(path.read_text(), picture), "run: python -m bench.readme_table"


def test_a_figure_changed_by_hand_is_noticed() -> None:
    text = readme_table.README.read_text()
    found = re.search(r"\*\*(\d+\.\d\d)×\*\*", text)
    assert found is not None
    changed = text.replace(found[1], "99.99", 1)
    assert readme_table.rewritten(changed) == text
    picture = next(iter(readme_table.pictures().values()))
    label = re.findall(r">([^<>]*×[^<>]*)<", picture)[0]
    assert readme_table.differs(picture, picture.replace(label, "99.99×", 1))
    assert not readme_table.differs(picture, picture.replace("<path", "<path class='another-release'", 1))


def test_tables_compute_ratios_and_leave_out_the_missing() -> None:
    small = {**RESULT, "cases": RESULT["cases"][:1]}
    text = readme_table.tables({"here": small}, ["losses: kl"])
    assert "| losses: kl (8x10, batch 2) | 1e+03 ms | **2.00×** |  |  |" in text
    text = readme_table.tables({"here": RESULT}, ["losses: none", "losses: kl"])
    assert "8x10" not in text  # one row a name, at the largest size
    assert "| losses: kl (16x10, batch 2) | 2e+03 ms | 0.50× |  | **2.00×** Lib |" in text
    assert "gone" not in text
    assert "load 0.5 on 4 CPUs" in text
    floor = row("kl", 4, provider("memcpy", 0.1, against=""), provider("kdfast", 1.0))
    lost = readme_table.slower({"here": {**RESULT, "cases": [*RESULT["cases"], floor]}})
    assert lost.splitlines()[2:] == ["| losses: kl (16x10, batch 2) | eager | 0.50× | A machine |"]


def test_the_newest_date_of_each_device_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readme_table, "RESULTS", tmp_path)
    for name, case in (("2030-01-01/quick", 0), ("2030-02-01/losses", 0), ("2030-02-01/replay", 1)):
        folder = tmp_path / "gpu" / name
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps(RESULT | {"cases": [RESULT["cases"][case]]}))
    trial = tmp_path / "gpu" / "2030-02-01" / "trial"
    trial.mkdir()
    (trial / "results.json").write_text(json.dumps(RESULT | {"tiny": True}))
    (found,) = readme_table.newest().values()
    assert found["cases"] == RESULT["cases"]


def test_a_provider_has_one_colour_whatever_stands_beside_it() -> None:
    eager = {
        plots._kind_color(name) for name in ("eager", "eager, image by image", "eager PyTorch, one gather")
    }
    compiled, libraries = (
        plots._kind_color("torch.compile"),
        {plots._kind_color(name) for name in ("cpprb", "PIL")},
    )
    assert (len(eager), len(libraries), len({*eager, compiled, *libraries, PALETTE[0]})) == (1, 1, 4)


def test_figures_show_bars_a_roof_and_sweeps(tmp_path: Path) -> None:
    files = plots.draw(RESULT, tmp_path)
    assert [path.name for path in files] == ["ratios.svg", "roof.svg", "sweeps.svg"]
    bars, roof, sweeps = (path.read_text() for path in files)
    assert [text for text in ("2.00×  eager", "0.50×  eager", "2.00×  Lib") if text not in bars] == []
    assert "a copy: 1 GB/s" in roof
    assert {PALETTE[1], PALETTE[3]} == set(re.findall(r"fill: (#[0-9a-f]{6})", bars)), (
        "a colour a kind of provider"
    )
    assert "losses: kl" in sweeps
    assert plots.sweeps(RESULT) == {
        "losses: kl": {"eager": [(8, 2.0), (16, 1.0)], "kdfast": [(8, 1.0), (16, 2.0)]}
    }
    assert plots.draw(RESULT | {"cases": []}, tmp_path) == []

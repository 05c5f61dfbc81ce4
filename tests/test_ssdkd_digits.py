"""The miniature: real digits that the student never sees. It shows that the loop learns, and no more than that."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from kdfast.experiments.common.recipe import build_config, load_recipe
from kdfast.experiments.distill import run as distill
from kdfast.experiments.teach import run as teach

RECIPE = Path(__file__).parent.parent / "recipes" / "ssdkd" / "digits.yaml"


def trained_teacher(folder: Path, epochs: int) -> dict[str, Any]:
    values = {"data": "digits", "model": "resnet8", "image_size": 16, "epochs": epochs, "lr": 0.1}
    values |= {"schedule": "cosine", "warmup_epochs": 1, "eval_every": epochs, "tensorboard": False}
    return teach.run(build_config(teach.TeachConfig, values, source="test"), folder, progress=False)


def distilled(folder: Path, teacher: Path, **values: Any) -> dict[str, Any]:
    recipe = {**load_recipe(RECIPE), "teacher": str(teacher), "tensorboard": False, **values}
    return distill.run(*distill.parse(recipe), folder, progress=False)


@pytest.mark.timeout(900)
def test_a_student_learns_digits_that_it_never_sees(tmp_path: Path) -> None:
    """A few rounds; chance is 0.1."""
    assert trained_teacher(tmp_path / "teacher", 5)["accuracy"] > 0.9
    metrics = distilled(tmp_path / "student", tmp_path / "teacher", epochs=14, capacity=384, eval_every=14)
    assert metrics["accuracy"] > 0.5


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_miniature_reaches_ninety_percent(tmp_path: Path, seed: int) -> None:
    """Seeds 0, 1 and 2; two minutes of two cores, the teacher left out."""
    assert trained_teacher(tmp_path / "teacher", 15)["accuracy"] > 0.97
    begin = time.process_time()
    metrics = distilled(tmp_path / "student", tmp_path / "teacher", seed=seed, eval_every=60)
    spent = time.process_time() - begin
    print(f"seed {seed}: {metrics['accuracy']:.4f} in {spent:.0f} s of CPU time")
    assert metrics["accuracy"] >= 0.9
    assert spent <= 2 * 120

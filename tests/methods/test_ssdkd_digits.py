"""The miniature: real digits that the student never sees. It shows that the loop learns, and no more than that."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from kdfast.experiments.common.recipe import build_config, load_recipe
from kdfast.experiments.distill import run as distill
from kdfast.experiments.teach import run as teach

RECIPE = Path(__file__).parents[2] / "recipes" / "ssdkd" / "digits.yaml"


def trained_teacher(folder: Path, epochs: int, side: int = 16) -> dict[str, Any]:
    values = {"data": "digits", "model": "resnet8", "image_size": side, "epochs": epochs, "lr": 0.1}
    values |= {"schedule": "cosine", "warmup_epochs": 1, "eval_every": epochs, "tensorboard": False}
    return teach.run(build_config(teach.TeachConfig, values, source="test"), folder, progress=False)


def distilled(folder: Path, teacher: Path, **values: Any) -> dict[str, Any]:
    recipe = {**load_recipe(RECIPE), "teacher": str(teacher), "tensorboard": False, **values}
    return distill.run(*distill.parse(recipe), folder, progress=False)


def test_a_student_learns_digits_that_it_never_sees(tmp_path: Path) -> None:
    """A few rounds at 8 × 8, since students of larger digits are too uneven after as few.

    Chance is 0.1. 10 runs, 7 seeds and 4 roundings (avx512, avx2, no vectors, without oneDNN): the teacher 0.975 …
    0.992, the student 0.77 … 0.91; at 16 × 16 after 14 epochs it was 0.45 … 0.73.
    """
    assert trained_teacher(tmp_path / "teacher", 5, side=8)["accuracy"] > 0.8
    few = {"epochs": 24, "capacity": 384, "batch_size": 32, "eval_every": 24}
    assert distilled(tmp_path / "student", tmp_path / "teacher", **few)["accuracy"] > 0.35


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_miniature_reaches_eighty_percent(tmp_path: Path, seed: int) -> None:
    """Two minutes of two cores, the teacher left out. Once: 96.7, 95.6 and 93.3 % with seeds 0, 1 and 2."""
    assert trained_teacher(tmp_path / "teacher", 15)["accuracy"] > 0.95
    begin = time.process_time()
    metrics = distilled(tmp_path / "student", tmp_path / "teacher", seed=seed, eval_every=60)
    spent = time.process_time() - begin
    print(f"seed {seed}: {metrics['accuracy']:.4f} in {spent:.0f} s of CPU time")
    assert metrics["accuracy"] >= 0.8
    assert spent <= 2 * 120

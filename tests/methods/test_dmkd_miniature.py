"""DM-KD on real digits: what the paper says of soft and hard labels, where it can be seen in minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kdfast.experiments.diffusion_model import run as diffusion_model
from kdfast.experiments.distill import run as distill
from kdfast.experiments.synth import run as synth
from kdfast.experiments.teach import run as teach
from kdfast.methods.dmkd import DMKDConfig

COMMON: dict[str, Any] = {
    "lr": 0.05,
    "nesterov": True,
    "schedule": "cosine",
    "device": "cpu",
    "tensorboard": False,
}
SEEDS = (0, 1, 2)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_soft_labels_beat_the_teachers_arg_max(tmp_path: Path) -> None:
    """Low-dimensional images leave little to tell classes by but the teacher's doubts; see Table 10 of the paper."""
    torch.set_num_threads(1)
    teacher = teach.TeachConfig(data="digits", model="resnet8", image_size=16, epochs=12, **COMMON)
    taught = teach.run(teacher, tmp_path / "teacher", progress=False)
    diffusion_model.run(
        diffusion_model.DiffusionConfig(epochs=10, device="cpu"), tmp_path / "model", progress=False
    )
    images = synth.SynthConfig(
        out=str(tmp_path / "set"), weights=str(tmp_path / "model"), steps=25, guidance_scale=4.0,
        batch_size=250, device="cpu", progress=False,
    )  # fmt: skip
    synth.run(images)
    accuracy: dict[str, list[float]] = {"soft": [], "hard": []}
    for seed in SEEDS:
        for labels, found in accuracy.items():
            student = distill.DistillConfig(
                teacher=str(tmp_path / "teacher"), student="resnet8", data=str(tmp_path / "set"),
                test_data="digits", epochs=10, seed=seed, loader="torch", eval_every=10, **COMMON,
            )  # fmt: skip
            method = DMKDConfig(temperature=10.0, labels=labels, hard_labels="teacher", cutmix_alpha=None)  # type: ignore[arg-type]
            metrics = distill.run(student, method, tmp_path / f"{labels}-{seed}", progress=False)
            found.append(metrics["accuracy"])
    print(f"teacher {taught['accuracy']:.4f}, students {accuracy}")
    soft, hard = (sum(found) / len(SEEDS) for found in accuracy.values())
    # With seeds 0, 1 and 2, in percent: soft 94.4, 93.1, 89.7, hard 81.4, 81.7, 76.9.
    assert soft > hard + 0.005, accuracy
    assert all(one > other for one, other in zip(*accuracy.values())), accuracy

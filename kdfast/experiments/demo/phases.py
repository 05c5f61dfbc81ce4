"""What the demo does, one phase after the other, each in a directory of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from kdfast.experiments.demo.config import DemoConfig
from kdfast.experiments.diffusion_model.config import DiffusionConfig
from kdfast.experiments.diffusion_model.run import run as train_diffusion_model
from kdfast.experiments.distill.config import DistillConfig
from kdfast.experiments.distill.run import run as distill
from kdfast.experiments.synth.config import SynthConfig
from kdfast.experiments.synth.run import run as synth
from kdfast.experiments.teach.config import TeachConfig
from kdfast.experiments.teach.run import run as teach
from kdfast.methods.dmkd import DMKDConfig

TEACHER, DIFFUSION, SYNTHETIC, NOISE = "teacher", "diffusion", "synthetic", "noise"
SOFT, HARD, FROM_NOISE = "student-soft", "student-hard", "student-noise"


def phases(config: DemoConfig, out: Path) -> dict[str, tuple[str, Callable[[], Any]]]:
    """Each phase by its directory's name: a title, and what does the work, in the order that they need each other."""
    common: dict[str, Any] = {
        "batch_size": config.batch_size,
        "lr": 0.05,
        "nesterov": True,
        "schedule": "cosine",
        "seed": config.seed,
        "device": config.device,
        "checkpoint_every": 3,
        "log_every": 10,
    }
    work: dict[str, Any] = {"resume": True, "progress": config.progress}
    train = {**work, "talk": False}  # the demo's own lines say enough

    def teacher() -> Any:
        settings = TeachConfig(
            data="digits",
            model=config.model,
            image_size=config.image_size,
            epochs=config.teacher_epochs,
            **common,
        )
        return teach(settings, out / TEACHER, **train)

    def diffusion() -> Any:
        per_epoch = min(100, config.diffusion_steps)
        settings = DiffusionConfig(
            image_size=config.image_size,
            epochs=-(-config.diffusion_steps // per_epoch),
            steps_per_epoch=per_epoch,
            batch_size=config.batch_size,
            seed=config.seed,
            device=config.device,
        )
        return train_diffusion_model(settings, out / DIFFUSION, **work)

    def images(source: Literal["diffusion", "noise"], name: str) -> Any:
        settings = SynthConfig(
            out=str(out / name),
            source=source,
            images=config.images,
            weights=str(out / DIFFUSION),
            steps=config.steps,
            guidance_scale=config.guidance_scale,
            image_size=config.image_size,
            num_classes=10,
            seed=config.seed,
            batch_size=min(250, config.samples_per_shard),
            samples_per_shard=config.samples_per_shard,
            device=config.device,
            **work,
        )
        return synth(settings)

    def student(name: str, data: str, labels: Literal["soft", "hard"]) -> Any:
        settings = DistillConfig(
            teacher=str(out / TEACHER),
            student=config.model,
            data=str(out / data),
            test_data="digits",
            epochs=config.student_epochs,
            loader=config.loader,
            **common,
        )
        method = DMKDConfig(temperature=config.temperature, labels=labels, cutmix_alpha=None)
        return distill(settings, method, out / name, **train)

    return {
        TEACHER: ("Teacher on real digits", teacher),
        DIFFUSION: ("Diffusion model on real digits", diffusion),
        SYNTHETIC: (f"{config.images:,} synthetic digits", lambda: images("diffusion", SYNTHETIC)),
        NOISE: (f"{config.images:,} images of noise", lambda: images("noise", NOISE)),
        SOFT: ("Student: synthetic digits, soft labels", lambda: student(SOFT, SYNTHETIC, "soft")),
        HARD: ("Student: synthetic digits, hard labels", lambda: student(HARD, SYNTHETIC, "hard")),
        FROM_NOISE: ("Student: noise, soft labels", lambda: student(FROM_NOISE, NOISE, "soft")),
    }

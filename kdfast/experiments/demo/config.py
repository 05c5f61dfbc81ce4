"""What ``kdfast demo`` is told: sizes and places."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import annotated_types as at

from kdfast.experiments.common.bounds import Count, Positive, Seed


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Sizes of the demo; the defaults take about four minutes on two CPU cores.

    Attributes:
        out: Directory for everything.
        seed: Same seed, same numbers.
        image_size: Side of the digits in pixels.
        model: Network of teacher and students.
        teacher_epochs: Passes of the teacher over the 1437 real training digits.
        diffusion_steps: Optimiser steps of the diffusion model.
        images: How many it makes, and how many noise images there are.
        steps: Denoising steps an image.
        guidance_scale: s of classifier-free guidance.
        student_epochs: Passes of each student over its images.
        temperature: τ of the distillation.
        batch_size: Images a training step.
        samples_per_shard: Images a shard; a stopped run makes at most so many again.
        loader: ``dali``, or ``torch`` for the plain loader.
        device: ``auto`` takes the GPU if there is one.
        resume: Go on where an earlier demo in ``out`` stopped.
        progress: Show what is going on.
    """

    out: str = "runs/demo"
    seed: Seed = 0
    image_size: Count = 16
    model: str = "resnet8"
    teacher_epochs: Count = 12
    diffusion_steps: Count = 1000
    images: Count = 2000
    steps: Count = 25
    guidance_scale: Annotated[float, at.Ge(1), at.Lt(math.inf)] = 2.0
    student_epochs: Count = 10
    temperature: Positive = 10.0
    batch_size: Count = 64
    samples_per_shard: Count = 500
    loader: Literal["dali", "torch"] = "dali"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    resume: bool = False
    progress: bool = True

"""Samplers over the fused denoising step, drop-ins for diffusers' schedulers; and the synthesizer.

Everything here needs ``pip install "kdfast[diffusion]"``; nothing is imported before it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kdfast.lazy import attributes

if TYPE_CHECKING:
    from kdfast.diffusion.accelerate import accelerate_pipeline, restore_pipeline
    from kdfast.diffusion.schedulers import (
        DDIMScheduler,
        DDPMScheduler,
        DPMSolverMultistepScheduler,
        EulerAncestralDiscreteScheduler,
        EulerDiscreteScheduler,
        FlowMatchEulerDiscreteScheduler,
        LCMScheduler,
    )
    from kdfast.diffusion.synthesizer import SynthesisResult, Synthesizer

_MODULES = {
    "DDIMScheduler": "schedulers",
    "DDPMScheduler": "schedulers",
    "DPMSolverMultistepScheduler": "schedulers",
    "EulerAncestralDiscreteScheduler": "schedulers",
    "EulerDiscreteScheduler": "schedulers",
    "FlowMatchEulerDiscreteScheduler": "schedulers",
    "LCMScheduler": "schedulers",
    "SynthesisResult": "synthesizer",
    "Synthesizer": "synthesizer",
    "accelerate_pipeline": "accelerate",
    "restore_pipeline": "accelerate",
}

__all__ = [
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "LCMScheduler",
    "SynthesisResult",
    "Synthesizer",
    "accelerate_pipeline",
    "restore_pipeline",
]


__getattr__ = attributes(__name__, _MODULES)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})

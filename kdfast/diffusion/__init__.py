"""Samplers over the fused denoising step, drop-ins for diffusers' schedulers; and the synthesizer.

Everything here needs ``pip install "kdfast[diffusion]"``; nothing is imported before it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdfast.diffusion.accelerate import accelerate_pipeline, restore_pipeline
    from kdfast.diffusion.schedulers import DDIMScheduler
    from kdfast.diffusion.schedulers_ddpm import DDPMScheduler
    from kdfast.diffusion.schedulers_dpm import DPMSolverMultistepScheduler
    from kdfast.diffusion.schedulers_euler import (
        EulerAncestralDiscreteScheduler,
        EulerDiscreteScheduler,
        FlowMatchEulerDiscreteScheduler,
    )
    from kdfast.diffusion.schedulers_lcm import LCMScheduler
    from kdfast.diffusion.synthesizer import SynthesisResult, Synthesizer

_MODULES = {
    "DDIMScheduler": "schedulers",
    "DDPMScheduler": "schedulers_ddpm",
    "DPMSolverMultistepScheduler": "schedulers_dpm",
    "EulerAncestralDiscreteScheduler": "schedulers_euler",
    "EulerDiscreteScheduler": "schedulers_euler",
    "FlowMatchEulerDiscreteScheduler": "schedulers_euler",
    "LCMScheduler": "schedulers_lcm",
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


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"kdfast.diffusion.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'kdfast.diffusion' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})

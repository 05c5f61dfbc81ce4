"""Samplers over the fused denoising step, drop-ins for diffusers' schedulers; and the synthesizer.

Everything here needs ``pip install "kdfast[diffusion]"``; nothing is imported before it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdfast.diffusion.schedulers import DDIMScheduler
    from kdfast.diffusion.synthesizer import SynthesisResult, Synthesizer

_MODULES = {
    "DDIMScheduler": "schedulers",
    "DDPMScheduler": "schedulers_ddpm",
    "SynthesisResult": "synthesizer",
    "Synthesizer": "synthesizer",
}

__all__ = ["DDIMScheduler", "DDPMScheduler", "SynthesisResult", "Synthesizer"]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"kdfast.diffusion.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'kdfast.diffusion' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})

"""Drop-ins for diffusers' schedulers over the fused denoising step: one kernel a step, one row of a table each.

=====================================  ==========================================================
:class:`DDIMScheduler`                  Song et al. 2021; any timesteps, in any order
:class:`DDPMScheduler`                  Ho et al. 2020, with learned variances of both kinds
:class:`DPMSolverMultistepScheduler`    Lu et al. 2022; four algorithms, orders 1 to 3
:class:`EulerDiscreteScheduler`,        Karras et al. 2022; plain with churn, and ancestral
:class:`EulerAncestralDiscreteScheduler`
:class:`FlowMatchEulerDiscreteScheduler`  Lipman et al. 2023
:class:`LCMScheduler`                   Luo et al. 2023
=====================================  ==========================================================
"""

from __future__ import annotations

from kdfast.diffusion.schedulers.ddim import DDIMScheduler
from kdfast.diffusion.schedulers.ddpm import DDPMScheduler
from kdfast.diffusion.schedulers.dpm import DPMSolverMultistepScheduler
from kdfast.diffusion.schedulers.euler import EulerAncestralDiscreteScheduler, EulerDiscreteScheduler
from kdfast.diffusion.schedulers.flow import FlowMatchEulerDiscreteScheduler
from kdfast.diffusion.schedulers.lcm import LCMScheduler

__all__ = [
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "LCMScheduler",
]

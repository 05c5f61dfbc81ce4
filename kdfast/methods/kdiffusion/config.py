"""Everything that Kdiffusion sets or leaves open, and which layers it compares."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from kdfast.errors import ConfigError
from kdfast.methods.kdiffusion.branches import Init
from kdfast.methods.kdiffusion.schedule import linear_alpha_hat, reverse_coefficients
from kdfast.models.maps import Layout

__all__ = ["KdiffusionConfig", "Stage"]

Trajectory = Literal["chain", "sampled"]
Estimate = Literal["mean", "last"]
Objective = Literal["diffusion", "average"]


@dataclass(frozen=True)
class KdiffusionConfig:
    """Everything that the paper sets, or leaves open.

    Attributes:
        branches: m, the student's features a stage.
        alpha: α, weight of the middle losses' sum over stages.
        beta: β, weight of the target-guided loss of the last stage; 0 leaves it out.
        objective: ``"diffusion"``, or ``"average"``: α·MSE(x0, mean S), the paper's baseline.
        trajectory: ``"chain"``: X_k = T_k, so that S = x0 costs exactly nothing. ``"sampled"``: X_k is drawn around
            T_k, anew each iteration.
        sigma: σ, the noise of a sampled trajectory.
        shuffle: A random π a stage an iteration; else branch k always takes step k.
        estimate: x̂0 of the guided loss: the ``"mean"`` of the branches, or the ``"last"`` P_m.
        carry_gradient: Whether gradients flow through P_{k−1}.
        bridge: Map each branch to the teacher's channels by a 1×1 convolution and batch norm that all branches of a
            stage share, and that the exported student has not. Without, both must have the same channels.
        teacher_layout: Where the channels of the teacher's 4-d taps are. ``"auto"`` finds out by the layer's modules
            and the image's proportions, and refuses what is ambiguous (:mod:`kdfast.models.layouts`); else
            ``"channels_first"`` or ``"channels_last"``. 3-d taps are tokens ``[B, N, C]`` that form a square, after a
            class token or without.
        init: Where all branches but the first begin: ``"random"`` weights, or ``"copies"`` of the student's, which keep
            what a pretrained student computes.
        steps: n of the linear schedule.
        beta_start: Its first β_t.
        beta_end: Its last β_t.
    """

    branches: int = 10
    alpha: float = 1.0
    beta: float = 1.0
    objective: Objective = "diffusion"
    trajectory: Trajectory = "chain"
    sigma: float = 1.0
    shuffle: bool = True
    estimate: Estimate = "mean"
    carry_gradient: bool = True
    bridge: bool = True
    teacher_layout: Layout = "auto"
    init: Init = "random"
    steps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02

    def __post_init__(self) -> None:
        choices = {
            "objective": Objective,
            "trajectory": Trajectory,
            "estimate": Estimate,
            "teacher_layout": Layout,
            "init": Init,
        }
        for name, kind in choices.items():
            if getattr(self, name) not in get_args(kind):
                raise ConfigError(
                    f"{name}: got {getattr(self, name)!r}, accepted: {', '.join(get_args(kind))}"
                )
        for name in ("alpha", "beta", "sigma"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{name}: got {value}, accepted: a finite number of at least 0")
        try:
            reverse_coefficients(linear_alpha_hat(self.steps, self.beta_start, self.beta_end), self.branches)
        except (ValueError, TypeError) as error:
            raise ConfigError(str(error).replace("m: got", "branches: got", 1)) from None


@dataclass(frozen=True)
class Stage:
    """One student layer that learns from one teacher layer.

    Attributes:
        op: The student's convolution or linear layer, by name.
        teacher: The teacher's layer whose output is x0, by name.
        norm: The student's batch norm right after ``op``, or None.
    """

    op: str
    teacher: str
    norm: str | None = None

"""What a user sets."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from kdfast.errors import ConfigError
from kdfast.models.maps import Layout, Resize

__all__ = ["DiffKDConfig", "Distance", "Kind", "Pair"]

Kind = Literal["feature", "logits"]
Distance = Literal["mse", "attention_mse", "l1", "kl", "dist", "sigmoid"]
FeatureDistance = Literal["mse", "attention_mse", "l1"]
LogitDistance = Literal["kl", "dist", "sigmoid", "mse"]
Tokens = tuple[int, int | None]
Distill = Literal["both", "feature", "logits"]


@dataclass(frozen=True)
class Pair:
    """One place of the student that learns from one place of the teacher.

    Attributes:
        student: Layer of the student by name, as in ``named_modules()``; ``"NAME:input"`` is what goes into it and
            ``":output"`` what the network returns. ``"backbone.fpn:0"`` is one item of what a layer returns and
            ``"backbone.fpn:*"`` every one: a level each. A layer that runs on several levels in a pass (a detector's
            head) stands for all of them, ``"NAME#2"`` for its third call; see
            :class:`kdfast.models.FeatureTaps`.
        teacher: Layer of the teacher; by default of the same name. It has as many levels.
        kind: ``"feature"``: with the autoencoder, compared by ``feature_distance``. ``"logits"``: class scores
            ``[B, C]`` or dense ``[B, C, H, W]``, without, compared by ``logits_distance`` over the classes.
        distance: Instead of the config's.
        weight: λ3 of this pair, times the config's weight of its kind (the paper's detectors: 5, or 15 on RepPoints).
        student_layout: Where the channels of a 4-d output are. ``"auto"`` finds out by the layer's modules and the
            image's proportions, and refuses what is ambiguous (:mod:`kdfast.models.layouts`). 3-d outputs are tokens
            ``[B, N, C]`` that form a square, after a class token or without.
        teacher_layout: The same for the teacher.
        name: In logs; by default the kind. Several levels are numbered, ``NAME_0``, ``NAME_1`` …
        denoiser: Levels and pairs that say the same name share one denoiser (with its autoencoder, adapter and
            projections), trained on all of them; by default each level has its own. They need the same channels.
        background_weight: How much places outside of the objects count in d, 0 to 1; None: as much as any, and no mask
            is needed. ``step`` makes the mask of a detector's boxes, ``loss(foreground=…)`` takes one.
        student_tokens: Which tokens of a 3-d output are the map's, as a slice: ``(5, None)`` leaves out a class token
            and four registers, ``(1, -100)`` YOLOS's detection tokens.
        teacher_tokens: The same for the teacher.
    """

    student: str
    teacher: str | None = None
    kind: Kind = "feature"
    distance: Distance | None = None
    weight: float = 1.0
    student_layout: Layout = "auto"
    teacher_layout: Layout = "auto"
    name: str | None = None
    denoiser: str | None = None
    background_weight: float | None = None
    student_tokens: Tokens | None = None
    teacher_tokens: Tokens | None = None

    def __post_init__(self) -> None:
        _one_of("kind", self.kind, Kind)
        if self.distance is not None:
            _one_of("distance", self.distance, Distance)
            if self.kind == "feature" and self.distance not in get_args(FeatureDistance):
                raise ConfigError(
                    f"distance: got {self.distance!r}, accepted for a feature: {', '.join(get_args(FeatureDistance))} "
                    "(classes are compared with kind='logits')"
                )
        _one_of("student_layout", self.student_layout, Layout)
        _one_of("teacher_layout", self.teacher_layout, Layout)
        _at_least("weight", self.weight, 0)
        if self.background_weight is not None and not 0 <= self.background_weight <= 1:
            raise ConfigError(
                f"background_weight: got {self.background_weight}, accepted: from 0 to 1, or None for no mask"
            )


@dataclass(frozen=True)
class DiffKDConfig:
    """Everything that the paper or its code sets.

    Attributes:
        distill: What a method made without pairs distils: the last ``"feature"`` map, the ``"logits"``, or ``"both"``
            (Table 7).
        student_layer: The feature's layer; by default the last map before pooling, where that is known.
        teacher_layer: The same of the teacher.
        student_logits: Where the student's logits are; ``":output"`` is what it returns. A dense network may be read
            before it enlarges them.
        teacher_logits: The same of the teacher.
        latent_channels: L, width of the autoencoder of features; ``None`` leaves it out (Table 8; CIFAR, detection).
        steps: Network evaluations that clean the student's feature (Fig. 4).
        adapter: Mix with noise by a learned γ; off, the steps start at ``trans(s)`` itself.
        proj: A 1×1 convolution and batch norm after the last step, as in the code; the paper's text has none.
        feature_distance: d of features: ``"mse"``, ``"attention_mse"``, weighted by the teacher's attention, or
            ``"l1"``.
        logits_distance: d of logits: ``"kl"``, ``"dist"`` (†), ``"sigmoid"`` (the divergence of classes that are each
            yes or no, as most detectors' are) or ``"mse"``. A pair of boxes says ``distance="l1"`` itself.
        temperature: τ of KL, DIST and the sigmoid's divergence, above 0.
        dist_beta: β of DIST, between classes.
        dist_gamma: γ of DIST, within classes.
        attention_temperature: Of the attention's softmax, above 0.
        task_weight: Of the cross-entropy with the labels, or of the losses that a detector computes itself.
        diffusion_weight: λ1.
        autoencoder_weight: λ2.
        feature_weight: λ3 of features.
        logits_weight: λ3 of logits.
        label_smoothing: Of the cross-entropy.
        mixup_alpha: Mix images by λ ~ Beta(α, α), one a batch; ``None`` does not.
        cutmix_alpha: The same with boxes; with both, each batch is mixed in one of the two ways.
        train_steps: T of the diffusion's training, 2 · ``steps`` to 1280 (the size of the time embedding).
        beta_start: First β of the linear schedule.
        beta_end: Last.
        resize: ``"student"`` brings a student's map to the teacher's size (averaged where it is larger, bilinear
            where it is smaller); ``"refuse"`` raises.
        checkpoint: Keep none of the steps' activations but their inputs, and compute them again in backward.
        ignore_index: Label of pixels that the cross-entropy leaves out.
    """

    distill: Distill = "both"
    student_layer: str | None = None
    teacher_layer: str | None = None
    student_logits: str = ":output"
    teacher_logits: str = ":output"
    latent_channels: int | None = 1024
    steps: int = 5
    adapter: bool = True
    proj: bool = True
    feature_distance: FeatureDistance = "mse"
    logits_distance: LogitDistance = "kl"
    temperature: float = 1.0
    dist_beta: float = 1.0
    dist_gamma: float = 1.0
    attention_temperature: float = 0.5
    task_weight: float = 1.0
    diffusion_weight: float = 1.0
    autoencoder_weight: float = 1.0
    feature_weight: float = 1.0
    logits_weight: float = 1.0
    label_smoothing: float = 0.0
    mixup_alpha: float | None = None
    cutmix_alpha: float | None = None
    train_steps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    resize: Resize = "student"
    checkpoint: bool = False
    ignore_index: int = 255

    def __post_init__(self) -> None:
        choices = {
            "distill": Distill,
            "feature_distance": FeatureDistance,
            "logits_distance": LogitDistance,
            "resize": Resize,
        }
        for name, kind in choices.items():
            _one_of(name, getattr(self, name), kind)
        for name in ("temperature", "attention_temperature"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name}: got {value}, accepted: a number above 0")
        weights = [name for name in vars(self) if name.endswith("_weight")]
        for name in (*weights, "dist_beta", "dist_gamma"):
            _at_least(name, getattr(self, name), 0)
        for name in ("mixup_alpha", "cutmix_alpha"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name}: got {value}, accepted: a number above 0, or null for none")
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"label_smoothing: got {self.label_smoothing}, accepted: from 0 to below 1")
        if self.latent_channels is not None and self.latent_channels < 1:
            raise ConfigError(
                f"latent_channels: got {self.latent_channels}, accepted: at least 1, or null for none"
            )
        if self.steps < 1:
            raise ConfigError(f"steps: got {self.steps}, accepted: at least 1")
        if not 2 * self.steps <= self.train_steps <= 1280:
            raise ConfigError(
                f"train_steps: got {self.train_steps}, accepted: {2 * self.steps} (twice the steps) to 1280"
            )
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ConfigError(
                f"beta_start, beta_end: got {self.beta_start}, {self.beta_end}, accepted: ascending, between 0 and 1"
            )


def _one_of(name: str, value: object, kind: object) -> None:
    if value not in get_args(kind):
        raise ConfigError(f"{name}: got {value!r}, accepted: {', '.join(get_args(kind))}")


def _at_least(name: str, value: float, lowest: float) -> None:
    if not (math.isfinite(value) and value >= lowest):
        raise ConfigError(f"{name}: got {value}, accepted: a finite number of at least {lowest}")

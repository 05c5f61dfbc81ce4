"""Everything that SSD-KD sets, or leaves open."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from kdfast.errors import ConfigError

Source = Literal["meta", "scratch", "persistent", "pixels"]
Meta = Literal["fomaml", "reptile"]
Target = Literal["random", "teacher"]
Norm = Literal["norm", "squared"]
Sampling = Literal["priority", "modulated", "uniform"]
Keep = Literal["best", "last"]
Eviction = Literal["fifo", "lowest", "class_balanced"]
Duplicates = Literal["last", "max"]

_CHOICES = {
    "generator": Source,
    "meta": Meta,
    "target": Target,
    "bn_norm": Norm,
    "sampling": Sampling,
    "keep_images": Keep,
    "eviction": Eviction,
    "duplicates": Duplicates,
}
_COUNTS = (
    "capacity",
    "synthesis_batch",
    "latent",
    "inversion_steps",
    "generator_width",
    "upsamplings",
    "kd_passes",
)
_NOT_NEGATIVE = (
    "bn",
    "oh",
    "adv",
    "tv",
    "l2",
    "act",
    "balance",
    "gamma",
    "alpha",
    "beta",
    "eps",
)
_POSITIVE = ("temperature", "priority_temperature", "lr_z", "lr_g")


@dataclass(frozen=True)
class SSDKDConfig:
    """How images are made, kept, drawn and learned from.

    The authors published neither code nor coefficients. [P] is the paper's, [F] that of Fast-Datafree's published code,
    on which the paper builds, [D] our choice where both are silent.

    Attributes:
        capacity: |B|, images the buffer holds [P: 5000].
        fill_epochs: Rounds of inversion before the first distillation step; 20 times 256 images just fill the buffer
            [F]. The adversarial term begins one round before their end.
        kd_passes: Distillation steps an epoch, in passes over the buffer: ⌈|B| / batch⌉ times this [D].
        kd_steps: That number itself instead.
        temperature: T of the student's loss, T²·KL [F: 20].
        synthesis_batch: Images a round [F].
        inversion_steps: T_g, optimiser steps a round [D: 5 of 2, 5 and 10].
        lr_z: Adam's rate for the latents, or for the pixels [F, by T_g].
        lr_g: Its rate for the generator; the meta-generator's is ``inversion_steps`` times it [F, by T_g].
        latent: Length of z [F].
        generator: What images come from. ``"meta"``: a clone of a meta-learned generator, and z, adapted each round
            [F]. ``"scratch"``: a fresh generator each round (Algorithm 1, line 4). ``"persistent"``: one generator
            trained on, z drawn anew each step (DAFL, DFQ). ``"pixels"``: none, pixels are optimised (DeepInversion).
        meta: How the meta-generator learns from its clone: ``"fomaml"`` sums the clone's gradients, ``"reptile"``
            follows the difference of weights.
        generator_width: Channels before the last convolution; twice as many earlier [F: 64].
        upsamplings: Doublings from the generator's first map to the image [F: 2].
        reset_round: Rounds after ``fill_epochs`` at which the generator's first layer is drawn again; ``None`` never
            [F: 120].
        keep_images: Those of the round's ``"best"`` step, that of the lowest loss [F], or of its ``"last"``.
        bn: Weight of the batch-norm statistics' distance [F, by networks].
        bn_norm: That distance as a ``"norm"`` [F] or ``"squared"`` (Eq. 1).
        bn_momentum: Share of the moving average over rounds in the statistics that are compared [F: 0.9]; 0 for none.
        oh: Weight of φ times the cross-entropy.
        adv: Weight of the disagreement between teacher and student.
        adv_mask: Count it only where both predict the same class [F].
        target: The cross-entropy's classes, ``"random"`` ones [F] or the ``"teacher"``'s own prediction (section 3.1).
            For segmentation ``"random"`` draws one class an image [D].
        tv: Weight of the total variation of images (DeepInversion).
        l2: Weight of their norm (DeepInversion).
        act: Weight of the mean activation before the teacher's classifier, to be large (DAFL).
        balance: Weight of the entropy of the batch's mean prediction, to be large (DAFL, DFQ).
        gamma: γ of φ's difficulty term [D: 2].
        diversity: Whether φ has its diversity term.
        difficulty: Whether φ has its difficulty term.
        phi_gradient: Whether gradients flow through the difficulty term, as in the focal loss [D].
        replay: Whether there is a buffer at all. Without, each distillation step makes new images (DAFL, DFQ).
        sampling: ``"priority"``: by δ, as Eq. 4 has it. ``"modulated"``: by φ·δ, φ by the buffer as it is when a row is
            scored (sections 3.2 and 3.4 can be read so). ``"uniform"``: no priorities, no re-scoring.
        alpha: α of Eq. 6 [D].
        beta: β of Eq. 5 [D]; αβ must be below 1.
        eps: ε of Eq. 6 [D].
        priority_temperature: T of the priority's KL [D: 1, as Eq. 4 has none].
        weight_in_loss: Whether the importance weight multiplies the student's loss too [D: no, as printed].
        max_normalize: Divide weights by the batch's largest (Schaul et al. 2016) [D: no, as printed].
        stratified: One draw in each of equal parts of the priorities' total (Schaul et al. 2016) [D].
        eviction: Who makes room: ``"fifo"`` [P], ``"lowest"`` priority, or ``"class_balanced"``.
        duplicates: Which new priority counts if a row was drawn twice: the ``"last"`` or the ``"max"`` [D].
        padding: Pixels of the random crop's zero padding, in inversion and distillation [F: 4].
        flip: Mirror images at random in both [F].
        cuda_graphs: Capture the inversion step and the distillation step on CUDA.
    """

    capacity: int = 5000
    fill_epochs: int = 20
    kd_passes: int = 1
    kd_steps: int | None = None
    temperature: float = 20.0
    synthesis_batch: int = 256
    inversion_steps: int = 5
    lr_z: float = 0.01
    lr_g: float = 3e-3
    latent: int = 256
    generator: Source = "meta"
    meta: Meta = "fomaml"
    generator_width: int = 64
    upsamplings: int = 2
    reset_round: int | None = 120
    keep_images: Keep = "best"
    bn: float = 10.0
    bn_norm: Norm = "norm"
    bn_momentum: float = 0.9
    oh: float = 0.4
    adv: float = 1.1
    adv_mask: bool = True
    target: Target = "random"
    tv: float = 0.0
    l2: float = 0.0
    act: float = 0.0
    balance: float = 0.0
    gamma: float = 2.0
    diversity: bool = True
    difficulty: bool = True
    phi_gradient: bool = True
    replay: bool = True
    sampling: Sampling = "priority"
    alpha: float = 0.6
    beta: float = 0.4
    eps: float = 1e-6
    priority_temperature: float = 1.0
    weight_in_loss: bool = False
    max_normalize: bool = False
    stratified: bool = True
    eviction: Eviction = "fifo"
    duplicates: Duplicates = "last"
    padding: int = 4
    flip: bool = True
    cuda_graphs: bool = True

    def __post_init__(self) -> None:
        for name, kind in _CHOICES.items():
            if getattr(self, name) not in get_args(kind):
                raise ConfigError(
                    f"{name}: got {getattr(self, name)!r}, accepted: {', '.join(get_args(kind))}"
                )
        for name in _COUNTS:
            _check(name, getattr(self, name) >= 1, getattr(self, name), "at least 1")
        for name in ("kd_steps", "reset_round"):
            value = getattr(self, name)
            _check(name, value is None or value >= 1, value, "at least 1, or null")
        for name in ("fill_epochs", "padding"):
            _check(name, getattr(self, name) >= 0, getattr(self, name), "at least 0")
        for name in _NOT_NEGATIVE:
            value = getattr(self, name)
            _check(name, math.isfinite(value) and value >= 0, value, "a finite number of at least 0")
        for name in _POSITIVE:
            value = getattr(self, name)
            _check(name, math.isfinite(value) and value > 0, value, "a finite number above 0")
        _check("bn_momentum", 0 <= self.bn_momentum < 1, self.bn_momentum, "at least 0 and below 1")
        self._check_together()

    def _check_together(self) -> None:
        if self.alpha * self.beta >= 1:
            raise ConfigError(
                f"alpha, beta: got {self.alpha} and {self.beta}, whose product is {self.alpha * self.beta:g}, "
                "accepted: below 1 (re-scoring oscillates or diverges from there)"
            )
        if self.synthesis_batch > self.capacity and self.replay:
            raise ConfigError(
                f"synthesis_batch: got {self.synthesis_batch}, accepted: at most capacity, {self.capacity}"
            )
        if self.sampling == "modulated" and not self.modulates:
            raise ConfigError(
                "sampling: got modulated, accepted: priority or uniform, as diversity and difficulty are off and φ is 1"
            )
        if not self.replay:
            if self.generator != "persistent":
                raise ConfigError(
                    f"replay: got no, accepted: yes, unless generator is persistent (it is {self.generator})"
                )
            if self.kd_steps is None:
                raise ConfigError(
                    "kd_steps: got null, accepted: a number, as there is no buffer to pass over"
                )
            # Both read the buffer; silently doing nothing would be a lie.
            _check("diversity", not self.diversity, self.diversity, "no, as there is no buffer to count in")
            _check("sampling", self.sampling == "uniform", self.sampling, "uniform, as there is no buffer")

    def steps_per_epoch(self, batch_size: int) -> int:
        """T_kd: distillation steps after each round of inversion."""
        if self.kd_steps is not None:
            return self.kd_steps
        return math.ceil(self.capacity / batch_size) * self.kd_passes

    @property
    def modulates(self) -> bool:
        """Whether φ is anything but 1."""
        return self.diversity or self.difficulty


def _check(name: str, holds: bool, got: object, accepted: str) -> None:
    if not holds:
        raise ConfigError(f"{name}: got {got}, accepted: {accepted}")

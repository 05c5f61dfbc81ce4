"""Baselines on features: FitNet, AT, RKD."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdfast.errors import ConfigError
from kdfast.functional import kd_kl_div
from kdfast.methods.baselines.base import FeatureBaseline, FeatureConfig
from kdfast.models.maps import fit

__all__ = [
    "AT",
    "RKD",
    "ATConfig",
    "FitNet",
    "FitNetConfig",
    "RKDConfig",
    "angle_loss",
    "attention_map",
    "distance_loss",
]


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


@dataclass(frozen=True, kw_only=True)
class FitNetConfig(FeatureConfig):
    """Romero et al. 2015, trained at once rather than in two stages, as CRD's benchmark does.

    Attributes:
        weight: Of the hint loss.
        kd_weight: Of τ²·KL beside it; 0 leaves it out.
        temperature: τ, above 0.
        regressor: ``True``: a 1×1 convolution, batch norm and ReLU from the student's channels to the teacher's, which
            the exported student has not. ``"conv"``: the convolution alone (with ``kd_weight=0`` the MSE of DiffKD's
            Tables 2 and 7). ``False``: none, and both must have the same channels.
    """

    weight: float = 100.0
    kd_weight: float = 0.0
    temperature: float = 4.0
    regressor: bool | Literal["conv"] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.regressor not in (True, False, "conv"):
            raise ConfigError(f"regressor: got {self.regressor!r}, accepted: true, false, conv")


class FitNet(FeatureBaseline[FitNetConfig]):
    """mean((r(f_s) − f_t)²) (Romero et al. 2015, "FitNets: hints for thin deep nets", Eq. 3, as a mean)."""

    CONFIG = FitNetConfig

    @property
    def reads_logits(self) -> bool:
        """For the KL beside the hint."""
        return self.config.kd_weight > 0

    def prepare(self, images: Tensor | None) -> None:
        """Make the regressors.

        Raises:
            ValueError: Channels differ without one.
        """
        super().prepare(images)
        self.regressors = nn.ModuleList()
        for student, teacher in self.probe(images):
            channels = (student.shape[1], teacher.shape[1])
            if not self.config.regressor:
                if channels[0] != channels[1]:
                    raise ValueError(
                        f"regressor: got False, and the layers have {channels[0]} and {channels[1]} channels; they "
                        "must match"
                    )
                continue
            layers: list[nn.Module] = [nn.Conv2d(*channels, 1)]
            if self.config.regressor != "conv":
                layers += [nn.BatchNorm2d(channels[1]), nn.ReLU()]
            self.regressors.append(nn.Sequential(*layers).to(student.device))

    def term(self, student: Tensor, teacher: Tensor, *, target: Tensor | None) -> Tensor:
        """``weight``·hint, summed over layers, and KL if it has a weight."""
        config = self.config
        loss = student.new_zeros((), dtype=torch.float32)
        for number, (own, other) in enumerate(self.features()):
            own = fit(own, (other.shape[2], other.shape[3]), "student", "the layers")
            own = self.regressors[number](own) if config.regressor else own
            loss = loss + config.weight * F.mse_loss(_wide(own), _wide(other))
        if config.kd_weight:
            kl = kd_kl_div(student, teacher, config.temperature, dim=1, reduction="rowmean")
            loss = loss + config.kd_weight * kl
        return loss


@dataclass(frozen=True, kw_only=True)
class ATConfig(FeatureConfig):
    """Zagoruyko & Komodakis 2017.

    Attributes:
        weight: β of their code, 1000.
    """

    weight: float = 1000.0


class AT(FeatureBaseline[ATConfig]):
    """Mean squared difference of normalised attention maps (Zagoruyko & Komodakis 2017, "Paying more attention to
    attention", Eq. 2 with p = 2, squared and averaged as in their code).
    """

    CONFIG = ATConfig

    def term(self, student: Tensor, teacher: Tensor, *, target: Tensor | None) -> Tensor:
        """``weight``·Σ over layers."""
        loss = student.new_zeros((), dtype=torch.float32)
        for own, other in self.features():
            own = fit(own, (other.shape[2], other.shape[3]), "student", "the layers")
            loss = loss + (attention_map(own) - attention_map(other)).square().mean()
        return self.config.weight * loss


def attention_map(feature: Tensor) -> Tensor:
    """mean_c(f²), flattened and of length 1 for each sample: ``[B, C, H, W]`` to ``[B, H·W]``."""
    return F.normalize(_wide(feature).square().mean(1).flatten(1))


@dataclass(frozen=True, kw_only=True)
class RKDConfig(FeatureConfig):
    """Park et al. 2019.

    Attributes:
        distance_weight: Of the distances between pairs, 25.
        angle_weight: Of the angles of triplets, 50.
    """

    distance_weight: float = 25.0
    angle_weight: float = 50.0


class RKD(FeatureBaseline[RKDConfig]):
    """Distances and angles between the pooled features of a batch (Park et al. 2019, "Relational knowledge
    distillation", Eqs. 5 to 9).
    """

    CONFIG = RKDConfig

    def term(self, student: Tensor, teacher: Tensor, *, target: Tensor | None) -> Tensor:
        """The weighted sum over layers."""
        config = self.config
        loss = student.new_zeros((), dtype=torch.float32)
        for own, other in self.features():
            a, b = _wide(own.mean((2, 3))), _wide(other.mean((2, 3)))
            loss = (
                loss + config.distance_weight * distance_loss(a, b) + config.angle_weight * angle_loss(a, b)
            )
        return loss


def distance_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber loss of all distances between rows ``[B, C]``, each in units of their mean (Eqs. 5 and 6)."""
    return F.smooth_l1_loss(_distances(student), _distances(teacher))


def _distances(x: Tensor) -> Tensor:
    squares = (x.square().sum(1)[:, None] + x.square().sum(1) - 2 * x @ x.T).clamp_min(1e-12)
    # A sample's distance to itself is no relation, and the root has no slope there.
    other = ~torch.eye(len(x), dtype=torch.bool, device=x.device)
    distances = torch.where(other, squares, 1.0).sqrt() * other
    return distances / (distances.sum() / max(1, len(x) * (len(x) - 1))).clamp_min(1e-12)


def angle_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber loss of the cosines of all angles between three rows ``[B, C]`` (Eqs. 7 and 8)."""
    return F.smooth_l1_loss(_cosines(student), _cosines(teacher))


def _cosines(x: Tensor) -> Tensor:
    towards = F.normalize(x[None] - x[:, None], dim=2)
    return towards @ towards.transpose(1, 2)

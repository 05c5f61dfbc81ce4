"""Baselines on logits: KD, DKD, DIST. Their terms are :mod:`kdfast.functional`'s fused losses."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kdfast.functional import dist_loss, dkd_loss, kd_kl_div
from kdfast.methods.baselines.base import Baseline, BaselineConfig

__all__ = ["DIST", "DKD", "KD", "DISTConfig", "DKDConfig", "KDConfig"]


@dataclass(frozen=True, kw_only=True)
class KDConfig(BaselineConfig):
    """Hinton et al. 2015. The defaults are those of the CIFAR-100 benchmark of CRD (Tian et al. 2020): 0.1·CE + 0.9·KD.

    Attributes:
        temperature: τ, above 0.
        weight: Of τ²·KL.
        task_weight: Of the cross-entropy with the labels.
    """

    temperature: float = 4.0
    weight: float = 0.9
    task_weight: float = 0.1


class KD(Baseline[KDConfig]):
    """τ²·KL(teacher ‖ student) (Hinton et al. 2015, "Distilling the knowledge in a neural network")."""

    CONFIG = KDConfig

    def term(self, student: Tensor, teacher: Tensor, *, target: Tensor | None) -> Tensor:
        """``weight``·τ²·KL, the mean over samples and pixels."""
        config = self.config
        return config.weight * kd_kl_div(student, teacher, config.temperature, dim=1, reduction="rowmean")


@dataclass(frozen=True, kw_only=True)
class DKDConfig(BaselineConfig):
    """Zhao et al. 2022. The defaults are theirs for CIFAR-100; for ImageNet τ = 1, β = 0.5.

    Attributes:
        temperature: τ, above 0.
        alpha: α, of the target class.
        beta: β, of the others (1 to 8 by pair on CIFAR-100).
    """

    temperature: float = 4.0
    alpha: float = 1.0
    beta: float = 8.0


class DKD(Baseline[DKDConfig]):
    """α·TCKD + β·NCKD (Zhao et al. 2022, "Decoupled knowledge distillation", Eq. 7).

    Their warm-up of 20 epochs is not here. Needs labels, and one of them an image: mixing is refused.
    """

    CONFIG = DKDConfig

    def prepare(self, images: Tensor | None) -> None:
        """Refuse what the loss is not defined for."""
        if self.config.mixup_alpha is not None or self.config.cutmix_alpha is not None:
            raise ValueError(
                "mixup_alpha, cutmix_alpha: DKD is defined for one class an image; accepted: null"
            )

    def term(self, student: Tensor, teacher: Tensor, *, target: Tensor | None) -> Tensor:
        """α·TCKD + β·NCKD.

        Raises:
            ValueError: There are no labels.
        """
        if target is None:
            raise ValueError("target: got None; DKD needs labels")
        config = self.config
        return dkd_loss(
            student,
            teacher,
            target,
            alpha=config.alpha,
            beta=config.beta,
            temperature=config.temperature,
            dim=1,
            # A class of an image may have that number; a pixel with it does not count.
            ignore_index=config.ignore_index if target.dim() > 1 else -100,
            reduction="rowmean",
        )


@dataclass(frozen=True, kw_only=True)
class DISTConfig(BaselineConfig):
    """Huang et al. 2022. The defaults are theirs for CIFAR-100; for ImageNet τ = 1.

    Attributes:
        temperature: τ, above 0.
        beta: β, between classes.
        gamma: γ, within classes.
    """

    temperature: float = 4.0
    beta: float = 2.0
    gamma: float = 2.0


class DIST(Baseline[DISTConfig]):
    """Correlations within samples and within classes (Huang et al. 2022, "Knowledge distillation from a stronger
    teacher", Eqs. 6 to 9).
    """

    CONFIG = DISTConfig

    def term(self, student: Tensor, teacher: Tensor, *, target: Tensor | None) -> Tensor:
        """β·inter + γ·intra, times τ²."""
        config = self.config
        return dist_loss(
            student, teacher, beta=config.beta, gamma=config.gamma, temperature=config.temperature, dim=1
        )

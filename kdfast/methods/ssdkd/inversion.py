"""Inversion of the teacher: a round of T_g steps that ends with new images (Algorithm 1, lines 4 to 10).

loss = bn·L_BN + oh·mean(φ·CE) − adv·mean(mask·KL(t‖s))      L_BN: Eq. 1, φ: Eq. 3, T = 1
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from kdfast.errors import ConfigError
from kdfast.functional import kd_kl_div
from kdfast.methods.ssdkd.capture import CapturedStep, capturable
from kdfast.methods.ssdkd.config import SSDKDConfig
from kdfast.methods.ssdkd.generator import Generator, Pixels
from kdfast.methods.ssdkd.views import Views
from kdfast.models.modes import evaluated
from kdfast.models.outputs import logits_of
from kdfast.nn import BNStatisticsLoss
from kdfast.replay import modulation

__all__ = ["Inversion"]

# Fast-Datafree's factor of θ − θ_clone. Adam, which follows, takes out any factor: it is no option.
REPTILE_RATE = 67.0

TERMS = ("inversion_loss", "bn", "oh", "adv", "phi")


class Inversion:
    """Makes images that the teacher is sure of and the student is not.

    All tensors that a step works on stay where they are, so that a step can be captured as a CUDA graph.

    Args:
        teacher: Frozen, in evaluation mode.
        config: The method's.
        image_shape: (C, H, W).
        num_classes: Of the teacher.
        views: Draws random views.
        rng: On the device.
        device: Where everything is.
    """

    def __init__(
        self,
        teacher: nn.Module,
        config: SSDKDConfig,
        image_shape: Sequence[int],
        num_classes: int,
        views: Views,
        rng: torch.Generator,
        device: torch.device,
    ) -> None:
        self.config, self.views, self.rng, self.device = config, views, rng, device
        self.teacher = teacher
        self.statistics = _statistics(teacher, config) if config.bn else None
        batch = config.synthesis_batch
        pixels, persistent = config.generator == "pixels", config.generator == "persistent"
        latent = (batch, *image_shape) if pixels else (batch, config.latent)
        self.z = torch.zeros(latent, device=device, requires_grad=not persistent)
        # What a round adapts, and (meta) what it starts from.
        self.model: Generator | Pixels = Pixels() if pixels else self._make_generator(image_shape)
        self.origin: Generator | None = None
        if config.generator == "meta":
            self.origin = self._make_generator(image_shape)
        self._parameters: list[Tensor] = list(self.model.parameters())
        groups: list[dict[str, Any]] = []
        if self._parameters:
            groups.append({"params": self._parameters, "lr": config.lr_g})
        if not persistent:
            groups.append({"params": [self.z], "lr": config.lr_z})
        self._moved = [parameter for group in groups for parameter in group["params"]]
        capture = capturable(device, wanted=config.cuda_graphs)
        self._optimizer = _adam(groups, config.lr_g, capture)
        self._origin_gradients: list[Tensor] = []
        if self.origin is not None:
            rate = config.lr_g * config.inversion_steps
            self._origin_optimizer = _adam(list(self.origin.parameters()), rate, capture=False)
            self._origin_gradients = [torch.zeros_like(p) for p in self.origin.parameters()]
        self.best = torch.zeros(batch, *image_shape, device=device)
        self._best_loss = torch.zeros((), device=device)
        self._targets = torch.zeros(batch, dtype=torch.int64, device=device)
        self._counts = torch.zeros(num_classes, dtype=torch.int64, device=device)
        self._sums = torch.zeros(len(TERMS), device=device)
        self._features: Tensor | None = None
        self._handle: RemovableHandle | None = None
        self._steps: dict[Any, CapturedStep] = {}
        self.rounds = 0

    def _make_generator(self, image_shape: Sequence[int]) -> Generator:
        config = self.config
        return Generator(
            config.latent,
            image_shape,
            width=config.generator_width,
            upsamplings=config.upsamplings,
            rng=self.rng,
            device=self.device,
        )

    # --- a round --------------------------------------------------------------------------------------------

    def run(self, student: nn.Module, class_counts: Tensor) -> Tensor:
        """T_g steps.

        Args:
            student: Put into evaluation mode meanwhile. Its weights get no gradient.
            class_counts: int64 ``[num_classes]``, what the buffer holds.

        Returns:
            Images ``[B, C, H, W]`` in [0, 1], of the step with the lowest loss; overwritten by the next round.
        """
        config = self.config
        adversarial = config.adv > 0 and self.rounds >= config.fill_epochs - 1
        self._begin(class_counts)
        self._watch(True)
        with ExitStack() as undo:
            undo.callback(self._watch, False)
            undo.enter_context(evaluated(student))
            key = (id(student), adversarial, torch.is_autocast_enabled(self.device.type))
            if key not in self._steps:
                self._steps[key] = CapturedStep(
                    lambda: self._step(student, adversarial),
                    self.rng,
                    capture=capturable(self.device, wanted=config.cuda_graphs),
                )
            for _ in range(config.inversion_steps):
                self._steps[key]()
        self._end()
        return self.best

    @torch.no_grad()
    def fresh(self) -> Tensor:
        """Images of newly drawn latents, by the persistent generator."""
        self.z.normal_(generator=self.rng)
        images: Tensor = self.model(self.z)
        return images

    @property
    def means(self) -> dict[str, Tensor]:
        """The terms' means over the last round's steps, 0-d."""
        return dict(zip(TERMS, (self._sums / self.config.inversion_steps).unbind()))

    @torch.no_grad()
    def _begin(self, class_counts: Tensor) -> None:
        config = self.config
        if config.reset_round is not None and self.rounds == config.fill_epochs + config.reset_round - 1:
            lasting = self.origin if self.origin is not None else self.model
            if isinstance(lasting, Generator):
                lasting.reset_first_layer(self.rng)
        self.z.normal_(generator=self.rng)
        self._targets.random_(0, len(self._counts), generator=self.rng)
        self._counts.copy_(class_counts)
        self._best_loss.fill_(torch.inf)
        self._sums.zero_()
        if config.generator == "scratch" and isinstance(self.model, Generator):
            self.model.initialise(self.rng)
        if self.origin is not None:
            torch._foreach_copy_(self._parameters, list(self.origin.parameters()))
            torch._foreach_zero_(self._origin_gradients)
        if config.generator != "persistent":
            _restart(self._optimizer)

    @torch.no_grad()
    def _end(self) -> None:
        self.rounds += 1
        if self.statistics is not None:
            self.statistics.update_average()
        if self.origin is None:
            return
        origin: list[Tensor] = list(self.origin.parameters())
        if self.config.meta == "reptile":
            difference = torch._foreach_sub(origin, self._parameters)
            torch._foreach_add_(self._origin_gradients, difference, alpha=REPTILE_RATE)
        for parameter, gradient in zip(origin, self._origin_gradients):
            parameter.grad = gradient
        self._origin_optimizer.step()

    # --- a step ---------------------------------------------------------------------------------------------

    def _step(self, student: nn.Module, adversarial: bool) -> None:
        if self.config.generator == "persistent":
            self.z.normal_(generator=self.rng)
        images = self.model(self.z)
        loss, terms = self._loss(images, student, adversarial)
        # Gradients of these only: the weights of teacher and student cost nothing.
        gradients = torch.autograd.grad(loss, self._moved)
        with torch.no_grad():
            self._keep(images, loss)
            self._sums += torch.stack([term.float() for term in (loss, *terms)])
            if self._origin_gradients and self.config.meta == "fomaml":
                torch._foreach_add_(self._origin_gradients, gradients[: len(self._parameters)])
        for parameter, gradient in zip(self._moved, gradients):
            parameter.grad = gradient
        self._optimizer.step()

    def _keep(self, images: Tensor, loss: Tensor) -> None:
        """Remember the best images on the device: which they are, the host never asks."""
        if self.config.keep_images == "last":
            self.best.copy_(images)
            return
        better = loss < self._best_loss
        self.best.copy_(torch.where(better, images, self.best))
        self._best_loss.copy_(torch.where(better, loss, self._best_loss))

    def _loss(
        self, images: Tensor, student: nn.Module, adversarial: bool
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
        config = self.config
        views = self.views(images)
        logits = logits_of(self.teacher(views)).float()
        zero = logits.new_zeros(())
        bn = zero if self.statistics is None else self.statistics.loss()
        task, phi = self._task(logits) if config.oh else (zero, zero)
        disagreement = self._disagreement(logits_of(student(views)).float(), logits) if adversarial else zero
        loss = config.bn * bn + config.oh * task - config.adv * disagreement
        loss = loss + self._priors(views, logits)
        return loss, (bn.detach(), task.detach(), disagreement.detach(), phi.detach())

    def _task(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """mean(φ·CE) and the mean of φ; each pixel of a segmentation counts as a sample."""
        config = self.config
        probability, predicted = logits.softmax(1).max(1)
        target = predicted
        if config.target == "random":
            target = self._targets.view(-1, *[1] * (logits.dim() - 2)).expand_as(predicted)
        cross_entropy = F.cross_entropy(logits, target, reduction="none")
        if not config.modulates:
            return cross_entropy.mean(), torch.ones_like(cross_entropy).mean()
        counts = self._counts if config.diversity else torch.zeros_like(self._counts)
        phi = modulation(
            probability if config.phi_gradient else probability.detach(),
            predicted,
            counts,
            counts.sum(),
            config.gamma if config.difficulty else 0.0,
        )
        return (phi * cross_entropy).mean(), phi.mean()

    def _disagreement(self, student: Tensor, teacher: Tensor) -> Tensor:
        mask = student.argmax(1) == teacher.argmax(1) if self.config.adv_mask else None
        return kd_kl_div(student, teacher, 1.0, dim=1, reduction="none", mask=mask).mean()

    def _priors(self, views: Tensor, logits: Tensor) -> Tensor:
        """What DeepInversion (tv, l2), DAFL (act, balance) and DFQ (balance) ask of images or predictions."""
        config = self.config
        total = logits.new_zeros(())
        if config.tv:
            total = total + config.tv * total_variation(views)
        if config.l2:
            total = total + config.l2 * torch.linalg.vector_norm(views.flatten(1), dim=1).mean()
        if config.act:
            assert self._features is not None
            total = total - config.act * self._features.float().abs().mean()
        if config.balance:
            mean = logits.softmax(1).mean([0, *range(2, logits.dim())])
            total = total + config.balance * torch.special.xlogy(mean, mean).sum()
        return total

    # --- the teacher's hooks ---------------------------------------------------------------------------------

    def _watch(self, on: bool) -> None:
        """Hooks are there during a round and gone for distillation."""
        if self.statistics is not None:
            (self.statistics.attach if on else self.statistics.detach)()
        if not self.config.act:
            return
        if not on:
            if self._handle is not None:
                self._handle.remove()
            self._handle = self._features = None
            return
        find = getattr(self.teacher, "get_classifier", None)
        if find is None:
            raise ConfigError("act: the teacher has no get_classifier(), accepted: 0")
        self._handle = find().register_forward_pre_hook(self._keep_features)

    def _keep_features(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._features = inputs[0]

    # --- state ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What the next round starts from; copies."""
        state: dict[str, Any] = {"rounds": self.rounds}
        if self.statistics is not None:
            state["statistics"] = self.statistics.state_dict()
        if self.origin is not None:
            state |= {
                "generator": self.origin.state_dict(),
                "optimizer": self._origin_optimizer.state_dict(),
            }
        elif self.config.generator == "persistent":
            state |= {"generator": self.model.state_dict(), "optimizer": self._optimizer.state_dict()}
        return copy.deepcopy(state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put it back."""
        self.rounds = int(state["rounds"])
        if self.statistics is not None:
            self.statistics.load_state_dict(state["statistics"])
        self._steps.clear()  # graphs hold the addresses of what an optimiser's loading replaces
        if self.origin is not None:
            self.origin.load_state_dict(state["generator"])
            self._origin_optimizer.load_state_dict(state["optimizer"])
        elif self.config.generator == "persistent":
            self.model.load_state_dict(state["generator"])
            self._optimizer.load_state_dict(state["optimizer"])


def total_variation(images: Tensor) -> Tensor:
    """Norms of the differences to the neighbours right, below and on both diagonals, summed (Yin et al. 2020)."""
    right = images[..., :, 1:] - images[..., :, :-1]
    below = images[..., 1:, :] - images[..., :-1, :]
    falling = images[..., 1:, 1:] - images[..., :-1, :-1]
    rising = images[..., 1:, :-1] - images[..., :-1, 1:]
    norms = [torch.linalg.vector_norm(part) for part in (right, below, falling, rising)]
    return torch.stack(norms).sum()


def _statistics(teacher: nn.Module, config: SSDKDConfig) -> BNStatisticsLoss:
    try:
        return BNStatisticsLoss(teacher, squared=config.bn_norm == "squared", momentum=config.bn_momentum)
    except ValueError as error:
        raise ConfigError(f"bn: got {config.bn}, accepted: 0 for this teacher ({error})") from error


def _adam(parameters: Any, rate: float, capture: bool) -> torch.optim.Adam:
    return torch.optim.Adam(parameters, lr=rate, betas=(0.5, 0.999), capturable=capture, foreach=True)


def _restart(optimizer: torch.optim.Optimizer) -> None:
    """As if it were new, with its tensors where they were."""
    for state in optimizer.state.values():
        for value in state.values():
            value.zero_()

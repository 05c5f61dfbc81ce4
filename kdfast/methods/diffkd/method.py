"""The method: taps on both networks, and a :class:`Denoising` for each pair of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from kdfast.errors import KDFastError
from kdfast.methods.diffkd.config import DiffKDConfig, Pair
from kdfast.methods.diffkd.denoising import Denoising, Terms
from kdfast.methods.diffkd.levels import Level, find_levels, pair_names
from kdfast.models import FeatureTaps
from kdfast.models.maps import Shared, last_feature, probe_images
from kdfast.models.modes import evaluated
from kdfast.models.roles import still_evaluated
from kdfast.training.learning import OWN
from kdfast.training.supervised import run
from kdfast.training.taught import Foreground, Taught

__all__ = ["DiffKD"]


class DiffKD(Taught):
    """Adds the paper's losses to a student's task loss.

    Make it first and the optimizer then, over ``method.parameters()``: those are the student's and the method's own
    (:meth:`param_groups` keeps them apart). The teacher is no submodule, and is not saved.

    Args:
        student: Any module.
        teacher: Any module in evaluation mode whose parameters do not require grad.
        pairs: Where to distil. By default what ``config.distill`` says: the last feature map and the logits.
        config: Fields of the method.
        images: Some inputs ``[B, …]`` for both networks, on their device, of which one pass finds out the shapes; a
            list of images for torchvision's detectors, keywords for 🤗 models (without labels). By default two blank
            images of a size that suits the networks.

    Attributes:
        student: The student, with its own parameter names.
        pairs: As tapped.
        names: Of the levels: a pair is one, or one for each output of a neck and each call of a shared head.
        parts: Of the last loss, detached 0-d tensors by name: ``kd_NAME``, ``diffusion_NAME``, ``autoencoder_NAME``,
            ``gamma_NAME`` of each pair, and ``task`` if the method computed it.

    Example:
        >>> pairs = [Pair("layer4"), Pair("fc", kind="logits")]
        >>> method = DiffKD(student, teacher.eval().requires_grad_(False), pairs=pairs)
        >>> optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
        >>> logits = student(images)
        >>> with torch.no_grad():
        ...     teacher(images)
        >>> loss = F.cross_entropy(logits, labels) + method.loss()

        or, with both passes and the task loss left to it, ``method.step((images, labels))``. Detectors too:
        ``method.step((images, targets))`` for torchvision's, ``method.step(batch)`` for 🤗 models.

    Raises:
        ValueError: The teacher requires grad or is in training mode, the student has nothing to learn, a layer does
            not exist (close ones are listed) or gives something that is no feature, two pairs have one name.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        pairs: Sequence[Pair] | None = None,
        config: DiffKDConfig | None = None,
        images: Any = None,
    ) -> None:
        super().__init__(student, teacher)
        self.config: DiffKDConfig = config or DiffKDConfig()
        config = self.config
        self.pairs = tuple(pairs) if pairs is not None else _default_pairs(student, teacher, config)
        if not self.pairs:
            raise ValueError("pairs: got none; at least one is needed")
        pair_names(self.pairs)
        layers = dict.fromkeys(pair.student for pair in self.pairs)
        taught = dict.fromkeys(pair.teacher or pair.student for pair in self.pairs)
        self._taps = FeatureTaps(student, layers, every_call=True)
        self._teacher_taps = Shared(FeatureTaps(teacher, taught, detach=True, every_call=True))
        self._levels: list[Level] = []
        try:
            self.denoising = nn.ModuleDict(self._build(images))
        except BaseException:
            self.close()
            raise
        self.names = tuple(level.name for level in self._levels)

    def _module(self, name: str) -> Denoising:
        return cast(Denoising, self.denoising[name])

    @torch.no_grad()
    def _build(self, images: Any) -> dict[str, nn.Module]:
        """A module for each level, on the student's device, by the shapes of one pass in evaluation mode."""
        seen = images if images is not None else probe_images(self.student)
        shown = images if images is not None else probe_images(self.teacher)
        try:
            with evaluated(self.student):
                run(self.student, seen)
            run(self.teacher, shown)
        except (RuntimeError, TypeError) as error:
            if images is not None:
                raise
            raise ValueError(
                f"images: got None, and blank ones do not go through the networks ({error}); pass a batch"
            ) from error
        taps = (self._taps, self._teacher_taps.value)
        self._levels = find_levels(self.pairs, (self.student, self.teacher), taps, (seen, shown))
        maps = {level.name: level.maps(*taps, self.config.resize) for level in self._levels}
        # A head's coarsest level may be a single place; it is a map as its others are.
        dense = {
            key
            for level in self._levels
            for key in (level.denoiser, level.pair)
            if maps[level.name][1].shape[2:].numel() > 1
        }
        modules: dict[str, nn.Module] = {}
        for level in self._levels:
            student, teacher = maps[level.name]
            made = self._denoising(
                level.pair, student, teacher, dense=bool({level.denoiser, level.pair} & dense)
            )
            shared = modules.setdefault(level.denoiser, made)
            # Of these a denoiser is made; what it looks like says them all.
            if made.distance != cast(Denoising, shared).distance or repr(made) != repr(shared):
                raise ValueError(
                    f"pairs: {level.name!r} differs from others that share denoiser {level.denoiser!r}; they need the "
                    "same channels, kind and distance"
                )
        self._forget()
        return modules

    def _denoising(self, pair: Pair, student: Tensor, teacher: Tensor, *, dense: bool) -> Denoising:
        feature = pair.kind == "feature"
        kind = pair.distance or (self.config.feature_distance if feature else self.config.logits_distance)
        if not feature and student.shape[1] != teacher.shape[1] and kind in ("kl", "dist", "sigmoid"):
            # trans makes up for it, but then the student's own classes are not what is compared.
            raise ValueError(
                f"pairs: {pair.student!r} has {student.shape[1]} classes, the teacher's {teacher.shape[1]}; logits "
                "must match"
            )
        return Denoising(
            student.shape[1],
            teacher.shape[1],
            dense=dense or feature,
            latent=self.config.latent_channels if feature else None,
            distance=kind,
            config=self.config,
        ).to(student.device)

    def loss(self, *, foreground: Tensor | None = None) -> Tensor:
        """λ1·diffusion + λ2·autoencoder + λ3·kd of the batch that teacher and student have both just run on.

        Random numbers come from torch's generator of the features' device, without a synchronisation.

        Args:
            foreground: ``[B, H, W]``, bool or from 0 to 1, in any size: where the objects of each picture are.
                Pairs with a ``background_weight`` are compared there, and elsewhere by that much.

        Returns:
            A 0-d tensor, to be added to a task loss. :attr:`parts` has what it is made of.

        Raises:
            KDFastError: A network has not run since the last loss.
            ValueError: The two ran on different batches or on too small a one, the sizes differ where that is refused,
                the levels are others than when the method was made, the teacher is in training mode, or the mask is
                of another shape.
        """
        still_evaluated(self.teacher)
        if foreground is not None and all(pair.background_weight is None for pair in self.pairs):
            raise ValueError("foreground: got a mask, and no pair has a background_weight; set one, 0 say")
        config, total = self.config, None
        if self.training:
            self._watch(self.student.parameters(), {OWN: self.own_parameters()})
        self.parts = {}
        try:
            for level in self._levels:
                name, pair = level.name, level.pair
                module = self._module(level.denoiser)
                student, teacher = level.maps(self._taps, self._teacher_taps.value, config.resize)
                places = level.places(foreground, teacher)
                terms: Terms = module(student, teacher, places)
                weight = config.feature_weight if pair.kind == "feature" else config.logits_weight
                loss = config.diffusion_weight * terms.diffusion + pair.weight * weight * terms.kd
                self.parts[f"kd_{name}"] = terms.kd.detach()
                self.parts[f"diffusion_{name}"] = terms.diffusion.detach()
                if module.autoencoder is not None:
                    loss = loss + config.autoencoder_weight * terms.autoencoder
                    self.parts[f"autoencoder_{name}"] = terms.autoencoder.detach()
                if config.adapter:
                    self.parts[f"gamma_{name}"] = terms.gamma
                total = loss if total is None else total + loss
        finally:
            self._forget()
        if total is None:  # there is at least one pair
            raise KDFastError("the method has no pairs")
        return total

    def distil(
        self, student_out: Any, teacher_out: Any, *, target: Tensor | None, foreground: Foreground = None
    ) -> Tensor:
        """:meth:`loss`: what counts are the taps.

        Raises:
            ValueError: As :meth:`loss`, or a pair has a ``background_weight`` and the batch no boxes.
        """
        wanted = any(pair.background_weight is not None for pair in self.pairs)
        return self.loss(foreground=foreground() if wanted and foreground is not None else None)

    def own_parameters(self) -> Iterator[nn.Parameter]:
        """The method's, without the student's."""
        return self.denoising.parameters()

    def param_groups(self, **own: Any) -> list[dict[str, Any]]:
        """Two groups for an optimizer: the student's parameters, and the method's with options of their own.

        Args:
            **own: Options of the second group, e.g. ``weight_decay=0.0``.
        """
        return [
            {"params": list(self.student.parameters())},
            {"params": list(self.own_parameters()), **own},
        ]

    def export(self) -> nn.Module:
        """The student alone, without taps: its state dict and its outputs are what they would be without the method."""
        self.close()
        return self.student

    def close(self) -> None:
        """Take the taps off both networks."""
        self._taps.close()
        self._teacher_taps.value.close()

    @torch.no_grad()
    def maps(self, images: Tensor) -> dict[str, dict[str, Tensor]]:
        """Features before and after cleaning, for pictures, all in evaluation mode.

        Returns:
            For each pair by name, ``[B, L, H, W]``: ``student`` (after ``trans``), ``cleaned`` (after ``proj``) and
            ``teacher`` (the latent).
        """
        found = {}
        try:
            with evaluated(self):
                run(self.teacher, images)
                run(self.student, images)
                for level in self._levels:
                    student, teacher = level.maps(self._taps, self._teacher_taps.value, self.config.resize)
                    module = self._module(level.denoiser)
                    start, _ = module.start(student)
                    found[level.name] = {
                        "student": module.trans(student),
                        "cleaned": module.project(module.clean(start)),
                        "teacher": module.encode(teacher)[0],
                    }
        finally:
            self._forget()
        return found

    def _forget(self) -> None:
        """Let go of activations, and of the graph that they hold."""
        self._taps.clear()
        self._teacher_taps.value.clear()


def _default_pairs(student: nn.Module, teacher: nn.Module, config: DiffKDConfig) -> tuple[Pair, ...]:
    pairs = []
    if config.distill != "logits":
        own = config.student_layer or last_feature(student, "student_layer")
        other = config.teacher_layer or last_feature(teacher, "teacher_layer")
        pairs.append(Pair(own, other))
    if config.distill != "feature":
        pairs.append(Pair(config.student_logits, config.teacher_logits, kind="logits"))
    return tuple(pairs)

"""The method: taps on both networks, and a :class:`Denoising` for each pair of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from kdfast.errors import KDFastError
from kdfast.methods.diffkd.config import DiffKDConfig, Pair
from kdfast.methods.diffkd.denoising import Denoising, Terms
from kdfast.models import FeatureTaps
from kdfast.models.layouts import layout_of
from kdfast.models.maps import Layout, Shared, as_map, fit, last_feature, probe_images
from kdfast.models.modes import evaluated
from kdfast.models.roles import still_evaluated
from kdfast.training.learning import OWN
from kdfast.training.taught import Taught

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
        images: Some inputs ``[B, …]`` for both networks, on their device, of which one pass finds out the shapes; by
            default two blank images of a size that suits the networks.

    Attributes:
        student: The student, with its own parameter names.
        pairs: As tapped.
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

        or, with both passes and the task loss left to it, ``method.step((images, labels))``.

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
        images: Tensor | None = None,
    ) -> None:
        super().__init__(student, teacher)
        self.config: DiffKDConfig = config or DiffKDConfig()
        config = self.config
        self.pairs = tuple(pairs) if pairs is not None else _default_pairs(student, teacher, config)
        if not self.pairs:
            raise ValueError("pairs: got none; at least one is needed")
        self.names = _names(self.pairs)
        self._taps = FeatureTaps(student, dict.fromkeys(pair.student for pair in self.pairs))
        layers = dict.fromkeys(pair.teacher or pair.student for pair in self.pairs)
        self._teacher_taps = Shared(FeatureTaps(teacher, layers, detach=True))
        self._layouts: dict[Pair, tuple[Layout, Layout]] = {}
        self.denoising = nn.ModuleDict(self._build(images))

    def _module(self, name: str) -> Denoising:
        return cast(Denoising, self.denoising[name])

    @torch.no_grad()
    def _build(self, images: Tensor | None) -> dict[str, nn.Module]:
        """A module for each pair, on the student's device, by the shapes of one pass in evaluation mode."""
        seen = images if images is not None else probe_images(self.student)
        shown = images if images is not None else probe_images(self.teacher)
        try:
            with evaluated(self.student):
                self.student(seen)
            self.teacher(shown)
        except (RuntimeError, TypeError) as error:
            if images is not None:
                raise
            raise ValueError(
                f"images: got None, and blank ones do not go through the networks ({error}); pass a batch"
            ) from error
        modules: dict[str, nn.Module] = {}
        for name, pair in zip(self.names, self.pairs):
            other = pair.teacher or pair.student
            own, taught = self._taps[pair.student], self._teacher_taps.value[other]
            self._layouts[pair] = (
                layout_of(self.student, pair.student, own, pair.student_layout, seen),
                layout_of(self.teacher, other, taught, pair.teacher_layout, shown),
            )
            student, teacher = self._maps(pair)
            feature = pair.kind == "feature"
            default = self.config.feature_distance if feature else self.config.logits_distance
            if not feature and student.shape[1] != teacher.shape[1] and pair.distance in ("kl", "dist", None):
                # trans makes up for it, but then the student's own classes are not what is compared.
                raise ValueError(
                    f"pairs: {pair.student!r} has {student.shape[1]} classes, the teacher's {teacher.shape[1]}; logits "
                    "must match"
                )
            modules[name] = Denoising(
                student.shape[1],
                teacher.shape[1],
                dense=teacher.shape[2] * teacher.shape[3] > 1 or feature,
                latent=self.config.latent_channels if feature else None,
                distance=pair.distance or default,
                config=self.config,
            ).to(student.device)
        self._forget()
        return modules

    def _maps(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """A pair's activations as maps of one size."""
        other = pair.teacher or pair.student
        layouts = self._layouts[pair]
        student = as_map(self._taps[pair.student], layouts[0], pair.student)
        teacher = as_map(self._teacher_taps.value[other], layouts[1], other)
        if student.shape[0] != teacher.shape[0]:
            raise ValueError(
                f"pairs: {student.shape[0]} samples went through the student, {teacher.shape[0]} through the teacher"
            )
        size = (teacher.shape[2], teacher.shape[3])
        return fit(student, size, self.config.resize, f"{pair.student!r} and {other!r}"), teacher

    def loss(self) -> Tensor:
        """λ1·diffusion + λ2·autoencoder + λ3·kd of the batch that teacher and student have both just run on.

        Random numbers come from torch's generator of the features' device, without a synchronisation.

        Returns:
            A 0-d tensor, to be added to a task loss. :attr:`parts` has what it is made of.

        Raises:
            KDFastError: A network has not run since the last loss.
            ValueError: The two ran on different batches or on too small a one, the sizes differ where that is refused,
                or the teacher is in training mode.
        """
        still_evaluated(self.teacher)
        config, total = self.config, None
        if self.training:
            self._watch(self.student.parameters(), {OWN: self.own_parameters()})
        self.parts = {}
        try:
            for name, pair in zip(self.names, self.pairs):
                module = self._module(name)
                terms: Terms = module(*self._maps(pair))
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

    def distil(self, student_out: Tensor, teacher_out: Any, *, target: Tensor | None) -> Tensor:
        """:meth:`loss`: what counts are the taps."""
        return self.loss()

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
                self.teacher(images)
                self.student(images)
                for name, pair in zip(self.names, self.pairs):
                    student, teacher = self._maps(pair)
                    module = self._module(name)
                    start, _ = module.start(student)
                    found[name] = {
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


def _names(pairs: tuple[Pair, ...]) -> tuple[str, ...]:
    """One a pair, free of dots (they would part a state dict's keys): its own, its kind, or its kind and layer."""
    kinds = [pair.kind for pair in pairs]
    names = tuple(
        (pair.name or (pair.kind if kinds.count(pair.kind) == 1 else f"{pair.kind}_{pair.student}")).replace(
            ".", "_"
        )
        for pair in pairs
    )
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"pairs: {', '.join(repeated)} more than once; give each a name")
    return names

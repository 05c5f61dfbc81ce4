"""The method: rounds of inversion into a replay buffer, distillation steps out of it."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.capture import step_state
from kdfast.data.codec import ImageFormat
from kdfast.errors import CheckpointError, KDFastError
from kdfast.functional import KDStatistics, kd_kl_div, kd_statistics
from kdfast.methods.ssdkd.capture import CapturedLoss, CapturedStep, bare, capturable, optimizer_capturable
from kdfast.methods.ssdkd.config import SSDKDConfig
from kdfast.methods.ssdkd.contents import Contents, per_image
from kdfast.methods.ssdkd.inversion import Inversion
from kdfast.methods.ssdkd.shards import write_shards
from kdfast.methods.ssdkd.views import Views
from kdfast.models.modes import evaluated
from kdfast.models.outputs import logits_of
from kdfast.models.roles import check_networks, chosen_student, still_evaluated
from kdfast.replay import PrioritizedReplayBuffer
from kdfast.training.learning import Learning

__all__ = ["SSDKD"]


class SSDKD(Learning):
    """Small-scale data-free distillation: no image of the teacher's data is ever seen (Liu et al. 2024).

    The method owns the generator, the buffer and their random numbers; the student and its optimiser are yours. Every
    round, :meth:`synthesize` puts new images into the buffer. Once it is :attr:`ready`, a round is followed by
    :attr:`steps` distillation steps, each of which draws rows by priority, computes T²·KL and re-scores them.

    Whether this is classification or segmentation follows from what the teacher puts out: ``[B, C]`` or
    ``[B, C, H, W]``, where every pixel has a probability and a class, and an image's priority is its pixels' mean.

    Args:
        student: What the steps train, unless another is given there; None where every call gives one. Inversion
            looks at it in evaluation mode, and puts it back into the mode it was in.
        teacher: In evaluation mode, none of its parameters requiring grad. Its batch norms are hooked during a round
            of inversion and at no other time.
        config: How images are made, kept, drawn and learned from.
        image_shape: (C, H, W) of the images.
        mean: Per channel, subtracted from images in [0, 1] for both networks.
        std: Per channel, divided by.
        batch_size: Images a distillation step.
        seed: Of weights of the generator, latents, views and draws.
        device: Where all is; by default the teacher's.

    Raises:
        ValueError: The teacher requires grad or is in training mode, or the student has nothing to learn.
        ConfigError: The teacher lacks what a term of the loss needs.

    Example:
        >>> teacher.eval().requires_grad_(False)
        >>> method = SSDKD(student, teacher, image_shape=(3, 32, 32), mean=mean, std=std)
        >>> for epoch in range(220):
        ...     method.synthesize()
        ...     for _ in range(method.steps if method.ready else 0):
        ...         method.step().backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
    """

    def __init__(
        self,
        student: nn.Module | None,
        teacher: nn.Module,
        *,
        config: SSDKDConfig | None = None,
        image_shape: Sequence[int] = (3, 32, 32),
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
        batch_size: int = 256,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        self.config = config = config or SSDKDConfig()
        check_networks(student, teacher)
        self.student, self.teacher, self.batch_size = student, teacher, batch_size
        if batch_size < 1:
            raise ValueError(f"batch_size: got {batch_size}, accepted: at least 1")
        if len(image_shape) != 3 or len(mean) != image_shape[0] or len(std) != image_shape[0]:
            raise ValueError(
                f"image_shape: got {tuple(image_shape)}, with {len(mean)} values of mean and {len(std)} of std, "
                "accepted: (channels, height, width), with one value of each a channel"
            )
        if device is None:
            device = next((p.device for p in teacher.parameters()), torch.device("cpu"))
        self.device = torch.empty(0, device=device).device
        self._rng = torch.Generator(self.device).manual_seed(seed)
        self.views = Views(mean, std, padding=config.padding, flip=config.flip, rng=self._rng)
        with torch.no_grad():
            logits = logits_of(self.teacher(torch.zeros(2, *image_shape, device=self.device)))
        if logits.dim() not in (2, 4):
            raise ValueError(
                f"teacher: gives shape {list(logits.shape)}, accepted: [B, C], or [B, C, H, W] for segmentation"
            )
        self.num_classes = logits.shape[1]
        self.inversion = Inversion(
            self.teacher, config, image_shape, self.num_classes, self.views, self._rng, self.device
        )
        self.buffer: PrioritizedReplayBuffer | None = None
        if config.replay:
            self.buffer = PrioritizedReplayBuffer(
                config.capacity,
                tuple(image_shape),
                num_classes=self.num_classes,
                alpha=config.alpha if config.sampling != "uniform" else 0.0,
                beta=config.beta,
                eps=config.eps,
                eviction=config.eviction,
                duplicates=config.duplicates,
                device=self.device,
                seed=seed,
            )
        self.contents = Contents(config.capacity if config.replay else 0, self.num_classes, self.device)
        self.parts: dict[str, Tensor] = {}
        self._losses: dict[Any, CapturedLoss] = {}
        self._updates: dict[Any, CapturedStep] = {}
        #: What a graph was recorded from; one of another state is recorded anew.
        self._recorded: dict[Any, tuple[Any, ...]] = {}
        self._loss = torch.zeros((), device=self.device)

    @property
    def rounds(self) -> int:
        """Rounds of inversion so far."""
        return self.inversion.rounds

    @property
    def ready(self) -> bool:
        """Whether distillation begins: the buffer has had its ``fill_epochs`` rounds, and one more has followed."""
        return self.rounds > self.config.fill_epochs

    @property
    def steps(self) -> int:
        """T_kd: distillation steps that follow a round."""
        return self.config.steps_per_epoch(self.batch_size)

    # --- inversion ------------------------------------------------------------------------------------------

    def synthesize(self, student: nn.Module | None = None) -> Tensor:
        """A round of inversion: T_g steps, and its best images into the buffer.

        Args:
            student: Instead of the one that the method was made with.

        Returns:
            uint8 ``[synthesis_batch, C, H, W]``, the new images.

        Raises:
            ValueError: There is no student, or the teacher is in training mode.
        """
        student = bare(chosen_student(student, self.student))
        still_evaluated(self.teacher)
        images = self.inversion.run(student, self.contents.class_counts())
        stored = images.mul(255).round_().to(torch.uint8)
        if self.buffer is not None:
            self._store(stored, student)
        self.parts |= self.inversion.means
        return stored

    @torch.no_grad()
    def _store(self, images: Tensor, student: nn.Module) -> None:
        """Score what is stored, not what was optimised: rounded, and as it is."""
        assert self.buffer is not None
        seen = self.views.plain(images)
        with evaluated(student):
            learned = logits_of(student(seen))
        taught = logits_of(self.teacher(seen))
        scores = kd_statistics(learned, taught, self.config.priority_temperature, dim=1)
        predicted = scores.teacher_class
        labels = predicted
        if predicted.dim() > 1:  # a row's label is its most frequent class; what is counted are the pixels
            labels = torch.nn.functional.one_hot(predicted.flatten(1), self.num_classes).sum(1).argmax(1)
        index = self.buffer.extend(images, labels, self._deltas(scores))
        self.contents.insert(index, predicted, scores.teacher_prob)

    def _deltas(self, scores: KDStatistics) -> Tensor:
        """How wrong the student is about each image, ``[B]``: KL, or φ·KL; the mean over its pixels."""
        if self.config.sampling != "modulated":
            return per_image(scores.kl)
        return per_image(self.contents.phi(scores, self.config) * scores.kl)

    def check(self) -> None:
        """Look whether inversion still works. This waits for the device: for now and then, not for every step.

        Raises:
            KDFastError: The last round's loss was not finite; its images are not worth learning from.
        """
        loss = self.parts.get("inversion_loss")
        if loss is not None and not math.isfinite(float(loss)):
            raise KDFastError(
                f"inversion's loss became {float(loss)} by round {self.rounds}; a lower lr_g or lr_z may help"
            )

    # --- distillation ---------------------------------------------------------------------------------------

    def __call__(self, student_out: Tensor, teacher_out: Tensor, *, weight: Tensor | None = None) -> Tensor:
        """The student's loss, T²·KL: the mean over the batch (and pixels).

        Args:
            student_out: Logits ``[B, C]`` or ``[B, C, H, W]``.
            teacher_out: The teacher's, of the same shape.
            weight: ``[B]``, importance weights; counted with ``weight_in_loss`` only.
        """
        row_weight = None
        if weight is not None and self.config.weight_in_loss:
            shape = (len(weight), *[1] * (student_out.dim() - 2))
            row_weight = weight.view(shape).expand(len(weight), *student_out.shape[2:])
        return kd_kl_div(
            student_out,
            teacher_out,
            self.config.temperature,
            dim=1,
            reduction="rowmean",
            row_weight=row_weight,
        )

    def step(self, student: nn.Module | None = None) -> Tensor:
        """Draw a batch, compute the student's loss on random views of it, and re-score it: δ = w·KL (Eq. 4).

        On CUDA all of it is one graph, gradients included, which ``backward()`` of the result only hands out; under a
        ``DistributedDataParallel`` wrapper, and with fp16, it runs eagerly.

        Args:
            student: Instead of the one that the method was made with (say, its distributed wrapper).

        Returns:
            The loss, 0-d. :attr:`parts` holds more numbers, 0-d tensors on the device.

        Raises:
            ValueError: There is no student, nothing has been synthesised yet, or the teacher is in training mode.
        """
        student = self._ready_student(student)
        key = self._key(student)
        self._forget(self._losses, key, student)
        if key not in self._losses:
            capture, parameters = self._captures(student), list(student.parameters())
            self._losses[key] = CapturedLoss(
                lambda: self._distil(student), parameters, self._rng, capture=capture
            )
        return self._losses[key]()

    def update(self, optimizer: torch.optim.Optimizer, student: nn.Module | None = None) -> Tensor:
        """:meth:`step`, its gradients and the optimiser's step.

        On CUDA with an optimiser whose step can be captured too (``capturable=True``, or ``SGD(…, fused=True)`` with
        its rate as a tensor on the device) the whole of it is one graph.

        Args:
            optimizer: Over the student's parameters; it finds their gradients in ``.grad``, and they stay there.
            student: Instead of the one that the method was made with.

        Returns:
            The loss, 0-d and detached; overwritten by the next call.

        Raises:
            ValueError: As :meth:`step`.
        """
        student = self._ready_student(student)
        key = (id(optimizer), *self._key(student))
        self._forget(self._updates, key, student)
        if key not in self._updates:
            capture = self._captures(student) and optimizer_capturable(optimizer)
            self._updates[key] = CapturedStep(
                lambda: self._update(student, optimizer), self._rng, capture=capture
            )
        self._updates[key]()
        return self._loss

    def _update(self, student: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        loss = self._distil(student)
        if bare(student) is not student:  # DistributedDataParallel, whose hooks only backward() calls
            optimizer.zero_grad()
            torch.autograd.backward(loss)
        else:
            parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            for parameter, gradient in zip(parameters, gradients):
                parameter.grad = gradient
        optimizer.step()
        self._loss.copy_(loss.detach())

    def _distil(self, student: nn.Module) -> Tensor:
        if self.buffer is None:
            seen = self.views(self.inversion.fresh())
            with torch.no_grad():
                taught = logits_of(self.teacher(seen))
            return self(logits_of(student(seen)), taught)
        drawn = self.buffer.sample(
            self.batch_size, stratified=self.config.stratified, max_normalize=self.config.max_normalize
        )
        seen = self.views(drawn.samples)
        with torch.no_grad():
            taught = logits_of(self.teacher(seen))
        learned = logits_of(student(seen))
        loss = self(learned, taught, weight=drawn.weight)
        scores = kd_statistics(learned, taught, self.config.priority_temperature, dim=1)
        delta = drawn.weight * self._deltas(scores)
        if self.config.sampling != "uniform":
            self.buffer.update_priority(drawn.index, delta, drawn.generation)
        self.parts |= {
            "priority": delta.mean(),
            "importance": drawn.weight.mean(),
            "kl": scores.kl.mean(),
            "agreement": scores.agreement.float().mean(),
        }
        return loss

    # --- state ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything but student and teacher: generator, buffer, histograms and random state."""
        return {
            "inversion": self.inversion.state_dict(),
            "buffer": None if self.buffer is None else self.buffer.state_dict(),
            "contents": self.contents.state_dict(),
            "rng": self._rng.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly there.

        Raises:
            CheckpointError: The state is of other settings.
        """
        if (state["buffer"] is None) != (self.buffer is None):
            raise CheckpointError("ssdkd state: replay differs from this method's")
        if self.buffer is not None:
            self.buffer.load_state_dict(state["buffer"])
        self.inversion.load_state_dict(state["inversion"])
        self.contents.load_state_dict(state["contents"])
        self._rng.set_state(state["rng"].cpu())
        self._losses.clear()
        self._updates.clear()

    def export_shards(
        self,
        directory: str | os.PathLike[str],
        *,
        samples_per_shard: int = 1000,
        image_format: ImageFormat = "png",
    ) -> int:
        """Write the images that the buffer holds as labelled shards: a training set for other students.

        Labels are the teacher's classes (of a segmentation the most frequent one); grey images get three channels.

        Args:
            directory: Of the set, empty or new.
            samples_per_shard, image_format: As for :class:`kdfast.data.ShardWriter`; PNG keeps every bit.

        Returns:
            How many images were written, in the order of the buffer's slots.

        Raises:
            ValueError: There are no images, or they have neither one nor three channels.
            ShardError: The folder cannot be written, or holds a set.
        """
        if self.buffer is None or not len(self.buffer):
            raise ValueError("export_shards: there are no images; call synthesize() first, with replay")
        return write_shards(
            self.buffer,
            directory,
            samples_per_shard=samples_per_shard,
            image_format=image_format,
            num_classes=self.num_classes,
            metadata={"source": "ssdkd", "rounds": self.rounds},
        )

    def _ready_student(self, student: nn.Module | None) -> nn.Module:
        student = chosen_student(student, self.student)
        still_evaluated(self.teacher)
        if not self.rounds:
            raise ValueError("step: nothing to learn from; call synthesize() first")
        return student

    def _key(self, student: nn.Module) -> tuple[Any, ...]:
        """What a graph of this student's step has built in."""
        device = self.device.type
        autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        return (id(student), student.training, torch.is_grad_enabled(), *autocast)

    def _forget(self, graphs: dict[Any, Any], key: Any, student: nn.Module) -> None:
        """Drop a graph whose student or teacher is no longer as it was recorded: it would go on with what is gone."""
        if not self._captures(student):
            return
        now = (*step_state(student), *step_state(self.teacher))
        if self._recorded.get(key) != now:
            graphs.pop(key, None)
            self._recorded[key] = now

    def _captures(self, student: nn.Module) -> bool:
        wanted = self.config.cuda_graphs and torch.is_grad_enabled() and bare(student) is student
        return capturable(self.device, wanted=wanted)

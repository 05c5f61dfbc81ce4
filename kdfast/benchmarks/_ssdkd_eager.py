"""SSD-KD in eager PyTorch: as the published code of its predecessor is written, and with that code's waste removed.

Both run the algorithm that kdfast runs, with its defaults: the meta-generator's clone adapted for T_g steps, φ, the
adversarial term, batch-norm statistics with their average, priorities and importance weights. They differ in
how:

======================  ==========================================  ==========================================
what                    :class:`FilesSSDKD`                         :class:`MemorySSDKD`
======================  ==========================================  ==========================================
images                  a PNG file each                             a uint8 tensor on the device
batches                 a DataLoader with two workers, made anew    ``torch.multinomial`` and an index
                        each epoch, drawing by that epoch's
                        priorities
random crops            image by image                              one gather of the padded batch
batch-norm hooks        always there                                off while distilling
frozen networks         their weights' gradients are computed       inputs' gradients only, for the teacher
======================  ==========================================  ==========================================
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdfast.benchmarks.case import peer
from kdfast.methods.ssdkd.config import SSDKDConfig
from kdfast.methods.ssdkd.generator import Generator


class _Hook:
    """DeepInversion's feature hook, with the average that Fast-Datafree adds."""

    def __init__(self, layer: Any, momentum: float) -> None:
        self.momentum, self.on = momentum, True
        self.average: tuple[Tensor, Tensor] | None = None
        layer.register_forward_hook(self)

    def __call__(self, layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if not self.on:
            return
        (x,) = inputs
        channels = x.shape[1]
        mean = x.mean([0, 2, 3])
        var = x.permute(1, 0, 2, 3).contiguous().view(channels, -1).var(1, unbiased=False)
        self.seen = mean.detach(), var.detach()
        if self.average is not None:
            mean = (1 - self.momentum) * mean + self.momentum * self.average[0]
            var = (1 - self.momentum) * var + self.momentum * self.average[1]
        self.loss = torch.norm(layer.running_var - var, 2) + torch.norm(layer.running_mean - mean, 2)

    def update(self) -> None:
        if self.average is None:
            self.average = self.seen
        else:
            pairs = zip(self.average, self.seen, strict=True)
            self.average = tuple(self.momentum * old + (1 - self.momentum) * new for old, new in pairs)  # type: ignore[assignment]


class EagerSSDKD:
    """What both have in common.

    Args:
        teacher: In evaluation mode.
        student: With its optimiser.
        optimizer: Of the student.
        config: kdfast's.
        images: uint8 ``[capacity, C, H, W]``, what the buffer begins with.
        mean: Per channel.
        std: Per channel.
        batch_size: Of distillation.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: SSDKDConfig,
        images: Tensor,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        batch_size: int,
    ) -> None:
        self.teacher, self.student, self.optimizer = teacher, student, optimizer
        self.config, self.batch_size = config, batch_size
        self.device, self.shape = images.device, tuple(images.shape[1:])
        self.mean, self.std = (torch.tensor(v, device=self.device).view(-1, 1, 1) for v in (mean, std))
        self.hooks = [
            _Hook(m, config.bn_momentum) for m in teacher.modules() if isinstance(m, nn.BatchNorm2d)
        ]
        self.generator = Generator(
            config.latent,
            self.shape,
            width=config.generator_width,
            upsamplings=config.upsamplings,
            device=self.device,
        )
        rate = config.lr_g * config.inversion_steps
        self.meta_optimizer = torch.optim.Adam(self.generator.parameters(), lr=rate, betas=(0.5, 0.999))
        capacity = len(images)
        self.delta = torch.ones(capacity, device=self.device)
        self.head = 0
        with torch.no_grad():
            predicted = [
                self.teacher(self.normalised(part)).argmax(1) for part in torch.split(images, batch_size)
            ]
        self.predicted = torch.cat(predicted)
        self.num_classes = self.teacher(self.normalised(images[:1])).shape[1]

    # --- what the two do differently ---------------------------------------------------------------------------

    def crop(self, images: Tensor) -> Tensor:
        """A random crop and flip of each."""
        raise NotImplementedError

    def store(self, images: Tensor, slots: Tensor) -> None:
        """Replace rows."""
        raise NotImplementedError

    def batches(self) -> Iterable[tuple[Tensor, Tensor]]:
        """uint8 images on the device and their slots, as many batches as an epoch has steps."""
        raise NotImplementedError

    # --- inversion ---------------------------------------------------------------------------------------------

    def normalised(self, images: Tensor) -> Tensor:
        """Of uint8, or of floats in [0, 1]."""
        images = images.float() / 255 if images.dtype == torch.uint8 else images
        return (images - self.mean) / self.std

    def views(self, images: Tensor) -> Tensor:
        """Cropped, flipped, normalised."""
        return self.normalised(self.crop(images.float() / 255 if images.dtype == torch.uint8 else images))

    def inversion_loss(self, views: Tensor, targets: Tensor) -> Tensor:
        """bn·L_BN + oh·mean(φ·CE) − adv·mean(mask·KL)."""
        config = self.config
        logits = self.teacher(views)
        statistics = sum(hook.loss for hook in self.hooks)
        probability, predicted = logits.softmax(1).max(1)
        counts = torch.bincount(self.predicted, minlength=self.num_classes)
        common = 1 - counts[predicted] / len(self.predicted)
        phi = common * (1 - probability).clamp(min=1e-6) ** config.gamma
        task = (phi * F.cross_entropy(logits, targets, reduction="none")).mean()
        learned = self.student(views)
        mask = (learned.argmax(1) == predicted).float()
        divergence = F.kl_div(learned.log_softmax(1), logits.softmax(1), reduction="none").sum(1)
        loss: Tensor = config.bn * statistics + config.oh * task - config.adv * (mask * divergence).mean()
        return loss

    def synthesize(self) -> Tensor:
        """A round: T_g steps, the best images into the buffer."""
        config = self.config
        student_training = self.student.training
        self.student.eval()
        z = torch.randn(config.synthesis_batch, config.latent, device=self.device, requires_grad=True)
        targets = torch.randint(0, self.num_classes, (config.synthesis_batch,), device=self.device)
        clone = copy.deepcopy(self.generator)
        groups: list[dict[str, Any]] = [{"params": clone.parameters()}, {"params": [z], "lr": config.lr_z}]
        optimizer = torch.optim.Adam(groups, lr=config.lr_g, betas=(0.5, 0.999))
        self.meta_optimizer.zero_grad()
        best, best_loss = z.detach(), float("inf")
        for _ in range(config.inversion_steps):
            images = clone(z)
            loss = self.inversion_loss(self.views(images), targets)
            if loss.item() < best_loss:
                best, best_loss = images.detach(), loss.item()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            for own, its in zip(self.generator.parameters(), clone.parameters(), strict=True):
                assert its.grad is not None
                own.grad = its.grad.clone() if own.grad is None else own.grad + its.grad
            optimizer.step()
        self.meta_optimizer.step()
        for hook in self.hooks:
            hook.update()
        self.student.zero_grad()  # what backward left there
        stored = best.mul(255).round().to(torch.uint8)
        self._insert(stored)
        self.student.train(student_training)
        return stored

    @torch.no_grad()
    def _insert(self, stored: Tensor) -> None:
        seen = self.normalised(stored)
        taught, learned = self.teacher(seen), self.student(seen)
        slots = (self.head + torch.arange(len(stored), device=self.device)) % len(self.delta)
        self.head = (self.head + len(stored)) % len(self.delta)
        divergence = F.kl_div(learned.log_softmax(1), taught.softmax(1), reduction="none").sum(1)
        self.delta[slots] = divergence
        self.predicted[slots] = taught.argmax(1)
        self.store(stored, slots)

    # --- distillation ------------------------------------------------------------------------------------------

    def probability(self) -> Tensor:
        """P of every row."""
        mass = (self.delta.abs() + self.config.eps) ** self.config.alpha
        return mass / mass.sum()

    def loss(self, learned: Tensor, taught: Tensor) -> Tensor:
        """T²·KL."""
        t = self.config.temperature
        inputs, target = (learned / t).log_softmax(1), (taught / t).softmax(1)
        return F.kl_div(inputs, target, reduction="batchmean") * t * t

    def distil(self) -> float:
        """An epoch's steps; the mean loss."""
        total = 0.0
        number = 0
        for images, slots in self.batches():
            views = self.views(images)
            with torch.no_grad():
                taught = self.teacher(views)
            learned = self.student(views)
            loss = self.loss(learned, taught)
            self.optimizer.zero_grad()
            torch.autograd.backward(loss)
            self.optimizer.step()
            with torch.no_grad():
                divergence = F.kl_div(learned.log_softmax(1), taught.softmax(1), reduction="none").sum(1)
                weight = (len(self.delta) * self.probability()[slots]) ** -self.config.beta
                self.delta[slots] = weight * divergence
            total += loss.item()
            number += 1
        return total / number


class MemorySSDKD(EagerSSDKD):
    """Rows in a uint8 tensor; no file, no DataLoader."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        images: Tensor = options["images"]
        self.rows = images.clone()
        self.teacher.requires_grad_(False)

    def crop(self, images: Tensor) -> Tensor:
        """One gather of the padded batch."""
        p = self.config.padding
        batch, _, height, width = images.shape
        padded = F.pad(images, (p,) * 4)
        top, left = torch.randint(0, 2 * p + 1, (2, batch, 1), device=self.device)
        rows = top + torch.arange(height, device=self.device)
        columns = left + torch.arange(width, device=self.device)
        flips = torch.rand(batch, 1, device=self.device) < 0.5
        columns = torch.where(flips, columns.flip(1), columns)
        sample = torch.arange(batch, device=self.device)[:, None, None]
        return padded[sample, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)

    def store(self, images: Tensor, slots: Tensor) -> None:
        """Into the tensor."""
        self.rows[slots] = images

    def synthesize(self) -> Tensor:
        """With hooks on."""
        self._watch(True)
        stored = super().synthesize()
        self._watch(False)
        return stored

    def _watch(self, on: bool) -> None:
        for hook in self.hooks:
            hook.on = on

    def batches(self) -> Iterable[tuple[Tensor, Tensor]]:
        """By the priorities of the moment."""
        for _ in range(self.config.steps_per_epoch(self.batch_size)):
            slots = torch.multinomial(self.probability(), self.batch_size, replacement=True)
            yield self.rows[slots], slots


class _Files(torch.utils.data.Dataset[tuple[Tensor, int]]):
    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, slot: int) -> tuple[Tensor, int]:
        from PIL import Image

        with Image.open(self.folder / f"{slot}.png") as image:
            return torch.from_numpy(np.array(image)).permute(2, 0, 1), slot


class FilesSSDKD(EagerSSDKD):
    """Rows as PNG files, read back through a DataLoader of each epoch's own."""

    #: Processes that read; Fast-Datafree's four would be more than a small machine has cores.
    workers = 2

    def __init__(self, **options: Any) -> None:
        peer("PIL.Image")
        super().__init__(**options)
        images: Tensor = options["images"]
        self.teacher.requires_grad_(True)
        self._folder = tempfile.TemporaryDirectory(prefix="kdfast-bench-")
        self.store(images, torch.arange(len(images)))

    def crop(self, images: Tensor) -> Tensor:
        """Image by image, as a transform for one image does it."""
        p = self.config.padding
        height, width = self.shape[1:]
        out = []
        for image in images:
            top, left = (int(torch.randint(0, 2 * p + 1, (1,))) for _ in range(2))
            piece = F.pad(image, (p,) * 4)[:, top : top + height, left : left + width]
            out.append(piece.flip(-1) if float(torch.rand(1)) < 0.5 else piece)
        return torch.stack(out)

    def store(self, images: Tensor, slots: Tensor) -> None:
        """A file each."""
        from PIL import Image

        pixels = images.permute(0, 2, 3, 1).cpu().numpy()
        for row, slot in zip(pixels, slots.tolist(), strict=True):
            Image.fromarray(row).save(Path(self._folder.name) / f"{slot}.png")

    def rows_of(self, slots: Iterable[int]) -> Tensor:
        """Read back."""
        files = _Files(Path(self._folder.name), len(self.delta))
        return torch.stack([files[slot][0] for slot in slots])

    def batches(self) -> Iterable[tuple[Tensor, Tensor]]:
        """By the priorities at the epoch's beginning: workers fetch ahead."""
        steps = self.config.steps_per_epoch(self.batch_size)
        sampler = torch.utils.data.WeightedRandomSampler(
            self.probability().tolist(), steps * self.batch_size, replacement=True
        )
        files = _Files(Path(self._folder.name), len(self.delta))
        loader = torch.utils.data.DataLoader(
            files, self.batch_size, sampler=sampler, num_workers=self.workers
        )
        for images, slots in loader:
            yield images.to(self.device), slots.to(self.device)

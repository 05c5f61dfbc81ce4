"""``method: ssdkd``: the teacher is inverted while the student learns; there are no images to begin with."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.errors import ConfigError
from kdfast.experiments.distill.plan import Plan, Setting
from kdfast.methods.ssdkd import SSDKD, SSDKDConfig
from kdfast.report.grid import write_grid

CONFIG = SSDKDConfig
METHOD = SSDKD
NEEDS_DATA = False

PICTURE = "samples-buffer.png"
_COLUMNS, _ROWS = 12, 10
_CAPTION = "What the buffer holds at the end: a class a row, the images of highest priority first."


def build(setting: Setting) -> Plan:
    """The method, and the batches that its rounds of inversion make.

    Raises:
        ConfigError: The recipe names data or augmentation, of which this method makes its own.
    """
    config = setting.config
    if config.data is not None:
        raise ConfigError(f"data: got {config.data!r}, accepted: none (ssdkd makes its own images)")
    if config.augment:
        raise ConfigError(
            f"augment: got {list(config.augment)}, accepted: none (ssdkd crops by padding, and flips by flip)"
        )
    size, described = config.image_size or setting.described.image_size, setting.described
    rank = setting.accelerator.process_index
    method = SSDKD(
        setting.teacher,
        setting.student,
        setting.method,
        image_shape=(described.in_channels, size, size),
        mean=described.mean,
        std=described.std,
        batch_size=config.batch_size,
        # Each process inverts for itself: other images for every rank.
        seed=config.seed + 1_000_003 * rank,
        device=setting.accelerator.device,
    )
    batches = Rounds(method, fill=not setting.dry_run, bf16=config.precision == "bf16")

    def step(model: nn.Module, batch: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        loss = method.step(model)
        return loss, method.parts

    def facts() -> dict[str, Any]:
        return {"networks": f"{Path(config.teacher).name} → {config.student}", **batches.facts()}

    return Plan(setting.student, step, batches, facts=facts, leave=batches.leave)


class Rounds:
    """A round of inversion at each epoch's start (before the first, those that fill the buffer), then T_kd batches.

    What it yields holds nothing but the batch's length: rows are drawn inside of the step, so that drawing, views,
    both networks and re-scoring can be one CUDA graph.

    Args:
        method: Made with a student.
        fill: Whether to fill the buffer first; a dry run goes without.
        bf16: Run inversion under autocast.
    """

    def __init__(self, method: SSDKD, *, fill: bool = True, bf16: bool = False) -> None:
        self.method, self._fill, self._bf16 = method, fill, bf16
        self._epoch, self._batch = 0, 0
        self.clock = PhaseClock(method.device)

    def __len__(self) -> int:
        return self.method.steps

    def set_epoch(self, epoch: int) -> None:
        """Start the next iteration at the beginning of this epoch."""
        self._epoch, self._batch = epoch, 0

    def __iter__(self) -> Iterator[Tensor]:
        method = self.method
        if self._batch == 0:
            self.clock.start()
            target = (method.config.fill_epochs if self._fill else 0) + self._epoch + 1
            with self._precision():
                while method.rounds < target:
                    method.synthesize()
            self.clock.stop("inversion")
        token = torch.empty(method.batch_size, 0)
        first = self._batch
        self.clock.start()
        for number in range(first, len(self)):
            self._batch = number + 1
            if number > first and number == len(self) - 1:
                # The trainer may not come back after the last batch: its time is that of the others.
                steps = number - first
                self.clock.stop("distillation", factor=(steps + 1) / steps)
            yield token
        self._epoch, self._batch = self._epoch + 1, 0

    def _precision(self) -> Any:
        device = self.method.device.type
        return torch.autocast(device, torch.bfloat16) if self._bf16 else nullcontext()

    def state_dict(self) -> dict[str, Any]:
        """Where in which epoch, and all that the method holds.

        Raises:
            KDFastError: Inversion has diverged: better no checkpoint than one of that.
        """
        self.method.check()
        return {
            "epoch": self._epoch,
            "batch": self._batch,
            "seconds": self.clock.seconds(),
            "method": self.method.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on there."""
        self._epoch, self._batch = int(state["epoch"]), int(state["batch"])
        self.clock = PhaseClock(self.method.device, state["seconds"])
        self.method.load_state_dict(state["method"])

    def facts(self) -> dict[str, Any]:
        """What the buffer holds at the end, and where the time went."""
        method = self.method
        method.check()
        kept = {} if method.buffer is None else {"captions": {PICTURE: _CAPTION}}
        return {
            **kept,
            "capacity": method.config.capacity if method.buffer is not None else 0,
            "synthesized_images": method.rounds * method.config.synthesis_batch,
            "seconds_by_phase": {name: round(value, 3) for name, value in self.clock.seconds().items()},
            "category_counts": method.contents.class_counts().tolist(),
            "difficulty_counts": method.contents.difficulty_counts().tolist(),
        }

    def leave(self, folder: Path) -> None:
        """Write a grid of what the buffer holds: a class a row, the images of highest priority first."""
        buffer = self.method.buffer
        if buffer is None:
            return
        state = buffer.state_dict()
        order = buffer.top_k(len(buffer)).index.cpu()
        images = class_rows(state["rows"].cpu()[order], state["labels"].cpu()[order])
        if images.shape[1] != 3:
            images = images[:, :1].expand(-1, 3, -1, -1)
        scale = max(1, round(64 / images.shape[-1]))
        write_grid(folder / PICTURE, images, columns=_COLUMNS, scale=scale)


def class_rows(images: Tensor, labels: Tensor) -> Tensor:
    """The first images of each class, a class a row; of many classes an even choice; black where a class has no more.

    Args:
        images: uint8 ``[N, C, H, W]``.
        labels: Integers ``[N]``.

    Returns:
        uint8 ``[rows · columns, C, H, W]``.
    """
    classes: Tensor = torch.unique(labels)
    picked = classes[torch.linspace(0, len(classes) - 1, min(_ROWS, len(classes))).round().long()]
    sheet = images.new_zeros(len(picked), _COLUMNS, *images.shape[1:])
    for row, label in zip(sheet, picked):
        found = images[labels == label][:_COLUMNS]
        row[: len(found)] = found
    return sheet.flatten(0, 1)


class PhaseClock:
    """Seconds by phase; on CUDA between events, which are read when they have happened anyway.

    Args:
        device: Whose time counts.
        before: Seconds of an earlier part of the run.
    """

    def __init__(self, device: torch.device, before: Mapping[str, float] | None = None) -> None:
        self._cuda = device.type == "cuda"
        self._totals = dict(before or {})
        self._pending: list[tuple[str, float, Any, Any]] = []
        self._since: Any = None

    def start(self) -> None:
        """Begin to count."""
        self._since = self._now()

    def stop(self, phase: str, *, factor: float = 1.0) -> None:
        """Count what has passed since, times a factor, to a phase."""
        self._pending.append((phase, factor, self._since, self._now()))

    def seconds(self) -> dict[str, float]:
        """Totals so far. On CUDA this waits for the device."""
        for phase, factor, begin, end in self._pending:
            if self._cuda:
                end.synchronize()
                passed = begin.elapsed_time(end) / 1000
            else:
                passed = end - begin
            self._totals[phase] = self._totals.get(phase, 0.0) + factor * passed
        self._pending = []
        return dict(self._totals)

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

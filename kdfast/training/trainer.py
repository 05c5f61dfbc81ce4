"""One training loop for teachers, students and diffusion models, on 🤗 Accelerate."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kdfast.errors import CheckpointError, KDFastError
from kdfast.profiling import annotate, each, phase
from kdfast.training.accelerator import gather_objects, make_accelerator
from kdfast.training.batches import Loss, Window, count_images, resumable, split_loss, to_device
from kdfast.training.checkpoint import Checkpoint, latest_checkpoint, load_checkpoint, prune, save_checkpoint
from kdfast.training.config import Stateful, TrainerConfig, TrainResult
from kdfast.training.heartbeat import hearing
from kdfast.training.interrupt import Interrupt, TrainingInterrupted, deferred_interrupt
from kdfast.training.metrics import MetricsLog
from kdfast.training.optim import build_optimizer, build_schedule
from kdfast.training.place import Place, check_same_run, place_of
from kdfast.training.progress import Progress
from kdfast.training.rng import rng_state, seed_everything, set_rng_state
from kdfast.training.state import first_not_finite
from kdfast.training.telling import Teller, score_of

__all__ = ["Stateful", "TrainResult", "Trainer", "TrainerConfig", "TrainingInterrupted"]

StepFunction = Callable[[nn.Module, Any], Loss]
#: Steps between asking all ranks whether one was interrupted: each asking waits for the device.
_AGREE_EVERY = 8


class Trainer:
    """Trains one network; resumes to the same result bit for bit on a CPU.

    Args:
        model: The network to train; moved to the device.
        step: Called as ``step(model, batch)`` with the prepared network and a batch on the device; returns the
            loss, or the loss and a dict of 0-d tensors to log beside it. Gradients, precision and optimiser are the
            trainer's business.
        config: How to train.
        out: Directory for ``checkpoints/``, ``metrics.jsonl`` and ``tensorboard/``; ``None`` writes nothing.
        evaluate: Called as ``evaluate(network)`` after epochs, on every rank; returns metrics by name.
        state: Further objects with ``state_dict`` and ``load_state_dict`` to keep in checkpoints.
        fingerprint: JSON facts that a resumed run must agree on, such as its recipe.
        name: What the progress bar says.
        keep_best: Called with the network, by the main process, whenever accuracy or mIoU is the highest so far.

    Example:
        >>> trainer = Trainer(student, method.step, TrainerConfig(epochs=240), out="runs/cifar")
        >>> trainer.fit(loader, resume=True).metrics["accuracy"]
    """

    def __init__(
        self,
        model: nn.Module,
        step: StepFunction,
        config: TrainerConfig | None = None,
        *,
        out: str | Path | None = None,
        evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
        state: Mapping[str, Stateful] | None = None,
        fingerprint: Mapping[str, Any] | None = None,
        name: str = "train",
        keep_best: Callable[[nn.Module], None] | None = None,
    ) -> None:
        self.config = config or TrainerConfig()
        self.accelerator = make_accelerator(self.config.device, self.config.precision)
        self.out = None if out is None else Path(out)
        self._step_function, self._evaluate, self._name = step, evaluate, name
        self._keep_best = keep_best
        self._state, self._fingerprint = dict(state or {}), dict(fingerprint or {})
        optimizer = build_optimizer(model.parameters(), self.config.optimizer)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self._ema: AveragedModel | None = None
        if self.config.ema_decay is not None:
            average = get_ema_multi_avg_fn(self.config.ema_decay)  # type: ignore[no-untyped-call]
            self._ema = AveragedModel(self._bare, multi_avg_fn=average)
        self._place = Place()
        self._log: MetricsLog | None = None

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return cast(torch.device, self.accelerator.device)

    @property
    def network(self) -> nn.Module:
        """The network as it would be used: unwrapped, the moving average if there is one."""
        return self._bare if self._ema is None else self._ema.module

    @property
    def _bare(self) -> nn.Module:
        return cast(nn.Module, self.accelerator.unwrap_model(self.model))

    def fit(self, batches: Iterable[Any], *, resume: bool = False) -> TrainResult:
        """Train.

        Args:
            batches: Iterated once an epoch; needs ``len()``. If it has ``set_epoch`` that is called first; if it has
                ``state_dict`` and ``load_state_dict``, a run stopped inside an epoch goes on from there, otherwise by
                reading over the batches it has used.
            resume: Go on from the latest checkpoint in ``out``, if there is one.

        Raises:
            TrainingInterrupted: On Ctrl-C, after a checkpoint.
            CheckpointError: The checkpoint is damaged or another run's, or the disk is full.
            KDFastError: The loss is no longer finite.
        """
        total = self._plan(batches)
        found = latest_checkpoint(self.out / "checkpoints") if resume and self.out is not None else None
        # Every rank must have looked before rank 0 writes a new checkpoint.
        self.accelerator.wait_for_everyone()
        restored = None if found is None else load_checkpoint(found)
        if restored is None:
            seed_everything(self.config.seed + self.accelerator.process_index)
        else:
            self._restore(restored, batches)
        self._open_log(resumed=restored is not None)
        try:
            with deferred_interrupt() as interrupt, hearing(self.accelerator), self._progress() as progress:
                task = progress.task(self._name, total=total, unit="step", completed=self._place.step)
                epochs = 0 if self.config.max_steps else self.config.epochs
                self._run(batches, total, restored, interrupt, Teller(progress, task, epochs))
        finally:
            if self._log is not None:
                self._log.close()
        place = self._place
        return TrainResult(self.network.eval(), dict(place.metrics), place.step, place.images, place.seconds)

    def dry_run(self, batches: Iterable[Any]) -> float:
        """Take one real optimiser step on the first batch and return its loss; nothing is written."""
        self._plan(batches)
        self.model.train()
        loss = float(self._optimize([next(iter(batches))])[0])
        self._check_finite(loss)
        return loss

    def _run(
        self,
        batches: Any,
        total: int,
        restored: Checkpoint | None,
        interrupt: Interrupt,
        teller: Teller,
    ) -> None:
        place, config = self._place, self.config
        clock = time.monotonic() - place.seconds
        window = self._window = Window(self.device)
        last_epoch = self._epochs(total)
        while place.epoch < last_epoch and place.step < total:
            self.model.train()
            iterator = each("trainer.data", self._iterate(batches, restored))
            restored = None
            # Groups are taken as they come: looking ahead would put the loader's state past what was used.
            while place.step < total and (group := list(islice(iterator, config.accumulate))):
                loss, parts = self._optimize(group)
                images = sum(count_images(batch) for batch in group) * self.accelerator.num_processes
                place.step, place.batch, place.images = (
                    place.step + 1,
                    place.batch + len(group),
                    place.images + images,
                )
                place.seconds = time.monotonic() - clock
                window.add(loss, images, parts)
                logged = place.step % config.log_every == 0 or place.step == total
                teller.step(place, loss, self._log_window(window) if logged else None)
                if place.batch >= len(batches):  # the loader already stands at the next epoch: so must we
                    break
                if place.step % _AGREE_EVERY == 0 or self.accelerator.num_processes == 1:
                    self._stop_if_asked(interrupt, batches)
                if config.checkpoint_steps and place.step % config.checkpoint_steps == 0:
                    self._save(batches)
            place.epoch, place.batch = place.epoch + 1, 0
            ended = place.epoch == last_epoch or place.step >= total
            metrics: dict[str, float] = {}
            if self._evaluate is not None and (ended or place.epoch % config.eval_every == 0):
                with phase("trainer.evaluate"):
                    metrics = self._evaluate(self.network)
                self._log_evaluation(metrics)
            teller.epoch(place, metrics, last=ended)
            place.seconds = time.monotonic() - clock
            if ended or place.epoch % config.checkpoint_every == 0:
                self._save(batches)
            if not ended:
                self._stop_if_asked(interrupt, batches)

    def _optimize(self, group: list[Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """One optimiser step over the batches of a group; returns their mean loss and parts, still on the device."""
        total = torch.zeros((), device=self.device)
        sums: dict[str, torch.Tensor] = {}
        for number, batch in enumerate(group):
            last = number == len(group) - 1
            # Gradients of all ranks are averaged once a group, with its last batch.
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                with phase("trainer.forward"):
                    batch = to_device(batch, self.device)
                    with self.accelerator.autocast():
                        loss, parts = split_loss(self._step_function(self.model, batch))
                with phase("trainer.backward"):
                    self.accelerator.backward(loss / len(group))
            total += loss.detach().float() / len(group)
            for name, value in parts.items():
                sums[name] = sums.get(name, 0) + value / len(group)
        with phase("trainer.optimizer"):
            if self.config.clip_grad_norm is not None:
                self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.clip_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self._schedule.step()
            if self._ema is not None:
                self._ema.update_parameters(self._bare)
        return total, sums

    def _iterate(self, batches: Iterable[Any], restored: Checkpoint | None) -> Iterator[Any]:
        """This epoch's batches; after a restart those that are left of it, with the random states as they were."""
        rank, used = self.accelerator.process_index, self._place.batch
        if restored is not None:
            set_rng_state(restored.states["epoch_rng" if used else "rng"][rank])
        self._epoch_rng = rng_state()
        reread = restored is not None and used > 0
        if hasattr(batches, "set_epoch") and not (reread and resumable(batches)):
            batches.set_epoch(self._place.epoch)
        iterator = iter(batches)
        if restored is not None and reread:
            if not resumable(batches):
                for _ in islice(iterator, used):
                    pass
            set_rng_state(restored.states["rng"][rank])
        return iterator

    def _stop_if_asked(self, interrupt: Interrupt, batches: Iterable[Any]) -> None:
        number = interrupt.signal or 0
        if max(gather_objects(number)):
            raise TrainingInterrupted(self._save(batches), number or signal.SIGINT)

    def _log_window(self, window: Window) -> float:
        loss, speed, parts = window.close()
        self._check_finite(loss)
        rate = self.optimizer.param_groups[0]["lr"]
        if self._log is not None:
            place = self._place
            self._log.write(
                "train",
                place.step,
                epoch=place.epoch + 1,
                loss=loss,
                lr=rate,
                images_per_second=round(speed, 2),
                seconds=round(place.seconds, 3),
                **parts,
            )
        return loss

    def _log_evaluation(self, metrics: dict[str, float]) -> None:
        place = self._place
        if self._log is not None:
            self._log.write("eval", place.step, epoch=place.epoch, seconds=round(place.seconds, 3), **metrics)
        kept = {key: value for key, value in place.metrics.items() if key.startswith("best_")}
        name = score_of(metrics)
        if name is not None and metrics[name] > kept.get(f"best_{name}", -math.inf):
            kept = {f"best_{name}": metrics[name], "best_epoch": place.epoch}
            if self._keep_best is not None and self.accelerator.is_main_process:
                self._keep_best(self.network)
        place.metrics = {**metrics, **kept}

    def _check_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise self._not_finite(f"the loss became {loss}")

    def _check_worth_keeping(self) -> None:
        """Look before a checkpoint takes the place of a good one: one wait for the device.

        Raises:
            KDFastError: The loss or a weight is no longer a number, on any rank.
        """
        parts = [self._bare.state_dict(), self.optimizer.state_dict()["state"]]
        if self._ema is not None:
            parts.append(self._ema.state_dict())
        lost = first_not_finite(parts)
        window = getattr(self, "_window", None)
        if lost is None and window is not None and not window.finite():
            lost = "the loss"
        if found := [name for name in gather_objects(lost) if name is not None]:
            raise self._not_finite(f"{found[0]} is no longer finite")

    def _not_finite(self, what: str) -> KDFastError:
        kept = None if self.out is None else latest_checkpoint(self.out / "checkpoints")
        where = "" if kept is None else f"; the last checkpoint from before is {kept}"
        return KDFastError(
            f"{what} by step {self._place.step} (epoch {self._place.epoch + 1}); a lower lr, "
            f"clip_grad_norm, or precision fp32 or bf16 may help{where}"
        )

    @annotate("trainer.checkpoint")
    def _save(self, batches: Any) -> Path | None:
        if self.out is None:
            return None
        self._check_worth_keeping()
        place = self._place
        states: dict[str, Any] = {
            "model": self._bare.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "place": vars(place),
            "rng": gather_objects(rng_state()),
            "epoch_rng": gather_objects(self._epoch_rng),
            "loader": gather_objects(batches.state_dict() if resumable(batches) else None),
            **{f"extra_{name}": thing.state_dict() for name, thing in self._state.items()},
        }
        if self._ema is not None:
            states["ema"] = self._ema.state_dict()
        if self.accelerator.scaler is not None:
            states["scaler"] = self.accelerator.scaler.state_dict()
        path = self.out / "checkpoints" / f"step-{place.step:08d}"
        if self.accelerator.is_main_process:
            ranks = self.accelerator.num_processes
            info = {"fingerprint": self._fingerprint, "epoch": place.epoch, "world_size": ranks}
            path = save_checkpoint(path.parent, states, step=place.step, info=info, keep=self.config.keep)
        self.accelerator.wait_for_everyone()
        return path

    def _restore(self, checkpoint: Checkpoint, batches: Any) -> None:
        check_same_run(checkpoint, self._fingerprint, self.accelerator.num_processes)
        states = checkpoint.states
        try:
            self._bare.load_state_dict(states["model"])
            self.optimizer.load_state_dict(states["optimizer"])
            self._schedule.load_state_dict(states["schedule"])
            if self._ema is not None:
                self._ema.load_state_dict(states["ema"])
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(states["scaler"])
            for name, thing in self._state.items():
                thing.load_state_dict(states[f"extra_{name}"])
            self._place = place_of(states["place"], checkpoint)
            loader = states["loader"][self.accelerator.process_index] if resumable(batches) else None
            if loader is not None:
                batches.load_state_dict(loader)
        except (KeyError, RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
            problem = " ".join(str(error).split())
            raise CheckpointError(f"{checkpoint.path}: does not fit this run: {problem}") from error
        if self.accelerator.is_main_process:
            prune(checkpoint.path.parent, self.config.keep)

    def _open_log(self, *, resumed: bool) -> None:
        if self.out is None or not self.accelerator.is_main_process:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        board = self.out / "tensorboard" if self.config.tensorboard else None
        self._log = MetricsLog(
            self.out / "metrics.jsonl", resume_step=self._place.step if resumed else None, tensorboard=board
        )

    def _progress(self) -> Progress:
        return Progress(enabled=self.config.progress and self.accelerator.is_main_process)

    def _plan(self, batches: Any) -> int:
        """Make the learning rate's schedule; returns the steps of the whole run."""
        per_epoch, total = self.steps_of(batches)
        self._schedule = build_schedule(
            self.optimizer.optimizer, self.config.schedule, steps_per_epoch=per_epoch, total_steps=total
        )
        return total

    def steps_of(self, batches: Any) -> tuple[int, int]:
        """Optimiser steps in an epoch of these batches, and in the whole run.

        Raises:
            TypeError: They have no length.
            KDFastError: There are none, or ranks have different numbers of them.
        """
        try:
            count = len(batches)
        except TypeError:
            raise TypeError(
                f"batches: got a {type(batches).__name__} without a length, accepted: one with len()"
            ) from None
        if count < 1:
            raise KDFastError("batches: got none, accepted: at least one batch an epoch")
        counts = gather_objects(count)
        if len(set(counts)) > 1:
            raise KDFastError(
                f"batches: ranks have {counts}, accepted: as many on each rank (last_batch='fill')"
            )
        per_epoch = math.ceil(count / self.config.accumulate)
        return per_epoch, self.config.max_steps or per_epoch * self.config.epochs

    def _epochs(self, total: int) -> int:
        return total if self.config.max_steps else self.config.epochs

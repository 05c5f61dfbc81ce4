"""kdfast's losses in the shapes that other libraries call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.distributed
from torch import nn

from kdfast.functional import jsd_loss, kd_kl_div
from kdfast.models.roles import check_networks, check_teacher

__all__ = ["Distiller", "GKDMixin", "KLDivLoss", "TrainerLoss", "generalized_jsd_loss"]

#: What Transformers and TRL give to tokens that do not count.
IGNORED = -100


class KLDivLoss(nn.KLDivLoss):
    """``torch.nn.KLDivLoss``, to the letter: whatever that takes, with its value and its gradients.

    It stands here for code that has probabilities only. A divergence of probabilities has nothing left to fuse: its
    rows need not sum to 1 (padding is often multiplied away), so no softmax may be put in for them. Give
    :class:`kdfast.nn.KDLoss` the logits themselves where you can: that saves the two softmaxes before this, keeps the
    digits of a small divergence, and includes the factor T².

    Args:
        reduction: ``"mean"``, ``"batchmean"``, ``"sum"`` or ``"none"``.
        log_target: Whether ``target`` is log-probabilities.
        dim: The class dimension, as :class:`kdfast.nn.KDLoss` has it. The value does not depend on it.
    """

    def __init__(
        self,
        reduction: Literal["mean", "batchmean", "sum", "none"] = "mean",
        log_target: bool = False,
        *,
        dim: int = -1,
    ) -> None:
        if reduction not in ("mean", "batchmean", "sum", "none"):
            raise ValueError(f"reduction: got {reduction!r}; accepted: mean, batchmean, sum, none")
        super().__init__(reduction=reduction, log_target=log_target)
        self.dim = dim

    def extra_repr(self) -> str:
        """The options."""
        return f"reduction={self.reduction!r}, log_target={self.log_target}, dim={self.dim}"


def generalized_jsd_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: Literal["batchmean", "sum", "mean"] = "batchmean",
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """TRL's ``GKDTrainer.generalized_jsd_loss``, argument for argument: assign it to the trainer class.

    As there, no factor T² (:func:`kdfast.functional.jsd_loss` has it), and ``"batchmean"`` means the mean over
    tokens that count when ``labels`` are given, else the sum over ``student_logits.size(0)``.

    Args:
        student_logits: ``[batch, tokens, vocabulary]``.
        teacher_logits: The same shape.
        labels: int64 ``[batch, tokens]``; tokens with -100 do not count.
        beta: 0 is KL(teacher ‖ student), 1 is KL(student ‖ teacher).
        temperature: T > 0.
        reduction: ``"batchmean"``, ``"sum"`` or ``"mean"`` (over tokens that count, and the vocabulary).
        num_items_in_batch: Tokens that count over the whole optimizer step (TRL 1.7 and later): the sum is divided by
            it, and ``reduction`` has no part.

    Returns:
        A 0-d tensor, float32 or float64.

    Raises:
        ValueError: Another reduction, or what :func:`~kdfast.functional.jsd_loss` refuses.
    """
    if reduction not in ("batchmean", "sum", "mean"):
        raise ValueError(
            f"reduction: got {reduction!r}; accepted: batchmean, sum, mean (one value a row: "
            "jsd_loss(..., reduction='none'))"
        )
    mask = None if labels is None else labels != IGNORED
    if num_items_in_batch is not None:
        reduction = "sum"
    per_token = mask is not None or reduction == "mean"
    loss = jsd_loss(
        student_logits,
        teacher_logits,
        beta=beta,
        temperature=temperature,
        mask=mask,
        reduction="sum" if reduction == "sum" else "rowmean" if per_token else "batchmean",
    )
    vocabulary = student_logits.shape[-1] if reduction == "mean" else 1
    loss = loss / (temperature * temperature * vocabulary)
    if num_items_in_batch is None:
        return loss
    if isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss / num_items_in_batch


class GKDMixin:
    """TRL's ``GKDTrainer`` with :func:`generalized_jsd_loss`, and one batch's gradient on any number of ranks.

    TRL (1.7 and later) divides by the tokens of all processes and leaves out the factor that makes up for gradients
    being averaged over them, so that two ranks learn at half the rate. Written before the trainer among the bases.

    Example:
        >>> class Trainer(GKDMixin, GKDTrainer):
        ...     pass
    """

    args: Any
    generalized_jsd_loss = staticmethod(generalized_jsd_loss)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The trainer's own, times the number of processes where its count is of all of them."""
        found: Any = super().compute_loss(  # type: ignore[misc]
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )
        if num_items_in_batch is None or not getattr(self.args, "average_tokens_across_devices", True):
            return found
        loss, *others = found if return_outputs else (found,)
        loss = loss * _processes()
        return (loss, *others) if return_outputs else loss


class TrainerLoss:
    """A 🤗 Trainer's ``compute_loss``: the model's own loss and the distillation of a frozen teacher.

    ``loss = ce_weight · model's loss + kd_weight · kd``, kd being the divergence's mean over tokens (or rows)
    that count. Models that shift labels inside, as causal language models do, compare each token's logits with
    the label of the next: with ``shift_labels=True`` so does this.

    Args:
        teacher: A module called as the student is, on the same inputs: in evaluation mode, none of its parameters
            requiring grad.
        temperature: T > 0.
        kd_weight: Weight of the distillation.
        ce_weight: Weight of the loss that the model returns; at 0 labels only serve as mask.
        beta: None for :func:`~kdfast.functional.kd_kl_div`, else β of :func:`~kdfast.functional.jsd_loss`.
        shift_labels: Whether the label at position i + 1 belongs to the logits at i.
        average_tokens_across_devices: As the Trainer's argument of that name, whose default is True, too: whether
            ``num_items_in_batch`` counts the tokens of all processes.

    Raises:
        ValueError: The teacher requires grad or is in training mode.

    Example:
        >>> class DistillationTrainer(Trainer):
        ...     def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ...         return kd(model, inputs, return_outputs, num_items_in_batch)
    """

    def __init__(
        self,
        teacher: nn.Module,
        *,
        temperature: float = 2.0,
        kd_weight: float = 0.5,
        ce_weight: float = 0.5,
        beta: float | None = None,
        shift_labels: bool = False,
        average_tokens_across_devices: bool = True,
    ) -> None:
        self.average_tokens_across_devices = average_tokens_across_devices
        self.teacher = check_teacher(teacher)
        self.temperature, self.kd_weight, self.ce_weight = temperature, kd_weight, ce_weight
        self.beta, self.shift_labels = beta, shift_labels

    def __call__(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """What ``Trainer.compute_loss`` returns: the loss, or with ``return_outputs`` loss and outputs.

        With ``num_items_in_batch`` (the labels of all accumulated batches) both parts are sums over it: the
        distillation, and the model's own loss, which gets it as the Trainer's own ``compute_loss`` hands it on. Both
        are then multiplied by the number of processes where it counts the tokens of all, since gradients are averaged
        over them. The gradient is that of one large batch, however it is accumulated or spread.

        Args:
            model: The student.
            inputs: Keyword arguments of both networks; ``labels`` may be among them.
            return_outputs: Also return the student's outputs.
            num_items_in_batch: The number of labels that count over the whole optimizer step, or None.
        """
        counted = (
            {}
            if num_items_in_batch is None or not _takes_count(model)
            else {"num_items_in_batch": num_items_in_batch}
        )
        outputs = model(**inputs, **counted)
        with torch.no_grad():
            # Only the student needs its own loss; without labels the teacher computes none.
            theirs = self.teacher(**{key: value for key, value in inputs.items() if key != "labels"})
        student, teacher = _field(outputs, "logits"), _field(theirs, "logits")
        labels = inputs.get("labels")
        if labels is not None and self.shift_labels:
            student, teacher, labels = student[..., :-1, :], teacher[..., :-1, :], labels[..., 1:]
        mask = labels != IGNORED if labels is not None and labels.shape == student.shape[:-1] else None
        options: dict[str, Any] = {"temperature": self.temperature, "mask": mask}
        options["reduction"] = "rowmean" if num_items_in_batch is None else "sum"
        if self.beta is None:
            distilled = kd_kl_div(student, teacher, **options)
        else:
            distilled = jsd_loss(student, teacher, beta=self.beta, **options)
        if num_items_in_batch is not None:
            distilled = distilled / num_items_in_batch
        loss = self.kd_weight * distilled
        if self.ce_weight:
            own = _field(outputs, "loss")
            if own is None:
                raise ValueError("inputs: the model returned no loss; give labels, or set ce_weight=0")
            if num_items_in_batch is not None and not counted:  # a mean over this batch alone
                rows = mask.sum() if mask is not None else student[..., 0].numel()
                own = own * (rows / num_items_in_batch)
            loss = loss + self.ce_weight * own
        if num_items_in_batch is not None and self.average_tokens_across_devices:
            loss = loss * _processes()
        return (loss, outputs) if return_outputs else loss


def _takes_count(model: nn.Module) -> bool:
    """Whether a model divides its loss by ``num_items_in_batch``, as the Trainer finds out."""
    while isinstance(inner := getattr(model, "module", None), nn.Module):  # DDP and its like take any keyword
        model = inner
    declared = getattr(model, "accepts_loss_kwargs", None)
    if declared is not None:
        return bool(declared)
    parameters = inspect.signature(model.forward).parameters
    return any(p.kind is p.VAR_KEYWORD or name == "num_items_in_batch" for name, p in parameters.items())


def _processes() -> int:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if distributed else 1


def _field(outputs: Any, name: str) -> Any:
    """A field of a model's outputs, which are an object or a mapping; None where there is none."""
    return outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)


class Distiller(nn.Module):
    """Student, frozen teacher and loss as one module, to be a member of a ``LightningModule`` (or of any loop).

    Calling it is calling the student, but for ``distiller(distil=batch)``, which is :meth:`step` by a way that wrappers
    see: under DistributedDataParallel (Accelerate's ``prepare``) that is the call to make. The teacher stays in eval
    mode whatever ``train()`` says, follows ``to(device)``, gets no gradient, and is neither in ``parameters()`` nor in
    ``state_dict()``: a checkpoint holds the student alone.

    Args:
        student: The network to train.
        teacher: The network to learn from: in evaluation mode, none of its parameters requiring grad.
        loss: Takes student's and teacher's logits, and the target where ``with_target``; one of
            :mod:`kdfast.nn`.
        with_target: Whether the loss takes the target (:class:`~kdfast.nn.DKDLoss` does).

    Raises:
        ValueError: The teacher requires grad or is in training mode, or the student has nothing to learn.

    Example:
        >>> class Lit(L.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.kd = Distiller(student, teacher, loss=KDLoss(4.0))
        ...     def training_step(self, batch, batch_idx):
        ...         return self.kd.step(batch)
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        loss: Callable[..., torch.Tensor],
        with_target: bool = False,
    ) -> None:
        super().__init__()
        check_networks(student, teacher)
        self.student, self.loss, self.with_target = student, loss, with_target
        # In a tuple, nn.Module does not register it.
        self._teacher = (teacher,)

    @property
    def teacher(self) -> nn.Module:
        """The frozen network."""
        return self._teacher[0]

    def forward(self, *args: Any, distil: tuple[torch.Tensor, ...] | None = None, **kwargs: Any) -> Any:
        """The student's output, or with ``distil`` the loss of that batch."""
        return self.student(*args, **kwargs) if distil is None else self._loss(distil)

    def step(self, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """The loss of a batch ``(inputs, target)``, or ``(inputs,)`` where the loss takes no target.

        Raises:
            RuntimeError: Several processes run and nothing would synchronise the gradients.
        """
        self._check_synchronised()
        return self._loss(batch)

    def _check_synchronised(self) -> None:
        ddp = nn.parallel.DistributedDataParallel
        within = (
            getattr(ddp, "_active_ddp_module", None) is not None
        )  # Lightning calls training_step in there
        sharded = any(hasattr(p, "device_mesh") for p in self.student.parameters())  # fully_shard
        wrapped = isinstance(self.student, ddp) or "FullyShardedDataParallel" in type(self.student).__name__
        if _processes() > 1 and torch.is_grad_enabled() and not (within or sharded or wrapped):
            raise RuntimeError(
                f"step: {_processes()} processes run, and a step past the wrapper leaves each its own gradients; "
                "call ddp(distil=batch) on DistributedDataParallel(distiller), or give Distiller a student that is "
                "wrapped already"
            )

    def _loss(self, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        inputs = batch[0]
        if self.with_target and len(batch) < 2:
            raise ValueError(
                f"batch: got {len(batch)} tensor; the loss takes a target, so (inputs, target) is needed"
            )
        with torch.no_grad():
            expected = self.teacher(inputs)
        target = (batch[1],) if self.with_target else ()
        return self.loss(self.student(inputs), expected, *target)

    def _apply(self, fn: Any, recurse: bool = True) -> Distiller:
        self.teacher._apply(fn, recurse)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

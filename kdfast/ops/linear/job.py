"""What the fused heads are called with, as one tuple and as the arguments of a registered op."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from kdfast.ops.common.gradients import Value, join_value, split_value
from kdfast.reference.common import compute_dtype

__all__ = ["SCHEMA", "Job", "flat", "job_of"]

Tensor = torch.Tensor


class Job(NamedTuple):
    """What the loss is of; rows are flat, and the caller has checked all of it.

    Attributes:
        hidden: The student's hidden states ``[rows, H]``.
        weight: ``[V, H]``.
        bias: ``[V]`` or None.
        teacher_hidden: ``[rows, H_t]``, with ``teacher_weight`` and ``teacher_bias``; or None.
        teacher_weight: ``[V, H_t]`` or None.
        teacher_bias: ``[V]`` or None.
        teacher_logits: ``[rows, V]``, or with ``teacher_index`` ``[rows, k]``; or None.
        teacher_index: int64 ``[rows, k]`` or None.
        teacher_normalizer: ``[rows]`` or None.
        kind: One of :data:`kdfast.reference.pair.KINDS`.
        numbers: (α, β), as :func:`kdfast.functional.divergence.check_kind` has them.
        kd_weight: Of the divergence.
        smoothing: Of the labels.
        softcap: c of c·tanh(x/c), of the student's logits; 0: none.
        teacher_softcap: The same of the teacher's.
        bucket: Of the top-k divergence.
        temperature: T.
        ratio: T over the teacher's.
        row_weight: ``[rows]`` or None.
        mask: bool ``[rows]`` or None.
        divisor: Of the whole sum.
        label: int64 ``[rows]`` or None.
        factor: Of each label times ``divisor``; 0 where it is ignored.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    teacher_hidden: Tensor | None
    teacher_weight: Tensor | None
    teacher_bias: Tensor | None
    teacher_logits: Tensor | None
    teacher_index: Tensor | None
    teacher_normalizer: Tensor | None
    kind: str
    numbers: tuple[float, float]
    kd_weight: float
    smoothing: float
    softcap: float
    teacher_softcap: float
    bucket: bool
    temperature: Value
    ratio: Value
    row_weight: Tensor | None
    mask: Tensor | None
    divisor: Value
    label: Tensor | None
    factor: Tensor | None

    def take(self, rows: slice | Tensor) -> Job:
        """Some of the rows."""
        parts = {name: getattr(self, name) for name in _ROWWISE}
        return self._replace(**{name: x[rows] for name, x in parts.items() if x is not None})

    @property
    def dtype(self) -> torch.dtype:
        """What logits are computed in."""
        return compute_dtype(
            *(x for x in (self.hidden, self.teacher_hidden, self.teacher_logits) if x is not None)
        )

    @property
    def kept(self) -> torch.dtype:
        """What gradients are kept in until the backward.

        Divided by the rows, they are among float16's smallest numbers, and would lose their digits before a loss's
        scale (``torch.amp.GradScaler``) multiplies them; bfloat16 reaches as far down as float32.
        """
        return self.dtype if self.weight.dtype == torch.float16 else self.weight.dtype

    @property
    def alike(self) -> bool:
        """Whether both sides have one temperature."""
        return not isinstance(self.ratio, Tensor) and self.ratio == 1.0


_ROWWISE = (
    "hidden", "teacher_hidden", "teacher_logits", "teacher_index", "teacher_normalizer", "row_weight", "mask", "label",
    "factor",
)  # fmt: skip


def flat(job: Job) -> tuple[Any, ...]:
    """The arguments of the registered op: a value that may be a tensor travels as both."""
    out: list[Any] = []
    for name, value in job._asdict().items():
        out += split_value(value) if name in ("temperature", "ratio", "divisor") else [value]
    return tuple(out)


def job_of(arguments: tuple[Any, ...]) -> Job:
    """What :func:`flat` took apart."""
    given = iter(arguments)
    values: dict[str, Any] = {}
    for name in Job._fields:
        value = next(given)
        values[name] = (
            join_value(value, next(given)) if name in ("temperature", "ratio", "divisor") else value
        )
    return Job(**values)


SCHEMA = (
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor? teacher_hidden, Tensor? teacher_weight, "
    "Tensor? teacher_bias, Tensor? teacher_logits, Tensor? teacher_index, Tensor? teacher_normalizer, str kind, "
    "float[] numbers, float kd_weight, float smoothing, float softcap, float teacher_softcap, bool bucket, "
    "float temperature, Tensor? temperature_tensor, float ratio, Tensor? ratio_tensor, Tensor? row_weight, "
    "Tensor? mask, float divisor, Tensor? divisor_tensor, Tensor? label, Tensor? factor, SymInt chunk_rows, "
    "bool need_hidden, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor, Tensor)"
)

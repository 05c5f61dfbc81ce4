"""A teacher's logits, compressed to the k largest of each row and the mass of all others, and read back."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kdfast.functional._checks import as_number, check_logits, check_temperature
from kdfast.functional.topk import topk_kd_loss

__all__ = ["TopKTeacher"]

#: Elements of float32 that are widened at a time.
CHUNK = 1 << 24
#: Classes that 16 bits count.
SHORT = 1 << 16


class TopKTeacher(NamedTuple):
    """The k largest log-probabilities of each row at temperature T, in float16, and the logarithm of the tail's mass.

    A token takes **4k + 2 bytes** up to 65536 classes and **6k + 2** beyond: 258 and 386 at k = 64, where a
    vocabulary of 32000 takes 64000 in float16, and one of 128256 256512. A float16 log-probability x is off by at most
    2⁻¹¹·|x|, and so, relatively, is the probability: 0.1 % at e⁻². Reading back divides by the sum of what was kept and
    the tail, so that rounding moves no mass between them.

    Attributes:
        indices: The classes, largest first: int16 bit patterns up to 65536 classes, int32 beyond, ``[..., k]``.
        log_probs: log softmax(logits/T) there, float16, ``[..., k]``.
        log_tail: Logarithm of the mass of all other classes, float16, ``[...]``; -inf where there is none.
        temperature: T.
        num_classes: V.

    Example:
        >>> stored = TopKTeacher.compress(teacher(tokens).logits, k=64, temperature=2.0)
        >>> stored.save("shard-0.pt")
        >>> loss = TopKTeacher.load("shard-0.pt").loss(student_logits, mask=labels != -100, reduction="rowmean")
        >>> loss = fused_linear_kd_loss(hidden, head.weight, teacher_topk=stored.read(), temperature=2.0)
    """

    indices: torch.Tensor
    log_probs: torch.Tensor
    log_tail: torch.Tensor
    temperature: float
    num_classes: int

    @classmethod
    def compress(cls, logits: torch.Tensor, k: int, *, temperature: float = 1.0) -> TopKTeacher:
        """Keep the k largest of each row.

        Args:
            logits: The teacher's, ``[..., V]``, any floating dtype; detached. -inf rules a class out.
            k: How many to keep, 1 to V.
            temperature: T > 0, that the student will be trained at: the tail's mass at another cannot be told from what
                is kept.

        Returns:
            The stored teacher, on the logits' device.

        Raises:
            TypeError: Logits that are not floating point, a k that is no int.
            ValueError: k or T out of what is said above.
        """
        check_logits(logits, logits, ("logits", "logits"))
        heat = check_temperature(as_number(temperature), logits)
        if isinstance(heat, torch.Tensor):
            raise TypeError(f"temperature: got a tensor on {heat.device}; a float is needed, which is stored")
        if not isinstance(k, int) or isinstance(k, bool):
            raise TypeError(f"k: got {type(k).__name__}; an int is needed")
        classes = logits.shape[-1]
        if not 1 <= k <= classes:
            raise ValueError(f"k: got {k}; 1 to {classes} is needed, the classes of logits")
        rows = logits.detach().flatten(0, -2) if logits.dim() > 1 else logits.detach().unsqueeze(0)
        step = max(1, CHUNK // classes)
        parts = [_compressed(rows[at : at + step], k, heat) for at in range(0, max(1, len(rows)), step)]
        indices, kept, tail = (torch.cat(part) for part in zip(*parts, strict=True))
        shape = logits.shape[:-1]
        return cls(indices.view(*shape, k), kept.view(*shape, k), tail.view(shape), heat, classes)

    @property
    def bytes_per_row(self) -> int:
        """What a row (a token) takes in memory and on disk."""
        k = self.indices.shape[-1]
        return (
            k * (self.indices.element_size() + self.log_probs.element_size()) + self.log_tail.element_size()
        )

    def rows(self, rows: Any) -> TopKTeacher:
        """Some of the rows, by what indexes their leading sizes: ``slice(3, 7)``, a mask, places."""
        return self._replace(
            indices=self.indices[rows], log_probs=self.log_probs[rows], log_tail=self.log_tail[rows]
        )

    def to(self, device: torch.device | str) -> TopKTeacher:
        """The same on another device."""
        return self._replace(
            indices=self.indices.to(device),
            log_probs=self.log_probs.to(device),
            log_tail=self.log_tail.to(device),
        )

    def read(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``(indices, logits, log_normalizer)`` as :func:`topk_kd_loss` takes them at ``temperature``.

        int64 ``[..., k]``, float32 ``[..., k]`` (T times the log-probabilities), float32 ``[...]``: the logarithm of
        everything's mass, near 0. ``teacher_topk=stored.read()`` for :func:`fused_linear_kd_loss`.
        """
        indices = self.indices.long()
        if self.num_classes <= SHORT:
            indices = indices & 0xFFFF
        log_probs = self.log_probs.float()
        everything = torch.cat([log_probs, self.log_tail.float().unsqueeze(-1)], -1).logsumexp(-1)
        return indices, log_probs * self.temperature, everything

    def loss(self, student: torch.Tensor, **options: Any) -> torch.Tensor:
        """:func:`topk_kd_loss` of a student's logits ``[..., V]`` at ``temperature``, the tail being one outcome.

        Args:
            student: Logits over the same classes.
            **options: ``reduction``, ``row_weight`` and ``mask`` of :func:`topk_kd_loss`.

        Raises:
            ValueError: Another number of classes, or what :func:`topk_kd_loss` refuses.
        """
        if student.shape[-1] != self.num_classes:
            raise ValueError(
                f"student: got {student.shape[-1]} classes; the stored teacher has {self.num_classes}"
            )
        indices, logits, everything = self.read()
        return topk_kd_loss(
            student, indices, logits, temperature=self.temperature, log_normalizer=everything, **options
        )

    def save(self, path: str | Path) -> None:
        """Write a file, whole or not at all, that :meth:`load` reads."""
        from kdfast.disk import write_atomic

        buffer = io.BytesIO()
        # A view would be written with all that it is a view of.
        torch.save({name: _own(value) for name, value in self._asdict().items()}, buffer)
        write_atomic(Path(path), buffer.getbuffer())

    @classmethod
    def load(cls, path: str | Path) -> TopKTeacher:
        """What :meth:`save` wrote, on the CPU; rows are read from the file as they are used (mapped memory).

        Raises:
            FileNotFoundError: No such file.
            ValueError: Another kind of file.
        """
        try:
            found = torch.load(str(path), weights_only=True, mmap=True, map_location="cpu")
            return cls(**found)
        except FileNotFoundError:
            raise
        except Exception as error:
            raise ValueError(f"path: {path} is no stored teacher of TopKTeacher.save ({error})") from error


def _own(value: Any) -> Any:
    return value.detach().cpu().contiguous().clone() if isinstance(value, torch.Tensor) else value


def _compressed(
    rows: torch.Tensor, k: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of rows ``[n, V]``; the tail is summed by itself, since 1 minus what is kept loses its digits."""
    wide = rows if rows.dtype == torch.float64 else rows.float()
    log_probs = torch.log_softmax(wide / temperature, -1)
    kept, indices = log_probs.topk(k, -1)
    tail = log_probs.scatter(-1, indices, float("-inf")).logsumexp(-1)
    # 16 bits, whose upper half int16 has as negative numbers.
    narrow = indices.to(torch.int32 if rows.shape[-1] > SHORT else torch.int16)
    return narrow, kept.half(), tail.half()

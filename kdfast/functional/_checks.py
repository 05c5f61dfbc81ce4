"""Argument checks shared by the public functions: each error names the argument, what it got, what it takes."""

from __future__ import annotations

import math
from typing import Any, get_args

import torch

from kdfast.documents import shown
from kdfast.functional._reduction import Reduction

#: Every float that a kernel gets has to be one in its arithmetic, float32.
_LARGEST = float(torch.finfo(torch.float32).max)


def check_tensor(name: str, value: Any, needed: str = "a tensor") -> None:
    """A tensor whose elements lie in memory one by one: not sparse, quantised or nested."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}; {needed} is needed")
    if value.layout != torch.strided or value.is_nested or value.is_quantized:
        kind = "nested" if value.is_nested else "quantised" if value.is_quantized else str(value.layout)
        raise TypeError(f"{name}: got a tensor that is {kind}; a dense one is needed")


def check_floating(name: str, value: Any, needed: str = "a floating-point tensor") -> None:
    """A dense tensor of a floating-point dtype."""
    check_tensor(name, value)
    if not value.is_floating_point():
        raise TypeError(f"{name}: got dtype {value.dtype}; {needed} is needed")


def check_int(name: str, value: Any, low: int, high: int = 2**63 - 1) -> int:
    """An int in [low, high]; no bool."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: got {type(value).__name__}; an int is needed")
    if not low <= value <= high:
        top = "2⁶³ − 1" if high == 2**63 - 1 else high
        raise ValueError(f"{name}: got {shown(value)}; accepted: {low} to {top}")
    return value


def check_bool(name: str, value: Any) -> None:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {type(value).__name__}; a bool is needed")


def check_real(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite float in [low, high]; no bool."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name}: got {type(value).__name__}; a number is needed")
    # Not float(): an int may be beyond any.
    if not (-_LARGEST <= value <= _LARGEST and low <= value <= high):
        bounds = (
            f" from {low:g} to {high:g}"
            if high < math.inf
            else f" of at least {low:g}"
            if low > -math.inf
            else ""
        )
        raise ValueError(f"{name}: got {shown(value)}; a finite number{bounds} is needed")
    return float(value)


def check_sizes(name: str, value: Any) -> tuple[int, int]:
    """Height and width, each from 1 to 2³¹ − 1."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{name}: got {shown(value)}; height and width, two ints, are needed")
    return check_int(name, value[0], 1, 2**31 - 1), check_int(name, value[1], 1, 2**31 - 1)


def check_logits(
    student: torch.Tensor, teacher: torch.Tensor, names: tuple[str, str] = ("student", "teacher")
) -> None:
    """Two floating-point tensors of one shape, at least 1-d, on one device."""
    for name, tensor in zip(names, (student, teacher), strict=True):
        check_tensor(name, tensor, "a tensor of logits")
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: got dtype {tensor.dtype}; floating-point logits are needed")
    if student.shape != teacher.shape:
        raise ValueError(
            f"{names[1]}: got shape {tuple(teacher.shape)}; {names[0]} has {tuple(student.shape)}, and they must match"
        )
    if student.dim() == 0:
        raise ValueError(f"{names[0]}: got a 0-d tensor; logits need a class dimension")
    if student.device != teacher.device:
        raise ValueError(
            f"{names[1]}: is on {teacher.device}; {names[0]} is on {student.device}, and they must match"
        )


def check_dim(dim: int, tensor: torch.Tensor) -> int:
    """The class dimension as a non-negative index."""
    check_int("dim", dim, -(2**63))
    if not -tensor.dim() <= dim < tensor.dim():
        raise ValueError(
            f"dim: got {dim}; accepted: {-tensor.dim()} to {tensor.dim() - 1} for {tensor.dim()}-d logits"
        )
    return dim % tensor.dim()


def check_temperature(temperature: float | torch.Tensor, logits: torch.Tensor) -> float | torch.Tensor:
    """A positive finite float, or a 0-d tensor on the logits' device (whose value is not read: no sync)."""
    if isinstance(temperature, torch.Tensor):
        check_tensor("temperature", temperature)
        if temperature.is_complex() or temperature.dtype == torch.bool:
            raise TypeError(f"temperature: got dtype {temperature.dtype}; a real number is needed")
        if temperature.requires_grad:
            raise ValueError(
                "temperature: requires grad; kdfast gives it no gradient, pass temperature.detach()"
            )
        if temperature.numel() != 1:
            raise ValueError(
                f"temperature: got shape {tuple(temperature.shape)}; a float or a 0-d tensor is needed"
            )
        if temperature.device == logits.device and temperature.device.type != "cpu":
            return temperature.reshape(())
        if temperature.device.type != "cpu":
            raise ValueError(f"temperature: is on {temperature.device}; the logits are on {logits.device}")
        if torch.compiler.is_compiling():
            return temperature.reshape(())  # a value that the trace cannot look at
        temperature = temperature.item()  # host memory: no sync
    temperature = _above("temperature", temperature, 0.0)
    # T² is a factor of the losses, 1/T one of the logits: both have to be float32.
    if not 1e-18 <= temperature <= 1e18:
        raise ValueError(f"temperature: got {temperature}; a value from 1e-18 to 1e18 is needed")
    return temperature


def _above(name: str, value: float, bound: float) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name}: got {type(value).__name__}; a float or a 0-d tensor is needed")
    if not bound < value <= _LARGEST:
        raise ValueError(f"{name}: got {shown(value)}; a finite value above {bound:g} is needed")
    return float(value)


def check_rowwise(
    name: str, value: torch.Tensor | None, rows: torch.Size, logits: torch.Tensor
) -> torch.Tensor | None:
    """One value a row: bool for ``mask``, floating point without gradient otherwise."""
    if value is None:
        return None
    check_tensor(name, value)
    if name == "mask" and value.dtype != torch.bool:
        raise TypeError(f"mask: got dtype {value.dtype}; bool is needed (True = the row counts)")
    if name != "mask" and not value.is_floating_point():
        raise TypeError(f"{name}: got dtype {value.dtype}; a floating-point tensor is needed")
    if value.shape != rows:
        raise ValueError(
            f"{name}: got shape {tuple(value.shape)}; {tuple(rows)} is needed, the logits' without the class dimension"
        )
    if value.device != logits.device:
        raise ValueError(f"{name}: is on {value.device}; the logits are on {logits.device}")
    if value.requires_grad:
        raise ValueError(f"{name}: requires grad; kdfast gives it no gradient, pass {name}.detach()")
    return value


def check_number(
    name: str, value: float | torch.Tensor, logits: torch.Tensor, *, above: float
) -> float | torch.Tensor:
    """A float above a bound, or a 0-d tensor on the logits' device (whose value is not read: no sync)."""
    if isinstance(value, torch.Tensor):
        check_tensor(name, value)
        if value.numel() != 1 or value.requires_grad or value.device != logits.device:
            raise ValueError(
                f"{name}: got shape {tuple(value.shape)} on {value.device}, requires_grad={value.requires_grad}; a 0-d "
                f"tensor on {logits.device} without gradient, or a float, is needed"
            )
        return value.reshape(())
    return _above(name, value, above)


def check_labels(
    name: str,
    labels: torch.Tensor | None,
    rows: torch.Size,
    num_classes: int,
    ignore_index: int,
    logits: torch.Tensor,
) -> torch.Tensor | None:
    """int64 classes, one a row. Their values are looked at on the CPU only, where that does not wait for a GPU."""
    check_int("ignore_index", ignore_index, -(2**63))
    if labels is None:
        return None
    check_tensor(name, labels, "a tensor of classes")
    if labels.dtype != torch.int64:
        raise TypeError(f"{name}: got dtype {labels.dtype}; int64 classes are needed")
    if labels.shape != rows:
        raise ValueError(
            f"{name}: got shape {tuple(labels.shape)}; {tuple(rows)} is needed, the logits' without the class dimension"
        )
    if labels.device != logits.device:
        raise ValueError(f"{name}: is on {labels.device}; the logits are on {logits.device}")
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = (labels != ignore_index) & ((labels < 0) | (labels >= num_classes))
        if bool(wrong.any()):
            raise ValueError(
                f"{name}: got class {int(labels[wrong][0])}; accepted: 0 to {num_classes - 1}, or ignore_index "
                f"({ignore_index})"
            )
    return labels


def check_lam(
    lam: float | torch.Tensor, rows: torch.Size, logits: torch.Tensor, dtype: torch.dtype
) -> float | torch.Tensor:
    """λ of mixed samples: a float from 0 to 1, or a tensor that broadcasts over the rows."""
    if isinstance(lam, torch.Tensor):
        check_floating("lam", lam)
        if lam.requires_grad:
            raise ValueError("lam: requires grad; kdfast gives it no gradient, pass lam.detach()")
        if lam.device != logits.device and lam.dim() > 0:
            raise ValueError(f"lam: is on {lam.device}; the logits are on {logits.device}")
        if lam.dim() == 0 or lam.shape == rows:
            return lam.to(dtype)
        if len(rows) > 1 and lam.shape == rows[:1]:  # one a sample
            return lam.to(dtype).reshape(-1, *[1] * (len(rows) - 1))
        raise ValueError(
            f"lam: got shape {tuple(lam.shape)}; a float, one value a sample or one a row {tuple(rows)} is needed"
        )
    if not isinstance(lam, (int, float)) or isinstance(lam, bool):
        raise TypeError(f"lam: got {type(lam).__name__}; a float or a tensor is needed")
    if not 0 <= lam <= 1:
        raise ValueError(f"lam: got {lam}; 0 to 1 is needed")
    return float(lam)


def check_reduction(reduction: str) -> None:
    """One of :data:`~kdfast.functional._reduction.Reduction`."""
    if not isinstance(reduction, str) or reduction not in get_args(Reduction):
        raise ValueError(f"reduction: got {reduction!r}; accepted: {', '.join(get_args(Reduction))}")


def check_factor(name: str, value: float) -> float:
    """A finite float that is not negative."""
    return check_real(name, value, 0.0)


def check_pair(
    student: torch.Tensor, teacher: torch.Tensor, dim: int, reduction: Reduction
) -> tuple[int, torch.Size]:
    """The class dimension as a non-negative index, and the logits' shape without it."""
    check_reduction(reduction)
    check_logits(student, teacher)
    axis = check_dim(dim, student)
    return axis, student.shape[:axis] + student.shape[axis + 1 :]

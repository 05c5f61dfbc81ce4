"""Argument checks shared by the public functions: each error names the argument, what it got, what it takes."""

from __future__ import annotations

import math
import numbers
from typing import Any, get_args

import torch

from kdfast.documents import shown
from kdfast.functional._reduction import Reduction
from kdfast.ops.common.gradients import has_values

REDUCTIONS = get_args(Reduction)
#: Every float that a kernel gets has to be one in its arithmetic, float32.
_LARGEST = float(torch.finfo(torch.float32).max)
#: Temperatures whose square and whose reciprocal's square are numbers of float32 too.
COLDEST, HOTTEST = 1e-18, 1e18


def check_tensor(name: str, value: Any, needed: str = "a tensor") -> None:
    """A tensor whose elements lie in memory one by one: not sparse, quantised or nested."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}; {needed} is needed")
    if value.layout is not torch.strided or value.is_nested or value.is_quantized:
        check_dense(name, value)  # which says what it is


def elsewhere(name: str, tensor: torch.Tensor, other: str, device: torch.device) -> ValueError:
    """What is said of a tensor on another device than the one it is used with."""
    return ValueError(f"{name}: is on {tensor.device}; {other} is on {device}, and they must match")


def check_dense(name: str, value: torch.Tensor) -> None:
    """A tensor whose elements lie in memory one by one: every other layout fails deep inside, without a name."""
    if value.layout is not torch.strided or value.is_nested or value.is_quantized:
        kind = "nested" if value.is_nested else "quantised" if value.is_quantized else str(value.layout)
        raise TypeError(f"{name}: got a tensor that is {kind}; a dense one is needed")


def check_floating(name: str, value: Any, needed: str = "a floating-point tensor") -> None:
    """A dense tensor of a floating-point dtype."""
    if not (  # in one look, like check_channels: this is on the way of every call
        isinstance(value, torch.Tensor)
        and value.layout is torch.strided
        and not value.is_nested
        and value.is_floating_point()
    ):
        check_tensor(name, value)  # a quantised one is not floating-point either
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
    if not all(isinstance(side, int) and not isinstance(side, bool) and 1 <= side < 2**31 for side in value):
        raise ValueError(f"{name}: got {shown(tuple(value))}; accepted: two ints from 1 to {2**31 - 1}")
    return value[0], value[1]


def check_logits(
    student: torch.Tensor, teacher: torch.Tensor, names: tuple[str, str] = ("student", "teacher")
) -> None:
    """Two floating-point tensors of one shape, at least 1-d, on one device."""
    if not (  # in one look: this is on the way of every loss
        isinstance(student, torch.Tensor)
        and isinstance(teacher, torch.Tensor)
        and student.layout is teacher.layout is torch.strided
        and not student.is_nested
        and not teacher.is_nested
        and student.is_floating_point()
        and teacher.is_floating_point()
        and student.shape == teacher.shape
        and student.dim()
        and student.device == teacher.device
    ):
        _refuse_logits(student, teacher, names)


def _refuse_logits(student: torch.Tensor, teacher: torch.Tensor, names: tuple[str, str]) -> None:
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
    raise elsewhere(names[1], teacher, names[0], student.device)


def refuse_distributed(name: str, tensor: torch.Tensor) -> None:
    """No DTensor, whose rows or columns lie on other ranks."""
    if type(tensor).__name__ == "DTensor":  # to import the class takes longer than a loss
        raise TypeError(
            f"{name}: got a DTensor, whose parts lie on several ranks; a whole tensor is needed: pass "
            f"{name}.full_tensor(), or call inside the forward of the module that FSDP gathers"
        )


def savable(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that autograd may save: one a row that was made under ``torch.inference_mode`` is copied."""
    if not torch.compiler.is_compiling() and tensor.is_inference() and has_values(tensor):
        return tensor if torch.is_inference_mode_enabled() else tensor.clone()
    return tensor


def as_number(value: Any) -> Any:
    """A Python float of what is a number: Python's and numpy's scalars, a 0-d tensor in host memory; else as it is."""
    if type(value) is float:  # nearly always, and at once
        return value
    if isinstance(value, torch.Tensor):
        host = value.device.type == "cpu" and value.numel() == 1 and value.dtype != torch.bool
        host = host and not value.is_complex() and value.layout is torch.strided and not value.is_nested
        return float(value.item()) if host and not value.requires_grad and has_values(value) else value
    if isinstance(value, bool):
        return value
    # numpy.bool_ is no numbers.Real; numpy's 0-d arrays are none either.
    array = getattr(value, "shape", None) == () and getattr(value.dtype, "kind", "") in "iuf"
    try:
        return float(value) if array or isinstance(value, numbers.Real) else value
    except OverflowError:  # an int beyond any float: refused as what it is beyond
        return math.inf if value > 0 else -math.inf


def check_dim(dim: int, tensor: torch.Tensor) -> int:
    """The class dimension as a non-negative index."""
    if not isinstance(dim, int) or isinstance(dim, bool):
        raise TypeError(f"dim: got {type(dim).__name__}; an int is needed")
    dims = tensor.dim()
    if not -dims <= dim < dims:
        raise ValueError(f"dim: got {dim}; accepted: {-dims} to {dims - 1} for {dims}-d logits")
    return dim % dims


def check_temperature(temperature: float | torch.Tensor, logits: torch.Tensor) -> float | torch.Tensor:
    """A positive finite float, or a 0-d tensor on the logits' device (whose value is not read: no sync)."""
    value = temperature if type(temperature) is float else as_number(temperature)
    if isinstance(value, torch.Tensor):
        check_dense("temperature", value)
        if value.requires_grad:
            raise ValueError(
                "temperature: requires grad; kdfast gives it no gradient, pass temperature.detach()"
            )
        if value.numel() != 1 or value.dtype == torch.bool or value.is_complex():
            raise ValueError(
                f"temperature: got shape {tuple(value.shape)} of {value.dtype}; a float or a 0-d tensor is needed"
            )
        if value.device != logits.device:
            raise ValueError(f"temperature: is on {value.device}; the logits are on {logits.device}")
        return value.reshape(())  # on the device, or a value that a trace cannot look at
    if not isinstance(value, float):
        raise TypeError(f"temperature: got {_said(temperature)}; a float or a 0-d tensor is needed")
    changes = torch.compiler.is_compiling() and _unknown(value)
    if not 0 < value < math.inf:  # comparisons, which a trace can follow; NaN fails them
        raise ValueError(f"temperature: got {value}; a finite value above 0 is needed")
    # T² is a factor of the losses, and 1/T one of the logits: in float32, both have to be numbers.
    if not COLDEST <= value <= HOTTEST:
        raise ValueError(f"temperature: got {value}; a value from {COLDEST:g} to {HOTTEST:g} is needed")
    if changes:
        # A number that the trace does not know: as a factor it stays one, as an op's argument it would be fixed.
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        return torch.ones((), dtype=dtype, device=logits.device) * value
    return value


def _unknown(number: float) -> bool:
    """Whether a trace knows of a number only that it is one."""
    # Imported here, where a trace has done so: it takes long.
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return not statically_known_true(number > 0)


def _said(value: Any) -> str:
    """A type, and a text that was given for a number."""
    return f"{type(value).__name__} {value!r}" if isinstance(value, str) else type(value).__name__


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
    _one_a_row(name, value, rows, logits)
    if value.requires_grad:
        raise ValueError(f"{name}: requires grad; kdfast gives it no gradient, pass {name}.detach()")
    return savable(value)


def _one_a_row(name: str, value: torch.Tensor, rows: torch.Size, logits: torch.Tensor) -> None:
    if value.shape != rows:
        raise ValueError(
            f"{name}: got shape {tuple(value.shape)}; {tuple(rows)} is needed, the logits' without the class dimension"
        )
    if value.device != logits.device:
        raise ValueError(f"{name}: is on {value.device}; the logits are on {logits.device}")


def check_channels(name: str, value: torch.Tensor, x: torch.Tensor) -> None:
    """One value a channel of ``x``, on its device."""
    if not (
        isinstance(value, torch.Tensor)
        and value.layout is torch.strided
        and not value.is_nested
        and value.is_floating_point()
    ):
        check_floating(name, value)  # says which it is not
    if value.shape != x.shape[1:2]:
        raise ValueError(
            f"{name}: got shape {tuple(value.shape)}; [{x.shape[1]}] is needed, one a channel of x"
        )
    if value.device != x.device:
        raise elsewhere(name, value, "x", x.device)


def check_number(
    name: str, value: float | torch.Tensor, logits: torch.Tensor, *, above: float
) -> float | torch.Tensor:
    """A float above a bound, or a 0-d tensor on the logits' device (whose value is not read: no sync)."""
    number = as_number(value)
    if isinstance(number, torch.Tensor):
        check_dense(name, number)
        if number.is_complex():
            raise TypeError(f"{name}: got dtype {number.dtype}; a real number is needed")
        if number.numel() != 1 or number.requires_grad or number.device != logits.device:
            raise ValueError(
                f"{name}: got shape {tuple(number.shape)} on {number.device}, requires_grad={number.requires_grad}; a "
                f"0-d tensor on {logits.device} without gradient, or a float, is needed"
            )
        return number.reshape(())
    if not isinstance(number, float):
        raise TypeError(f"{name}: got {_said(value)}; a float or a 0-d tensor is needed")
    if not above < number < math.inf:
        raise ValueError(f"{name}: got {number}; a finite value above {above} is needed")
    _check_float32(name, number)
    return number


def check_labels(
    name: str,
    labels: torch.Tensor | None,
    rows: torch.Size,
    num_classes: int,
    ignore_index: int,
    logits: torch.Tensor,
) -> torch.Tensor | None:
    """int64 classes, one a row. Their values are looked at on the CPU only, where that does not wait for a GPU."""
    ignored: Any = ignore_index
    if type(ignored) is not int and (isinstance(ignored, bool) or not isinstance(ignored, numbers.Integral)):
        raise TypeError(f"ignore_index: got {type(ignore_index).__name__}; an int is needed")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index: got {shown(ignore_index)}; accepted: -2⁶³ to 2⁶³ − 1")
    if labels is None:
        return None
    check_tensor(name, labels, "a tensor of classes")
    if labels.dtype != torch.int64:
        raise TypeError(f"{name}: got dtype {labels.dtype}; int64 classes are needed")
    _one_a_row(name, labels, rows, logits)
    if on_host(labels):
        wrong = (labels != ignore_index) & ((labels < 0) | (labels >= num_classes))
        if bool(wrong.any()):
            raise ValueError(
                f"{name}: got class {int(labels[wrong][0])}; accepted: 0 to {num_classes - 1}, or ignore_index "
                f"({ignore_index})"
            )
    return savable(labels)


def on_host(tensor: torch.Tensor) -> bool:
    """Whether values can be looked at without waiting for a device, and no trace or transform forbids it."""
    return tensor.device.type == "cpu" and has_values(tensor)


def check_lam(
    lam: float | torch.Tensor, rows: torch.Size, logits: torch.Tensor, dtype: torch.dtype
) -> float | torch.Tensor:
    """λ of mixed samples: a float from 0 to 1, or a tensor that broadcasts over the rows."""
    if isinstance(lam, torch.Tensor):
        check_dense("lam", lam)
        if not lam.is_floating_point():
            raise TypeError(f"lam: got dtype {lam.dtype}; floating point is needed")
        if lam.requires_grad:
            raise ValueError("lam: requires grad; kdfast gives it no gradient, pass lam.detach()")
        if lam.device != logits.device and lam.dim() > 0:
            raise ValueError(f"lam: is on {lam.device}; the logits are on {logits.device}")
        if lam.dim() == 0 or lam.shape == rows:
            return savable(lam).to(dtype)
        if len(rows) > 1 and lam.shape == rows[:1]:  # one a sample
            return savable(lam).to(dtype).reshape(-1, *[1] * (len(rows) - 1))
        raise ValueError(
            f"lam: got shape {tuple(lam.shape)}; a float, one value a sample or one a row {tuple(rows)} is needed"
        )
    share = as_number(lam)
    if not isinstance(share, float):
        raise TypeError(f"lam: got {_said(lam)}; a float or a tensor is needed")
    if not 0 <= share <= 1:
        raise ValueError(f"lam: got {lam}; 0 to 1 is needed")
    return share


def check_reduction(reduction: str) -> None:
    """One of :data:`~kdfast.functional._reduction.Reduction`."""
    if not isinstance(reduction, str) or reduction not in REDUCTIONS:
        raise ValueError(f"reduction: got {reduction!r}; accepted: {', '.join(REDUCTIONS)}")


def check_factor(name: str, value: float | torch.Tensor) -> float:
    """A finite float that is not negative; a number of numpy's or a 0-d tensor in host memory is read."""
    if type(value) is float and 0.0 <= value <= _LARGEST:
        return value
    return check_between(name, value, 0.0, math.inf)


def check_between(name: str, value: float | torch.Tensor, least: float, most: float) -> float:
    """A finite number from ``least`` to ``most``; one of numpy's or a 0-d tensor in host memory is read."""
    if type(value) is float and least <= value <= most and -_LARGEST <= value <= _LARGEST:
        return value  # nearly always, and at once
    number = as_number(value)
    if isinstance(number, torch.Tensor):
        raise ValueError(
            f"{name}: got a tensor of shape {tuple(number.shape)} on {number.device}, "
            f"requires_grad={number.requires_grad}; a number, or a 0-d tensor without gradient in host memory, is "
            "needed (to read another would wait for the device)"
        )
    if not isinstance(number, float):
        raise TypeError(f"{name}: got {_said(value)}; a number is needed")
    if not least <= number <= most or number == math.inf:
        accepted = f"of at least {least:g}" if most == math.inf else f"from {least:g} to {most:g}"
        raise ValueError(f"{name}: got {number}; a finite value {accepted} is needed")
    _check_float32(name, number)
    return number


def _check_float32(name: str, number: float) -> None:
    """A number that float32, the kernels' arithmetic, has: others become infinite there."""
    if not -_LARGEST <= number <= _LARGEST:
        raise ValueError(f"{name}: got {number}; a number that float32 has, up to {_LARGEST:g}, is needed")


def check_pair(
    student: torch.Tensor, teacher: torch.Tensor, dim: int, reduction: Reduction
) -> tuple[int, torch.Size]:
    """The class dimension as a non-negative index, and the logits' shape without it."""
    check_reduction(reduction)
    check_logits(student, teacher)
    axis = check_dim(dim, student)
    return axis, student.shape[:axis] + student.shape[axis + 1 :]

"""What the closed forms of the losses share: rows a few at a time, and again, with care, those that need it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from kdfast.reference.common import compute_dtype
from kdfast.reference.native import address, extension

#: Below this a row's divergence has lost digits to cancellation in float32 (F.kl_div's has, too).
CAREFUL_BELOW = 1e-3
#: Elements of one tensor at a time: intermediates stay in a core's cache, and their memory is found again at once.
CHUNK = 1 << 16

#: Each row's loss, and T times its gradients to student and teacher.
Closed = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]
#: ``(s, t, rows, grad_s, grad_t) -> loss``: of rows ``[n, V]``, their place among all, gradients written where wanted.
Compute = Callable[
    [torch.Tensor, torch.Tensor, slice | torch.Tensor, torch.Tensor | None, torch.Tensor | None], torch.Tensor
]
#: What :func:`one_loop` is given first: the name of a function of ``kdfast._C``, T, and numbers of its own.
Loop = tuple[str, torch.Tensor | float, tuple[float, ...]]


def closed_form(
    student: torch.Tensor,
    teacher: torch.Tensor,
    dim: int,
    need: tuple[bool, bool],
    compute: Compute,
    careful: Compute,
    *,
    below: float = CAREFUL_BELOW,
    chunk: int = 1,
    loop: Loop | None = None,
) -> Closed:
    """Each row's loss by ``compute``; where it is under ``below``, or NaN, by ``careful`` in float64 instead.

    ``teacher`` may have a class dimension of its own. ``chunk`` times :data:`CHUNK` elements are taken at a time: more
    where much of the work is a fixed cost. Where ``loop`` can take float32 rows, it runs instead of ``compute``.

    Returns:
        The loss, of the logits' shape without ``dim``; gradients of the logits' shape, None where not needed; all
        in float32 (float64 for float64 inputs).
    """
    dtype = compute_dtype(student, teacher)
    s, t = student.detach(), teacher.detach()
    flat = s.dim() == 2 and dim == 1  # nothing to move: a microsecond each, which a small loss is made of
    if not flat:
        shape = s.movedim(dim, -1).shape
        s, t = (x.movedim(dim, -1).reshape(math.prod(shape[:-1]), x.shape[dim]) for x in (s, t))
    grads = [torch.empty(s.shape, dtype=dtype, device=s.device) if wanted else None for wanted in need]
    count, step = len(s), max(1, chunk * CHUNK // max(1, s.shape[1]))
    left: list[bool] = []

    def some(rows: slice) -> torch.Tensor:
        here, there = s[rows].to(dtype), t[rows].to(dtype)
        into = [None if grad is None else grad[rows] for grad in grads]
        found = None if loop is None else one_loop(loop, here, there, *into)
        if found is None:
            loss = compute(here, there, rows, *into)
            found = loss, bool(len(loss)) and not float(loss.min()) >= below  # NaN is not
        left.append(found[1])
        return found[0]

    if count <= step:
        loss = some(slice(None))
    else:
        loss = s.new_empty(count, dtype=dtype)
        for start in range(0, count, step):
            rows = slice(start, start + step)
            loss[rows] = some(rows)
    if any(left):
        again_with_care(loss, s, t, grads, careful, below)
    if flat:
        return loss, grads[0], grads[1]
    grad_s, grad_t = (None if grad is None else grad.view(shape).movedim(-1, dim) for grad in grads)
    return loss.view(shape[:-1]), grad_s, grad_t


def looped_form(
    student: torch.Tensor,
    teacher: torch.Tensor,
    dim: int,
    need: tuple[bool, bool],
    loop: Loop,
    plain: Compute,
    careful: Compute,
) -> Closed:
    """:func:`closed_form`, in one loop of the extension where there is one: ``plain`` is what runs without it."""
    if student.dim() != 2 or dim != 1 or student.dtype != torch.float32 or teacher.dtype != torch.float32:
        return closed_form(student, teacher, dim, need, plain, careful, loop=loop)
    # Nothing to move, to widen, or to cut: a row is kept in the cache by the loop itself.
    grads = [torch.empty(student.shape) if wanted else None for wanted in need]
    found = one_loop(loop, student, teacher, *grads)
    if found is None:
        return closed_form(student, teacher, dim, need, plain, careful)
    loss, left = found
    if left:
        again_with_care(loss, student.detach(), teacher.detach(), grads, careful, CAREFUL_BELOW)
    return loss, grads[0], grads[1]


def one_loop(
    loop: Loop,
    s: torch.Tensor,
    t: torch.Tensor,
    grad_s: torch.Tensor | None,
    grad_t: torch.Tensor | None,
) -> tuple[torch.Tensor, bool] | None:
    """The losses of float32 rows ``[n, V]``, and whether some are left to be computed otherwise, for NaN or -inf.

    None where no loop can take them. Rows under :data:`CAREFUL_BELOW` are computed with care there.
    """
    library = extension()
    if library is None or s.device.type != "cpu" or s.dtype != torch.float32 or not s.shape[1]:
        return None
    s, t = (x if x.stride(1) == 1 else x.contiguous() for x in (s, t))
    name, temperature, numbers = loop
    loss = torch.empty(len(s))
    left: bool = getattr(library, name)(
        *s.shape,
        s.data_ptr(),
        s.stride(0),
        t.data_ptr(),
        t.stride(0),
        1.0 / float(temperature),
        loss.data_ptr(),
        address(grad_s),
        address(grad_t),
        torch.get_num_threads(),
        CAREFUL_BELOW,
        *numbers,
    )
    return loss, left


def again_with_care(
    loss: torch.Tensor,
    s: torch.Tensor,
    t: torch.Tensor,
    grads: Sequence[torch.Tensor | None],
    careful: Compute,
    below: float,
) -> None:
    """Compute, in place, in float64, the rows of ``[n, V]`` logits whose loss is under ``below``, or NaN."""
    chosen = (~(loss >= below)).nonzero().squeeze(-1)  # NaN, too: 0·inf, where a class is absent
    wide_s, wide_t = s[chosen].double(), t[chosen].double()
    again_s, again_t = (None if grad is None else torch.empty_like(wide_s) for grad in grads)
    loss[chosen] = careful(wide_s, wide_t, chosen, again_s, again_t).to(loss.dtype)
    for grad, again in zip(grads, (again_s, again_t), strict=True):
        if grad is not None and again is not None:
            grad[chosen] = again.to(loss.dtype)


def log_softmax_at(
    logits: torch.Tensor, temperature: torch.Tensor | float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities at T, and the memory that the scaled logits were in, to be used again."""
    scaled = logits * (1.0 / temperature)
    return torch.log_softmax(scaled, -1), scaled

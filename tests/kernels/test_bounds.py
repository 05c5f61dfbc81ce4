"""What kernels read beyond their tensors, or leave unwritten: in the interpreter, with every access looked at."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from triton.runtime import interpreter

from kdfast.kernels import feature
from kdfast.kernels import kl as kernels
from tests.conftest import INTERPRETING

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not INTERPRETING, reason="looks at the interpreter's accesses"),
]


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(first byte, byte after the last) of every load; those of neighbouring addresses as one."""
    seen: list[tuple[int, int]] = []
    plain = interpreter.InterpreterBuilder.create_masked_load

    def watched(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        addresses = np.broadcast_to(ptrs.data, mask.data.shape)[mask.data]
        if len(addresses):
            size = ptrs.get_element_ty().primitive_bitwidth // 8
            seen.append((int(addresses.min()), int(addresses.max()) + size))
        return plain(self, ptrs, mask, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", watched)
    return seen


@pytest.mark.parametrize("apart", [1.0, 1e-3])
@pytest.mark.parametrize(
    ("rows", "classes", "dtype"),
    [(5, 1271, torch.float32), (5, 1001, torch.bfloat16), (3, 515, torch.float16), (4, 1279, torch.bfloat16)],
)
def test_rows_that_begin_anywhere_end_where_their_tensor_does(
    rows: int, classes: int, dtype: torch.dtype, apart: float, loads: list[tuple[int, int]]
) -> None:
    """The last row's last classes fill no group of 16 bytes; what is behind them is somebody else's memory."""
    generator = torch.Generator().manual_seed(1)
    held = torch.full((2, 2**14), 1e4, dtype=dtype)  # what may not be read would be noticed in the loss, too
    student, teacher = (half[: rows * classes].view(rows, classes) for half in held)
    teacher.copy_(torch.randn(rows, classes, generator=generator))
    student.copy_(teacher + apart * torch.randn(rows, classes, generator=generator))
    grads = torch.empty(2, rows, classes, dtype=dtype)
    written = grads[0], None if grads[1].data_ptr() % 16 else grads[1]
    scale, rows_alone = kernels.Scale(2.0, 1.0, None, None), kernels.Wanted(True, False)
    found = kernels.PLAIN((student, teacher), written, 1, scale, rows_alone)
    half = held[0].numel() * held.itemsize
    stops = [
        stop - base
        for base in (held.data_ptr(), held[1].data_ptr())
        for start, stop in loads
        if base <= start < base + half
    ]
    assert max(stops) == rows * classes * student.itemsize
    p, q = (torch.softmax(x.double() / 2, 1) for x in (teacher, student))
    want = 4 * (p * (p.log() - q.log())).sum(1)
    torch.testing.assert_close(found.double(), want, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(
        grads[0].double(), 2 * (q - p), rtol=2e-2, atol=6e-8 + 1e-4 * float((q - p).abs().max())
    )


@pytest.mark.parametrize("order", [[0, 1, 1], [2, 2, 2], [0, 1, 3], [0, -1, 2]])
def test_what_is_no_permutation_gives_nan_everywhere(order: list[int]) -> None:
    """On a GPU an order is not looked at before; a branch that it leaves out must not keep what memory held."""
    branches, target = torch.randn(3, 40), torch.randn(40)
    loss, grad = torch.zeros(()), torch.zeros(3, 40)
    numbers = torch.ones(3)
    feature.reparam_middle(branches, target, numbers, numbers, torch.tensor(order), loss=loss, grad=grad)
    assert bool(loss.isnan())
    assert bool(grad.isnan().all())


@pytest.mark.parametrize("branches", [1, 3, 64])
def test_a_permutation_gives_numbers(branches: int) -> None:
    loss, grad = torch.zeros(()), torch.zeros(branches, 8)
    numbers, order = torch.full((branches,), 0.5), torch.randperm(branches)
    feature.reparam_middle(
        torch.randn(branches, 8), torch.randn(8), numbers, numbers, order, loss=loss, grad=grad
    )
    assert bool(loss.isfinite())
    assert bool((grad != 0).any(1).all())

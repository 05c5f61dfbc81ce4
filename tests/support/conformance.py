"""The one suite that every op runs: parity with fp64, gradients, layouts, odd and empty sizes, opcheck.

A family's test file lists :class:`OpCase` objects in a subclass of :class:`ConformanceSuite`; each test then
runs on the reference, in Triton's interpreter (a process of its own), and on CUDA where there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from tests.conftest import INTERPRETING, Target

#: (rtol, atol) of a result against the fp64 oracle evaluated on the same rounded inputs.
TOLERANCES = {
    torch.float32: (2e-5, 2e-6),
    torch.bfloat16: (1.6e-2, 1e-3),
    torch.float16: (2e-3, 1e-4),
    torch.float64: (1e-11, 1e-12),
}

Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class OpCase:
    """One way to call an op.

    Attributes:
        name: Shown in the test id.
        make: ``(generator, shape) -> {argument: fp32 CPU tensor}``.
        run: The public function on those tensors (by keyword); a tensor or a tuple of tensors.
        oracle: The same in float64, written independently of the implementation.
        shapes: Full-size shapes; ``small_shapes`` replace them in the interpreter, which is slow.
        differentiable: Arguments whose gradients are compared.
        cast: Arguments that take the dtype under test (others keep theirs).
        dtypes: Dtypes that the op accepts.
        tolerances: Overrides of :data:`TOLERANCES`.
        launches: Launches that one call makes on the Triton backend (None: any number but zero).
        opcheck: ``(inputs) -> (registered op, args)``, or None when the op is not registered.
        empty_shape: A shape without elements, or None when the op refuses that.
    """

    name: str
    make: Callable[[torch.Generator, tuple[int, ...]], Inputs]
    run: Callable[..., Any]
    oracle: Callable[..., Any]
    shapes: Sequence[tuple[int, ...]]
    small_shapes: Sequence[tuple[int, ...]]
    differentiable: Sequence[str] = ()
    cast: Sequence[str] = ()
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    tolerances: dict[torch.dtype, tuple[float, float]] | None = None
    launches: int | None = None
    opcheck: Callable[[Inputs], tuple[Any, tuple[Any, ...]]] | None = None
    empty_shape: tuple[int, ...] | None = None

    def __str__(self) -> str:
        return self.name

    def tolerance(self, dtype: torch.dtype) -> tuple[float, float]:
        return {**TOLERANCES, **(self.tolerances or {})}[dtype]

    def inputs(self, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Inputs:
        made = self.make(torch.Generator().manual_seed(sum(shape) + 1), shape)
        return {
            key: value.to(device=device, dtype=dtype if key in self.cast else value.dtype)
            for key, value in made.items()
        }


def as_tuple(result: Any) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def assert_verbose_allclose(
    actual: torch.Tensor, expected: torch.Tensor, *, rtol: float, atol: float, what: str = "result"
) -> None:
    """``torch.testing.assert_close`` that says where the largest mismatches are and by how much."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)} != {tuple(expected.shape)}"
    close = torch.isclose(actual, expected, rtol=rtol, atol=atol, equal_nan=True)
    if close.all():
        return
    error = (actual - expected).abs()
    worst = torch.where(close, torch.full_like(error, -1.0), error.nan_to_num(float("inf"))).flatten()
    lines = []
    for flat in worst.argsort(descending=True)[:5].tolist():
        where = tuple(int(index) for index in torch.unravel_index(torch.tensor(flat), actual.shape))
        lines.append(f"  {where}: got {actual[where]:.9g}, expected {expected[where]:.9g}")
    count = int((~close).sum())
    raise AssertionError(
        f"{what}: {count} of {close.numel()} differ beyond rtol={rtol}, atol={atol}\n" + "\n".join(lines)
    )


def reduced(
    rows: torch.Tensor,
    reduction: str,
    shape: torch.Size,
    row_weight: torch.Tensor | None,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """What a loss of logits of ``shape`` makes of one value a row: weighted, masked, over its divisor."""
    if row_weight is not None:
        rows = rows * row_weight
    if mask is not None:
        rows = torch.where(mask, rows, torch.zeros_like(rows))
    if reduction == "none":
        return rows
    count = rows.numel() if mask is None else max(1, int(mask.sum()))
    return rows.sum() / {"sum": 1, "mean": shape.numel(), "batchmean": shape[0], "rowmean": count}[reduction]


def relayout(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values with other strides."""
    if tensor.dim() < 2:
        return tensor
    if layout == "transposed":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced":  # neither dense nor aligned to 16 bytes
        padded = tensor.new_zeros(*tensor.shape[:-1], tensor.shape[-1] + 3)
        padded[..., 1:-2] = tensor
        return padded[..., 1:-2]
    if layout == "strided":
        spread = tensor.new_zeros(*tensor.shape[:-1], tensor.shape[-1] * 2)
        spread[..., ::2] = tensor
        return spread[..., ::2]
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor
    raise ValueError(layout)


class ConformanceSuite:
    """Subclass as ``class TestConformance(ConformanceSuite)`` with ``cases`` set."""

    cases: ClassVar[Sequence[OpCase]] = ()

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        combos: list[Any] = []
        names = [name for name in ("case", "shape", "dtype") if name in metafunc.fixturenames]
        if not names:
            return
        for case in self.cases:
            shapes = case.small_shapes if INTERPRETING else case.shapes
            if "shape" not in names:
                shapes = shapes[:1]
            dtypes = [d for d in case.dtypes if not (INTERPRETING and d == torch.float64)]
            if "dtype" not in names:
                dtypes = dtypes[:1]
            for shape in shapes:
                for dtype in dtypes:
                    values = {"case": case, "shape": shape, "dtype": dtype}
                    label = "-".join([case.name, "x".join(map(str, shape)), str(dtype).split(".")[-1]])
                    combos.append(pytest.param(*[values[name] for name in names], id=label))
        metafunc.parametrize(names, combos)

    @staticmethod
    def _grad(case: OpCase, inputs: Inputs, fn: Callable[..., Any]) -> tuple[Any, dict[str, torch.Tensor]]:
        leaves = {key: value.detach() for key, value in inputs.items()}
        for key in case.differentiable:
            leaves[key] = leaves[key].clone(memory_format=torch.preserve_format).requires_grad_()
        outputs = as_tuple(fn(**leaves))
        # An upstream gradient that is neither 1 nor constant.
        total = sum(
            (
                out * torch.linspace(0.5, 1.5, out.numel(), device=out.device, dtype=out.dtype).view_as(out)
            ).sum()
            for out in outputs
            if out.requires_grad
        )
        grads = torch.autograd.grad(total, [leaves[key] for key in case.differentiable])  # type: ignore[arg-type]
        return outputs, dict(zip(case.differentiable, grads, strict=True))

    @staticmethod
    def _to64(inputs: Inputs) -> Inputs:
        return {
            key: (value.detach().double() if value.is_floating_point() else value).cpu()
            for key, value in inputs.items()
        }

    def test_matches_the_fp64_oracle(
        self, target: Target, case: OpCase, shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        inputs = case.inputs(shape, dtype, target.device)
        before = {key: value.clone() for key, value in inputs.items()}
        rtol, atol = case.tolerance(dtype)
        results = as_tuple(case.run(**inputs))
        expected = as_tuple(case.oracle(**self._to64(inputs)))
        assert len(results) == len(expected)
        for index, (got, want) in enumerate(zip(results, expected, strict=True)):
            assert_verbose_allclose(got, want, rtol=rtol, atol=atol, what=f"{case.name} output {index}")
        for key, value in before.items():
            assert torch.equal(value, inputs[key]), f"{key} was changed in place"

    def test_gradients_match_the_fp64_oracle(
        self, target: Target, case: OpCase, shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        if not case.differentiable:
            pytest.skip("not differentiable")
        inputs = case.inputs(shape, dtype, target.device)
        rtol, atol = case.tolerance(dtype)
        _, grads = self._grad(case, inputs, case.run)
        _, expected = self._grad(case, self._to64(inputs), case.oracle)
        for key, grad in grads.items():
            assert grad.dtype == inputs[key].dtype
            scale = max(float(expected[key].abs().max()), 1e-30) if expected[key].numel() else 1.0
            assert_verbose_allclose(
                grad / scale, expected[key] / scale, rtol=rtol, atol=atol, what=f"grad of {key}"
            )

    @pytest.mark.parametrize("layout", ["transposed", "sliced", "strided", "channels_last"])
    def test_layouts_do_not_change_the_result(self, target: Target, case: OpCase, layout: str) -> None:
        shape = (case.small_shapes if INTERPRETING else case.shapes)[0]
        inputs = case.inputs(shape, torch.float32, target.device)
        moved = {key: relayout(value, layout) if key in case.cast else value for key, value in inputs.items()}
        if not case.differentiable:
            results, others = as_tuple(case.run(**inputs)), as_tuple(case.run(**moved))
            grads, other_grads = {}, {}
        else:
            results, grads = self._grad(case, inputs, case.run)
            others, other_grads = self._grad(case, moved, case.run)
        rtol, atol = case.tolerance(torch.float32)
        for got, want in zip(others, results, strict=True):
            assert_verbose_allclose(got, want, rtol=rtol, atol=atol, what=f"{case.name}, {layout}")
        for key in grads:
            assert_verbose_allclose(
                other_grads[key], grads[key], rtol=rtol, atol=atol, what=f"grad of {key}, {layout}"
            )

    def test_empty_input(self, target: Target, case: OpCase) -> None:
        if case.empty_shape is None:
            pytest.skip("refuses empty input")
        inputs = case.inputs(case.empty_shape, torch.float32, target.device)
        for got, want in zip(
            as_tuple(case.run(**inputs)), as_tuple(case.oracle(**self._to64(inputs))), strict=True
        ):
            assert got.shape == want.shape
            assert torch.equal(got.isnan().cpu(), want.isnan())

    def test_the_kernel_is_what_ran(self, target: Target, case: OpCase) -> None:
        """On the Triton backend launches are counted; on the reference there is none."""
        shape = (case.small_shapes if INTERPRETING else case.shapes)[0]
        inputs = case.inputs(shape, torch.float32, target.device)
        if target.backend == "reference":
            import sys

            launch = sys.modules.get("kdfast.kernels.launch")
            before = sum(launch.launch_counts.values()) if launch else 0
            case.run(**inputs)
            launch = sys.modules.get("kdfast.kernels.launch")
            assert (sum(launch.launch_counts.values()) if launch else 0) == before
            return
        from kdfast.kernels.launch import count_launches

        with count_launches() as counts:
            case.run(**inputs)
        assert sum(counts.values()) > 0, "no kernel was launched"
        if case.launches is not None:
            assert sum(counts.values()) == case.launches, dict(counts)

    def test_opcheck(self, target: Target, case: OpCase) -> None:
        if case.opcheck is None:
            pytest.skip("not a registered op")
        shape = (case.small_shapes if INTERPRETING else case.shapes)[0]
        op, args = case.opcheck(case.inputs(shape, torch.float32, target.device))
        torch.library.opcheck(op, args)

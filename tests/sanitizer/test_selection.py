"""Which of the kernels' tests the sanitizer runs: one for each way that a launch reads and writes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.conftest import INTERPRETING
from tests.sanitizer.plugin import dispensable
from tests.support.conformance import OpCase

pytestmark = pytest.mark.skipif(INTERPRETING, reason="nothing here launches a kernel")
LAYOUTS = "test_layouts_do_not_change_the_result"


def item(name: str, path: str = "tests/kernels/kl/test_kl.py", **parameters: Any) -> Any:
    return SimpleNamespace(
        name=name, nodeid=f"{path}::{name}", path=Path(path), callspec=SimpleNamespace(params=parameters)
    )


def case(*shape: int) -> OpCase:
    return OpCase(
        name="sum",
        make=lambda generator, shape: {"x": torch.ones(shape), "row": torch.ones(shape[0])},
        run=torch.sum,
        oracle=torch.sum,
        shapes=[shape],
        small_shapes=[shape],
        cast=("x",),
    )


@pytest.mark.parametrize(
    ("shape", "layout", "runs"),
    [
        ((4, 5), "sliced", True),
        ((4, 5), "channels_last", False),  # of two dimensions: the plain one again
        ((2, 3, 4, 5), "channels_last", True),
        ((7,), "transposed", False),
    ],
)
def test_a_layout_runs_where_it_moves_something(shape: tuple[int, ...], layout: str, runs: bool) -> None:
    name = f"{LAYOUTS}[sum-4x5-float32-cuda-{layout}]"
    assert dispensable(item(name, case=case(*shape), layout=layout)) is not runs


@pytest.mark.parametrize(
    ("name", "runs"),
    [
        ("test_gradients_match_the_fp64_oracle[rows-5x19-float32-cuda]", True),
        ("test_gradients_match_the_fp64_oracle[rows-5x19-bfloat16-cuda]", True),
        ("test_gradients_match_the_fp64_oracle[rows-5x19-float16-cuda]", False),
        ("test_gradients_match_the_fp64_oracle[rows-5x19-float64-cuda]", False),
        ("test_matches_the_fp64_oracle[sample-66000-float32-cuda]", False),
        ("test_three_levels_are_bitwise_equal_to_the_core[cuda]", True),
    ],
)
def test_one_dtype_of_each_width_and_sizes_of_several_programs_run(name: str, runs: bool) -> None:
    assert dispensable(item(name)) is not runs

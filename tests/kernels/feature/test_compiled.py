"""The feature kernels compiled ahead of time for real GPUs, without one: no spills, wide loads and stores."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import INTERPRETING

pytest.importorskip("triton")

pytestmark = pytest.mark.skipif(INTERPRETING, reason="the interpreter compiles nothing")

#: B = 16 of Kdiffusion's 256×8×8; a stacked convolution's output, so that branches are not dense.
FEATURE = (16, 256, 8, 8)


def stacked(m: int, dtype: torch.dtype) -> torch.Tensor:
    from bench.static_audit import meta

    batch, channels, *size = FEATURE
    return meta(batch, m * channels, *size, dtype=dtype).unflatten(1, (m, channels)).transpose(0, 1)


@pytest.mark.parametrize(
    ("m", "dtype", "capability", "width"),
    [
        (10, torch.bfloat16, 90, 16),
        (10, torch.float32, 80, 16),
        (16, torch.bfloat16, 100, 8),
        (64, torch.bfloat16, 90, 2),
        pytest.param(10, torch.bfloat16, 80, 16, marks=pytest.mark.slow),
        pytest.param(10, torch.bfloat16, 100, 16, marks=pytest.mark.slow),
        pytest.param(32, torch.bfloat16, 90, 4, marks=pytest.mark.slow),
        pytest.param(64, torch.float32, 90, 4, marks=pytest.mark.slow),
    ],
)
def test_the_recursion_stays_in_registers(m: int, dtype: torch.dtype, capability: int, width: int) -> None:
    from bench.static_audit import audit, meta
    from kdfast.kernels import feature as kernels

    s, x0 = stacked(m, dtype), meta(*FEATURE, dtype=dtype)
    coefficient, permutation = meta(m), meta(m, dtype=torch.int64)

    def call() -> None:
        outputs = {"loss": torch.empty((), device="meta"), "mean": x0, "grad": s}
        kernels.reparam_middle(s, x0, coefficient, coefficient, permutation, **outputs)

    (report,) = audit(call, capability)
    assert report.spills == 0, report
    assert report.widest_load >= width, report
    assert report.widest_store >= width, report


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_the_mix_keeps_wide_accesses_and_spills_nothing(capability: int) -> None:
    from bench.static_audit import audit, meta
    from kdfast.kernels import feature as kernels

    x, gamma = meta(256, 1024, 7, 7, dtype=torch.bfloat16), meta(256)

    def call() -> None:
        kernels.noise_mix(x, gamma, x, 5)
        kernels.noise_mix_backward(x, x, gamma, 5, grad_x=x, want_gamma=True)

    for report in audit(call, capability):
        assert report.spills == 0, report
        assert report.widest_load == report.widest_store == 16, report

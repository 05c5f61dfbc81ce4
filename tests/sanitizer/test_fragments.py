"""What the kernels' own PTX means to the checker: against the PTX ISA's table of special values, and against log2."""

from __future__ import annotations

import re

import numpy as np
import pytest

from tests.conftest import INTERPRETING
from tests.sanitizer.fragments import FRAGMENTS, NAN, lg2_approx_ftz
from tests.support.house import ROOT

pytestmark = pytest.mark.skipif(INTERPRETING, reason="nothing here launches a kernel")


def test_the_logarithm_is_that_of_the_numbers() -> None:
    x = np.exp2(np.linspace(-126, 127, 2001)).astype(np.float32)
    (found,) = lg2_approx_ftz(x)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, np.log2(x.astype(np.float64)), rtol=2**-23, atol=2**-23)


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (np.inf, np.inf),
        (0.0, -np.inf),
        (-0.0, -np.inf),
        (1e-40, -np.inf),  # a subnormal is read as zero
        (-1e-40, -np.inf),
        (1.0, 0.0),
    ],
)
def test_special_values_of_the_logarithm(x: float, expected: float) -> None:
    assert lg2_approx_ftz(np.float32(x))[0] == np.float32(expected)


@pytest.mark.parametrize("x", [-1.0, -np.inf, np.nan])
def test_what_has_no_logarithm_is_one_nan(x: float) -> None:
    assert lg2_approx_ftz(np.float32(x))[0].view(np.uint32) == NAN


def test_every_assembly_that_a_kernel_writes_is_known() -> None:
    """One that is not would be left out of the check, with the kernel round it."""
    found = set()
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        found.update(re.findall(r'inline_asm_elementwise\(\s*"([^"]+)"', path.read_text()))
    assert found == set(FRAGMENTS)

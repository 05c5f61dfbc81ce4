"""The keyed normals that a CPU draws: those of the kernels, bit for bit, and of exact mathematics, nearly."""

from __future__ import annotations

import pytest
import torch

from kdfast.functional import noise_mix
from kdfast.reference.philox import noise, normal
from tests.conftest import Target

_C = pytest.importorskip("kdfast._C")
CPU = torch.device("cpu")


@pytest.mark.parametrize("count", [0, 1, 3, 4, 255, 256, 257, 1021])
@pytest.mark.parametrize(("seed", "step"), [(0, 0), (7, 3), (-1, 2**32 - 1), (2**63 - 1, 1)])
def test_they_are_those_of_exact_mathematics(count: int, seed: int, step: int) -> None:
    got, want = noise(seed, step, (count,), CPU, torch.float32), normal(seed, step, (count,))
    assert got.dtype == torch.float32
    error = (got.double() - want).abs() / want.abs().clamp(min=1)
    assert not error.numel() or float(error.max()) < 3e-7


def test_a_part_is_the_beginning_of_the_whole() -> None:
    whole = torch.from_numpy(_C.normals(5, 1, 3000))
    for count in (1, 254, 256, 259, 2999):
        assert torch.equal(torch.from_numpy(_C.normals(5, 1, count)), whole[:count])


def test_they_look_normal() -> None:
    drawn = torch.from_numpy(_C.normals(11, 0, 1 << 20)).double()
    assert abs(float(drawn.mean())) < 4e-3
    assert abs(float(drawn.var()) - 1) < 6e-3
    assert abs(float((drawn**4).mean()) - 3) < 5e-2
    assert float(drawn.abs().max()) < 7


def test_the_kernels_draw_the_same_bits(target: Target) -> None:
    """ε alone: γ = 0. In the interpreter nothing is contracted; a GPU may round the last bit otherwise."""
    shape = (2, 3, 17, 5)
    x, gamma = torch.zeros(shape, device=target.device), torch.zeros(2, device=target.device)
    drawn = torch.from_numpy(_C.normals(3, 0, x.numel())).view(shape)
    got = noise_mix(x, gamma, seed=3).cpu()
    if target.device == "cpu":
        assert torch.equal(got, drawn)
    else:
        torch.testing.assert_close(got, drawn, rtol=3e-7, atol=3e-7)


def test_a_negative_count_is_refused() -> None:
    with pytest.raises(ValueError, match="count: got -1, accepted: 0 or more"):
        _C.normals(0, 0, -1)

"""The denoising step: its noise, a step that lives on the device, what it refuses, and properties."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kdfast
from kdfast.functional import denoise_step
from kdfast.ops import denoise as ops
from kdfast.reference.philox import normal, philox
from tests.conftest import INTERPRETING, Target
from tests.kernels.denoise.test_denoise import STEPS, randn, table
from tests.support.conformance import assert_verbose_allclose

# --- noise ----------------------------------------------------------------------------------------


def unit_noise(shape: tuple[int, ...], seed: Any, step: int, device: str, layout: Any = None) -> torch.Tensor:
    rows = torch.zeros(STEPS, 10, device=device)
    rows[:, 8] = 1.0
    x = torch.zeros(shape, device=device)
    x = x if layout is None else layout(x)
    return denoise_step(x, x, rows, step, seed=seed)


def test_philox_known_answers() -> None:
    """Vectors of the Random123 distribution (Salmon et al. 2011)."""
    for key, counter, want in (
        (0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (2**64 - 1, (0xFFFFFFFF,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            0x299F31D0A4093822,
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ):
        words = philox(key, tuple(torch.tensor([word]) for word in counter))
        assert tuple(int(word) for word in words) == want


def test_noise_is_keyed_by_seed_step_and_element(target: Target) -> None:
    shape = (2, 4, 6, 7)
    base = unit_noise(shape, 7, 1, target.device)
    assert_verbose_allclose(base, normal(7, 1, shape), rtol=1e-6, atol=1e-6)
    assert torch.equal(base, unit_noise(shape, 7, 1, target.device))
    assert torch.equal(base, unit_noise(shape, torch.tensor(7, device=target.device), 1, target.device))
    # Neither the layout nor a smaller batch changes an element's noise.
    last = unit_noise(shape, 7, 1, target.device, lambda x: x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(last.contiguous(), base, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(unit_noise((1, 4, 6, 7), 7, 1, target.device), base[:1], rtol=1e-6, atol=1e-6)
    for other in (unit_noise(shape, 8, 1, target.device), unit_noise(shape, 7, 2, target.device)):
        assert (other == base).float().mean() < 0.01


@pytest.mark.parametrize("shape", [(3, 4, 6, 6), (3, 5, 7), (2, 1, 3, 700), (4, 1)])
def test_a_seed_for_each_row_keys_the_row_and_not_its_place(target: Target, shape: tuple[int, ...]) -> None:
    seeds = torch.arange(1, shape[0] + 1, device=target.device) * (2**40 + 7)
    base = unit_noise(shape, seeds, 2, target.device)
    wanted = torch.cat([normal(int(seed), 2, (1, *shape[1:])) for seed in seeds])
    assert_verbose_allclose(base, wanted, rtol=1e-6, atol=1e-6)
    turned = unit_noise(shape, seeds.flip(0), 2, target.device)
    torch.testing.assert_close(turned, base.flip(0), rtol=1e-6, atol=1e-6)
    if len(shape) == 4:
        last = unit_noise(
            shape, seeds, 2, target.device, lambda x: x.contiguous(memory_format=torch.channels_last)
        )
        torch.testing.assert_close(last.contiguous(), base, rtol=1e-6, atol=1e-6)


def test_row_seeds_of_a_learned_variance_and_of_guidance(target: Target) -> None:
    x, o = randn(2, 4, 6, device=target.device), randn(4, 8, 6, seed=1, device=target.device)
    rows = table(target.device)
    seeds = torch.tensor([5, 2**61], device=target.device)
    z = torch.cat([normal(int(seed), 1, (1, 4, 6)) for seed in seeds]).to(x)
    for learned in (False, True):
        more = {"guidance": ops.Guidance(2.0), "learned_variance": learned}
        got = ops.denoise_step(x, o, rows, 1, seed=seeds, **more).y
        torch.testing.assert_close(
            got, ops.denoise_step(x, o, rows, 1, noise=z, **more).y, rtol=1e-5, atol=1e-5
        )


def test_noise_is_standard_normal() -> None:
    z = normal(3, 0, (1 << 18,))
    size = z.numel()
    assert abs(z.mean()) < 4 / size**0.5
    assert abs(z.square().mean() - 1) < 4 * (2 / size) ** 0.5
    assert abs(z.pow(4).mean() - 3) < 4 * (96 / size) ** 0.5
    # Kolmogorov-Smirnov at 1e-4, and no correlation between neighbours (pairs share a radius).
    uniform = torch.special.ndtr(z.sort().values)
    ranks = torch.arange(1, size + 1) / size
    assert (uniform - ranks).abs().max() < 2.23 / size**0.5
    for lag in (1, 2, 3, 4):
        assert abs((z[lag:] * z[:-lag]).mean()) < 4 / size**0.5


# --- a step on the device -------------------------------------------------------------------------


def test_a_device_step_outside_the_table_gives_nan(target: Target) -> None:
    if target.backend == "reference":
        pytest.skip("the reference reads the step on the host")
    x = randn(1, 4, 5, device=target.device)
    for step in (-1, STEPS):
        assert (
            denoise_step(x, x, table(target.device), torch.tensor(step, device=target.device)).isnan().all()
        )


# --- refusals -------------------------------------------------------------------------------------

X = torch.zeros(2, 4, 3)
REFUSALS = {
    "integer sample": (TypeError, "floating-point", {"sample": X.long()}),
    "columns": (ValueError, "coefficients.*columns px, po", {"coefficients": torch.zeros(5, 9)}),
    "one-dimensional table": (ValueError, "coefficients", {"coefficients": torch.zeros(10)}),
    "table not contiguous": (ValueError, "contiguous", {"coefficients": torch.zeros(10, 5).T}),
    "table in float64": (ValueError, "float32", {"coefficients": torch.zeros(5, 10).double()}),
    "table in float32 for float64": (ValueError, "float64", {"sample": X.double()}),
    "table requires grad": (ValueError, "gradient", {"coefficients": torch.zeros(5, 10, requires_grad=True)}),
    "table elsewhere": (ValueError, "meta", {"coefficients": torch.zeros(5, 10, device="meta")}),
    "step too large": (ValueError, r"\[0, 5\).*got 5", {"step": 5}),
    "negative step": (ValueError, "got -1", {"step": -1}),
    "step of two elements": (ValueError, "one element", {"step": torch.tensor([1, 2])}),
    "step in floats": (ValueError, "integer", {"step": torch.tensor(1.0)}),
    "step elsewhere": (ValueError, "meta", {"step": torch.zeros((), dtype=torch.long, device="meta")}),
    "noise and seed": (ValueError, "one of them", {"noise": X, "seed": 1}),
    "negative seed": (ValueError, "at least 0", {"seed": -1}),
    "seeds": (ValueError, r"each row of the sample \(2\)", {"seed": torch.zeros(3, dtype=torch.long)}),
    "seed in floats": (ValueError, "int64 tensor", {"seed": torch.zeros(2)}),
    "seed elsewhere": (
        ValueError,
        "on cpu like the sample, got it on meta",
        {"seed": torch.zeros(2, dtype=torch.long, device="meta")},
    ),
    "four histories": (ValueError, "at most 3", {"history": [X] * 4}),
    "shapes": (ValueError, "broadcast", {"model_output": torch.zeros(3, 4, 3)}),
    "noise's shape": (ValueError, "broadcast", {"noise": torch.zeros(2, 4, 5)}),
    "output elsewhere": (ValueError, "one device", {"model_output": torch.zeros(2, 4, 3, device="meta")}),
    "order": (ValueError, "order.*cond_uncond", {"order": "first"}),
    "scale": (TypeError, "guidance_scale", {"guidance_scale": "2x"}),
    "guided rows": (
        ValueError,
        r"two rows.*\(2, 4, 3\)",
        {"guidance_scale": 2.0, "sample": torch.zeros(3, 4, 3)},
    ),
    "guided channels": (
        ValueError,
        "one channel for each",
        {"guidance_scale": 2.0, "model_output": torch.zeros(4, 3, 3)},
    ),
    "cfg_channels": (
        ValueError,
        r"cfg_channels: must be in \[0, 4\], got 5",
        {"guidance_scale": 2.0, "cfg_channels": 5, "model_output": torch.zeros(4, 4, 3)},
    ),
    "guided noise": (
        ValueError,
        "sample's shape",
        {"guidance_scale": 2.0, "model_output": torch.zeros(4, 4, 3), "noise": torch.zeros(1, 4, 3)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_refuses(name: str) -> None:
    error, message, changes = REFUSALS[name]
    arguments = {"sample": X, "model_output": X, "coefficients": torch.zeros(5, 10), "step": 1, **changes}
    with pytest.raises(error, match=message):
        denoise_step(**arguments)


def test_a_learned_variance_has_no_gradient() -> None:
    o = torch.zeros(2, 8, 3, requires_grad=True)
    with pytest.raises(ValueError, match="learned variance"):
        ops.denoise_step(X, o, torch.zeros(5, 10), 1, learned_variance=True, noise=X)


# --- properties -----------------------------------------------------------------------------------


@st.composite
def layouts(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]:
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=2, max_size=5)))
    orders = [tuple(draw(st.permutations(range(len(shape))))) for _ in range(2)]
    return shape, orders[0], orders[1], draw(st.integers(0, 2))


def in_order(tensor: torch.Tensor, order: tuple[int, ...], gap: int) -> torch.Tensor:
    """The same values, laid out in ``order`` with ``gap`` unused elements between the innermost."""
    permuted = tensor.permute(order)
    spread = permuted.new_zeros(*permuted.shape, gap + 1)
    spread[..., 0] = permuted
    inverse = sorted(range(len(order)), key=lambda at: order[at])
    return spread[..., 0].permute(inverse)


@settings(max_examples=8 if INTERPRETING else 60, deadline=None, suppress_health_check=list(HealthCheck))
@given(layouts())
def test_any_layout_gives_the_same_step(target: Target, drawn: Any) -> None:
    shape, first, second, gap = drawn
    x, o = randn(*shape, device=target.device), randn(*shape, seed=1, device=target.device)
    rows = table(target.device)
    want = denoise_step(x, o, rows, 1, clip=1.0, seed=3)
    moved = (in_order(x, first, 0).requires_grad_(), in_order(o, second, gap).requires_grad_())
    got = denoise_step(*moved, rows, 1, clip=1.0, seed=3)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6, check_stride=False)
    plain = (x.requires_grad_(), o.requires_grad_())
    wanted = torch.autograd.grad(denoise_step(*plain, rows, 1, clip=1.0, seed=3).square().sum(), plain)
    for grad, other in zip(torch.autograd.grad(got.square().sum(), moved), wanted, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-5, atol=1e-5, check_stride=False)


def test_the_step_is_linear_in_everything_without_a_clip() -> None:
    x, o, z, h = (randn(2, 4, 3, seed=at).double() for at in range(4))
    rows = table(dtype=torch.float64)
    whole = denoise_step(x, o, rows, 1, noise=z, history=[h])
    parts = sum(
        denoise_step(*(t if at == kept else torch.zeros_like(t) for at, t in enumerate((x, o))), rows, 1,
                     noise=z if kept == 2 else torch.zeros_like(z),
                     history=[h if kept == 3 else torch.zeros_like(h)])
        for kept in range(4)
    )  # fmt: skip
    torch.testing.assert_close(whole, parts, rtol=1e-12, atol=1e-12)


def test_importing_the_op_needs_no_triton() -> None:
    import subprocess
    import sys

    code = "import sys; sys.modules['triton'] = None; import kdfast.functional; print(kdfast.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == kdfast.__version__

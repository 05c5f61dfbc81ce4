"""The shader renderer: every operation against float64, the same bits on every backend, refusals."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import kdfast
from kdfast.data.surrogate.programs import OPERATIONS, table
from kdfast.functional import render_shaders
from kdfast.reference.procedural.shaders import MAX_ROUNDS, SLOTS, Op
from tests.conftest import Target
from tests.support.conformance import ConformanceSuite, OpCase, assert_verbose_allclose
from tests.support.shader_programs import PROGRAMS, draw

SIZE = (4, 5)
TABLE = table(PROGRAMS)


def make(generator: torch.Generator, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """``shape`` is [images, …]: the first so many of the programs, each once."""
    count = shape[0]
    return {
        "codes": TABLE.codes,
        "values": TABLE.values,
        "rates": TABLE.rates,
        "program": torch.arange(count) % len(PROGRAMS),
        "time": torch.arange(count) * 0.37 % 1,
    }


def run(codes: Tensor, values: Tensor, rates: Tensor, program: Tensor, time: Tensor) -> Tensor:
    return render_shaders(codes, values, rates, program, time, SIZE, antialias=1, dtype=torch.float32)


def oracle(codes: Tensor, values: Tensor, rates: Tensor, program: Tensor, time: Tensor) -> Tensor:
    assert torch.equal(values.float(), TABLE.values)  # the programs below are what the table holds
    images = [draw(PROGRAMS[p], t, *SIZE, 1) for p, t in zip(program.tolist(), time.tolist())]
    return torch.from_numpy(np.array(images)).view(-1, 3, *SIZE)


class TestConformance(ConformanceSuite):
    cases = (
        OpCase(
            name="render_shaders",
            make=make,
            run=run,
            oracle=oracle,
            # A few programs where a test renders many times; all of them, every operation, against float64.
            shapes=[(4,), (len(PROGRAMS),)],
            small_shapes=[(2,), (len(PROGRAMS),)],
            cast=["values", "rates"],
            dtypes=[torch.float32],
            # Folds and warps multiply rounding errors some hundred times.
            tolerances={torch.float32: (0.0, 2e-4)},
            launches=1,
            opcheck=lambda inputs: (
                torch.ops.kdfast.render_shaders.default,
                (*inputs.values(), *SIZE, 1, False),
            ),
            empty_shape=(0,),
        ),
    )


def rendered(count: int, size: tuple[int, int], device: str = "cpu", **options: Any) -> Tensor:
    inputs = {
        name: value.to(device) for name, value in make(torch.Generator().manual_seed(5), (count,)).items()
    }
    return render_shaders(*inputs.values(), size, **options)


def test_every_backend_draws_the_same_bits(target: Target) -> None:
    """Also where several programs of the grid share an image, the last of them beyond its end."""
    for count, size, antialias in ((2, (3, 7), 2), (1, (15, 10), 1)):
        options = {"antialias": antialias, "dtype": torch.float32}
        got = rendered(count, size, target.device, **options)
        with kdfast.use_backend("reference"):
            assert torch.equal(got.cpu(), rendered(count, size, **options))
    if target.backend == "triton":
        from kdfast.kernels.procedural import shader_bodies
        from kdfast.kernels.procedural import shaders as kernels

        assert (kernels.SLOTS.value, shader_bodies.MAX_ROUNDS.value) == (SLOTS, MAX_ROUNDS)


#: Operations that repeat themselves, and which of their numbers says how often.
REPEATED = [
    (Op.FOLD, 0),
    (Op.MIRROR, 0),
    (Op.SINE_WARP, 0),
    (Op.NOISE_WARP, 0),
    (Op.NOISE, 0),
    (Op.SHAPES, 1),
    (Op.JULIA, 0),
]


@pytest.mark.parametrize(("op", "slot"), REPEATED)
def test_a_table_cannot_ask_for_rounds_without_end(target: Target, op: Op, slot: int) -> None:
    """A table on a device is not read by the host, and time may carry any number away: rounds are bounded there."""
    rounds = torch.tensor([MAX_ROUNDS, 17.5, 1e5, 1e30, -1e30, 0.0])
    rates = torch.tensor([0.0, 0.0, 0.0, 3e38, -3e38, 0.0])  # overflows to ±∞ at time 1.5
    values = torch.full((6, 3, SLOTS), 0.7)
    values[:, 0, slot] = rounds
    values[:, 2, 12:] = torch.tensor([1.0, 0.0, 0.0, 1.0])  # painted over whole
    moving = torch.zeros_like(values)
    moving[:, 0, slot] = rates
    codes = torch.tensor([[int(op), int(Op.GRADIENT), int(Op.PAINT)]], dtype=torch.int32).repeat(6, 1)
    inputs = codes, values, moving, torch.arange(6), torch.full((6,), 1.5)

    images = render_shaders(*(one.to(target.device) for one in inputs), SIZE, dtype=torch.float32).cpu()
    most, *many, none = images[0], images[1], images[2], images[3], images[5]
    assert all(torch.equal(image, most) for image in many)
    assert not torch.equal(most, none)
    assert torch.equal(images[4], none)


def test_antialiasing_averages_the_samples(target: Target) -> None:
    fine = rendered(2, (4, 6), target.device, antialias=1, dtype=torch.float32)
    coarse = rendered(2, (2, 3), target.device, antialias=2, dtype=torch.float32)
    assert_verbose_allclose(coarse, torch.nn.functional.avg_pool2d(fine, 2), rtol=0, atol=1e-6)


def test_uint8_is_the_float_image_rounded(target: Target) -> None:
    exact = rendered(2, SIZE, target.device, dtype=torch.float32)
    assert torch.equal(rendered(2, SIZE, target.device), (exact * 255 + 0.5).floor().to(torch.uint8))


def test_the_shorter_side_spans_the_picture() -> None:
    tall, wide, square = (rendered(3, size, dtype=torch.float32) for size in ((14, 6), (6, 14), (6, 6)))
    assert torch.equal(tall[:, :, 4:10], square)
    assert torch.equal(wide[..., 4:10], square)


def test_the_pictures_are_those_that_they_were() -> None:
    """What a saved program draws must not change from one version to the next."""
    digest = hashlib.sha256(rendered(len(PROGRAMS), (24, 24), antialias=2).numpy().tobytes()).hexdigest()
    assert digest == "b2fc2dbab0101dcead8467a7baac708d65156bd6dbac13e3795f2aaefaf002f3"


def test_a_batch_changes_no_image(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = rendered(len(PROGRAMS), SIZE, dtype=torch.float32)
    monkeypatch.setattr("kdfast.reference.procedural.shaders._CHUNK", 1)
    assert torch.equal(whole, rendered(len(PROGRAMS), SIZE, dtype=torch.float32))


def test_every_number_of_every_operation_matters() -> None:
    """Change one number of the program under test, and the picture changes."""
    # A disc does not turn, a shape that is not hollow has no width, only some curves step: their kinds differ.
    for op, names in OPERATIONS.items():
        numbers = [i for i, p in enumerate(PROGRAMS) if op in p.structure]
        lot = table([PROGRAMS[i] for i in numbers])
        which = torch.arange(len(numbers))
        still = torch.zeros(len(numbers))
        before = render_shaders(lot.codes, lot.values, lot.rates, which, still, (9, 9), dtype=torch.float32)
        for slot, name in enumerate(names):
            values = lot.values.clone()
            change = 1.0 if name in ("rounds", "count", "octaves", "key", "kind") else 0.3
            values[..., slot] += (lot.codes == Op[op.upper()]) * change
            after = render_shaders(lot.codes, values, lot.rates, which, still, (9, 9), dtype=torch.float32)
            assert not torch.equal(before, after), f"{op}: {name} changes nothing"
    assert len(OPERATIONS) == len(Op) - 1
    assert max(len(names) for names in OPERATIONS.values()) == SLOTS


def test_time_moves_what_has_a_rate(target: Target) -> None:
    inputs = {name: value.to(target.device) for name, value in make(torch.Generator(), (1,)).items()}
    pictures = []
    for moment in (0.0, 0.4):
        inputs["time"] = torch.full((1,), moment, device=target.device)
        pictures.append(run(**inputs))
    assert not torch.equal(*pictures)
    inputs["rates"] = torch.zeros_like(inputs["rates"])
    assert torch.equal(run(**inputs), pictures[0])


V, C = torch.zeros(1, 2, 16), torch.zeros(1, 2, dtype=torch.int32)
P, T = torch.zeros(1, dtype=torch.int64), torch.zeros(1)


@pytest.mark.parametrize(
    "error, match, call",
    [
        (TypeError, "codes: got dtype", lambda: render_shaders(C.long(), V, V, P, T, (2, 2))),
        (TypeError, "values: got dtype", lambda: render_shaders(C, V.double(), V, P, T, (2, 2))),
        (TypeError, "rates: got list", lambda: render_shaders(C, V, [0.0], P, T, (2, 2))),  # type: ignore[arg-type]
        (TypeError, "program: got dtype", lambda: render_shaders(C, V, V, P.int(), T, (2, 2))),
        (ValueError, "time: is on meta", lambda: render_shaders(C, V, V, P, T.to("meta"), (2, 2))),
        (ValueError, "codes: got shape", lambda: render_shaders(C[0], V, V, P, T, (2, 2))),
        (ValueError, r"values: got shape \(1, 1, 16\)", lambda: render_shaders(C, V[:, :1], V, P, T, (2, 2))),
        (ValueError, "rates: got shape", lambda: render_shaders(C, V, V[..., :3], P, T, (2, 2))),
        (ValueError, "program, time: got shapes", lambda: render_shaders(C, V, V, P, T.expand(2), (2, 2))),
        (
            ValueError,
            "program: got 1 to 1; accepted: 0 to 0",
            lambda: render_shaders(C, V, V, P + 1, T, (2, 2)),
        ),
        (ValueError, "program: got -1", lambda: render_shaders(C, V, V, P - 1, T, (2, 2))),
        (ValueError, r"shape: got \(0, 2\)", lambda: render_shaders(C, V, V, P, T, (0, 2))),
        (ValueError, "antialias: got 0", lambda: render_shaders(C, V, V, P, T, (2, 2), antialias=0)),
        (ValueError, "antialias: got 9", lambda: render_shaders(C, V, V, P, T, (2, 2), antialias=9)),
        (
            TypeError,
            "dtype: got torch.float16",
            lambda: render_shaders(C, V, V, P, T, (2, 2), dtype=torch.float16),
        ),
    ],
)
def test_refusals_name_the_argument(error: type[Exception], match: str, call: Any) -> None:
    with pytest.raises(error, match=match):
        call()

"""Dead leaves: painter's order exactly, on every backend; the shapes and sizes that were promised; refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import kdfast
from kdfast.data import surrogate
from kdfast.functional import render_leaves
from kdfast.reference.procedural import leaves as reference
from tests.conftest import INTERPRETING, Target
from tests.support.conformance import ConformanceSuite, OpCase

SEED, LIMIT = 11, 60


def painted(index: int, height: int, width: int, limit: int, seed: int = SEED) -> tuple[Tensor, int]:
    """One leaf after the other over the whole image, in float64: the image and how many leaves fell."""
    table = reference.draw(seed, torch.tensor([index]), 0, limit, height, width)[0].double().numpy()
    y, x = np.mgrid[:height, :width] + 0.5
    image, bare, fallen = np.zeros((height, width), np.int64), np.ones((height, width), bool), 0
    for leaf in table:
        dx, dy = x - leaf[0], y - leaf[1]
        hit = dx**2 + dy**2 <= leaf[2]
        for a, b, c in leaf[3:15].reshape(4, 3):
            hit &= a * dx + b * dy + c >= 0
        image[hit], fallen = int(leaf[15]), fallen + 1
        bare &= ~hit
        if not bare.any():
            break
    return torch.from_numpy(np.stack([image >> 16, image >> 8 & 255, image & 255])).to(torch.uint8), fallen


def make(generator: torch.Generator, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """``shape`` is [images, height, width]; the last two are read from the case's closure."""
    return {"index": torch.arange(shape[0]) * 7 + 3, "size": torch.tensor(shape[1:], dtype=torch.int64)}


def oracle(index: Tensor, size: Tensor) -> Tensor:
    height, width = size.tolist()
    images = [painted(i, height, width, LIMIT)[0] for i in index.tolist()]
    return torch.stack(images) if images else torch.empty(0, 3, height, width)


class TestConformance(ConformanceSuite):
    cases = (
        OpCase(
            name="render_leaves",
            make=make,
            run=lambda index, size: render_leaves(index, tuple(size.tolist()), seed=SEED, limit=LIMIT),
            oracle=oracle,
            # Less than a tile of 16 × 16, several of them with tails, a single row.
            shapes=[(2, 7, 9), (2, 20, 35), (1, 1, 40)],
            small_shapes=[(1, 5, 6), (1, 3, 18)],
            dtypes=[torch.float32],
            tolerances={torch.float32: (0.0, 0.0)},
            launches=3,
            opcheck=lambda inputs: (
                torch.ops.kdfast.render_leaves.default,
                (inputs["index"], SEED, *inputs["size"].tolist(), LIMIT),
            ),
            empty_shape=(0, 4, 5),
        ),
    )


def test_the_last_bare_pixel_ends_it(target: Target) -> None:
    """More leaves than are needed change nothing; fewer leave pixels black."""
    size = (3, 3) if INTERPRETING else (24, 24)
    index = torch.tensor([4], device=target.device)
    want, fallen = painted(4, *size, 3000)
    assert 10 < fallen < 3000
    for limit in (fallen, fallen + 40):
        assert torch.equal(render_leaves(index, size, seed=SEED, limit=limit)[0].cpu(), want)
    short = render_leaves(index, size, seed=SEED, limit=8)[0].cpu()
    assert torch.equal(short, painted(4, *size, 8)[0])
    assert bool((short.sum(0) == 0).any())


def test_large_numbers_and_seeds_on_every_backend(target: Target) -> None:
    index = torch.tensor([2**40 + 5, 0], device=target.device)
    got = render_leaves(index, (4, 6), seed=2**62 + 1, limit=20)
    with kdfast.use_backend("reference"):
        assert torch.equal(got.cpu(), render_leaves(index.cpu(), (4, 6), seed=2**62 + 1, limit=20))
    assert not torch.equal(got[0], got[1])


@pytest.mark.parametrize("size", [(31, 17), (40, 64)])
def test_painting_and_searching_agree(size: tuple[int, int]) -> None:
    stock = reference._Stock(SEED, torch.arange(6), *size, 5000)
    for image in range(6):
        leaves = reference.functools.partial(stock.leaves, image)
        assert torch.equal(reference.paint(leaves, *size), reference.search(leaves, *size))


@pytest.mark.parametrize("make_image", [reference.paint, reference.search])
def test_both_ways_are_painters_order(make_image: Any) -> None:
    stock = reference._Stock(SEED, torch.tensor([9]), 26, 33, 5000)
    colour = make_image(reference.functools.partial(stock.leaves, 0), 26, 33).view(26, 33)
    got = torch.stack([colour >> 16, colour >> 8 & 255, colour & 255]).to(torch.uint8)
    assert torch.equal(got, painted(9, 26, 33, 5000)[0])


def test_radii_follow_their_law() -> None:
    table = reference.draw(0, torch.arange(40), 0, 1000, 100, 100).view(-1, 16).double()
    radii = table[:, 2].sqrt() / 100
    bins = torch.linspace(0.03, 1.0, 200, dtype=torch.float64)
    which = (radii[:, None] - bins).abs().argmin(1)
    assert float((radii - bins[which]).abs().max()) < 1e-6
    weights = bins**-3 - 1
    expected = weights / weights.sum() * len(radii)
    counts = torch.bincount(which, minlength=200).double()
    common = expected > 20
    # Chi-squared over the bins that are met often enough: mean and variance are their number and twice it.
    score = float(((counts - expected)[common] ** 2 / expected[common]).sum())
    degrees = int(common.sum()) - 1
    assert abs(score - degrees) < 5 * (2 * degrees) ** 0.5
    assert counts[common.logical_not()].sum() < 3 * expected[common.logical_not()].sum() + 10


def shapes_of(count: int = 4000) -> tuple[Tensor, Tensor]:
    """Corners of many leaves on the unit circle, ``[N, 4]`` complex, and how many different ones each has."""
    table = reference.draw(1, torch.zeros(1, dtype=torch.int64), 0, count, 64, 64)[0].double()
    planes, radius = table[:, 3:15].view(-1, 4, 3), table[:, 2].sqrt()
    # Neighbouring sides' lines meet in a corner.
    sides = planes[:, :, :2].norm(dim=2) > 0
    return torch.view_as_complex(planes[:, :, :2].contiguous()) / radius[:, None], sides.sum(1)


def test_the_six_shapes_are_met_equally_often() -> None:
    sides, count = shapes_of()
    four = sides[count == 4]
    lengths = four.abs()
    rectangular = ((lengths[:, 0] - lengths[:, 2]).abs() < 1e-4) & (
        (lengths[:, 1] - lengths[:, 3]).abs() < 1e-4
    )
    square = rectangular & ((lengths[:, 0] - lengths[:, 1]).abs() < 1e-4)
    upright = square & ((four[:, 0].real.abs() < 1e-4) | (four[:, 0].imag.abs() < 1e-4))
    found = {
        "circle": int((count == 0).sum()),
        "triangle": int((count == 3).sum()),
        "square": int(upright.sum()),
        "turned square": int((square & ~upright).sum()),
        "rectangle": int((rectangular & ~square).sum()),
        "quadrilateral": int((~rectangular).sum()),
    }
    assert sum(found.values()) == 4000
    for name, number in found.items():  # binomial: mean 667, standard deviation 24
        assert abs(number - 4000 / 6) < 5 * 24, (name, found)


def test_colours_and_centres_are_uniform() -> None:
    table = reference.draw(2, torch.arange(10), 0, 1000, 50, 80).view(-1, 16).double()
    colour = table[:, 15].long()
    for values, top in ((table[:, 0], 80), (table[:, 1], 50), (colour >> 16, 256), (colour >> 8 & 255, 256)):
        share = torch.bincount((values.double() * 10 / top).long(), minlength=10).double()
        assert float(((share - 1000) ** 2 / 1000).sum()) < 9 + 5 * 18**0.5
    assert (
        float(torch.corrcoef(torch.stack([table[:, 0], table[:, 1], table[:, 2]]))[0, 1:].abs().max()) < 0.05
    )


def test_an_image_depends_on_its_number_alone() -> None:
    whole = surrogate.leaves(9, (12, 10), seed=3)
    assert whole.dtype == torch.uint8
    assert torch.equal(whole[4:], surrogate.leaves(5, (12, 10), seed=3, start=4))
    assert len({image.numpy().tobytes() for image in whole}) == 9
    assert not torch.equal(whole, surrogate.leaves(9, (12, 10), seed=4))
    assert surrogate.leaves(0, (12, 10)).shape == (0, 3, 12, 10)


I = torch.zeros(1, dtype=torch.int64)  # noqa: E741


@pytest.mark.parametrize(
    "error, match, call",
    [
        (TypeError, "index: got list", lambda: render_leaves([0], (2, 2))),  # type: ignore[arg-type]
        (TypeError, "index: got dtype", lambda: render_leaves(I.int(), (2, 2))),
        (ValueError, "index: got shape", lambda: render_leaves(I[0], (2, 2))),
        (ValueError, "index: got -1", lambda: render_leaves(I - 1, (2, 2))),
        (ValueError, r"shape: got \(2, 0\)", lambda: render_leaves(I, (2, 0))),
        (ValueError, "seed: got -1", lambda: render_leaves(I, (2, 2), seed=-1)),
        (ValueError, "limit: got 0", lambda: render_leaves(I, (2, 2), limit=0)),
        (ValueError, "n, start, seed: got -1", lambda: surrogate.leaves(-1, (2, 2))),
        (ValueError, "n, start, seed", lambda: surrogate.leaves(1, (2, 2), start=-1)),
        (ValueError, r"shape: got \(0, 2\)", lambda: surrogate.leaves(1, (0, 2))),
        (ValueError, "limit: got 0", lambda: surrogate.leaves(1, (2, 2), limit=0)),
    ],
)
def test_refusals_name_the_argument(error: type[Exception], match: str, call: Any) -> None:
    with pytest.raises(error, match=match):
        call()

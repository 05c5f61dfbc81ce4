"""RandAugment's operations against Pillow, and the regimes built on them."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from kdfast.data.randaugment import OPERATIONS, host_generator, rand_augment
from kdfast.data.regimes import REGIMES, elastic, random_erase, random_invert, regime
from tests.support.shards import pictures


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def warp(image: Image.Image, coefficients: tuple[float, ...]) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, coefficients, Image.Resampling.NEAREST)


# What each operation does at full strength with a positive sign, in Pillow's words.
PILLOW: dict[str, Callable[[Image.Image], Image.Image]] = {
    "identity": lambda image: image,
    "shear_x": lambda image: warp(image, (1, 0.3, 0, 0, 1, 0)),
    "shear_y": lambda image: warp(image, (1, 0, 0, 0.3, 1, 0)),
    "translate_x": lambda image: warp(image, (1, 0, int(150 / 331 * 40), 0, 1, 0)),
    "translate_y": lambda image: warp(image, (1, 0, 0, 0, 1, int(150 / 331 * 28))),
    "rotate": lambda image: image.rotate(30, Image.Resampling.NEAREST),
    "brightness": lambda image: ImageEnhance.Brightness(image).enhance(1.9),
    "color": lambda image: ImageEnhance.Color(image).enhance(1.9),
    "contrast": lambda image: ImageEnhance.Contrast(image).enhance(1.9),
    "sharpness": lambda image: ImageEnhance.Sharpness(image).enhance(1.9),
    "posterize": lambda image: ImageOps.posterize(image, 4),
    "solarize": lambda image: ImageOps.solarize(image, 0),
    "autocontrast": ImageOps.autocontrast,
    "equalize": ImageOps.equalize,
}
GEOMETRIC = {"shear_x", "shear_y", "translate_x", "translate_y", "rotate"}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_do_what_pillows_do(name: str) -> None:
    images = pictures(6, 40)[:, :, :28].contiguous()
    result = OPERATIONS[name](images / 255, 1.0, torch.ones(6))
    expected = np.stack(
        [np.asarray(PILLOW[name](Image.fromarray(a))) for a in images.permute(0, 2, 3, 1).numpy()]
    )
    difference = np.abs(result.permute(0, 2, 3, 1).numpy() * 255 - expected)
    if name in GEOMETRIC:
        # The same pixels, but for ties in what is nearest.
        assert (difference < 0.01).mean() > 0.99
    else:
        # Pillow rounds to bytes on the way, greys before they are weighted by up to 0.9.
        assert difference.max() <= (
            0.01 if name in ("identity", "posterize", "solarize", "equalize") else 2.1
        )


@pytest.mark.parametrize("name", sorted(GEOMETRIC))
def test_the_sign_turns_geometry_around(name: str) -> None:
    images = pictures(2, 32) / 255
    plus, minus = (OPERATIONS[name](images, 0.5, torch.full((2,), sign)) for sign in (1.0, -1.0))
    assert not torch.equal(plus, minus)
    mixed = OPERATIONS[name](images, 0.5, torch.tensor([1.0, -1.0]))
    assert torch.equal(mixed, torch.stack([plus[0], minus[1]]))


@pytest.mark.parametrize("name", OPERATIONS)
def test_strength_zero(name: str) -> None:
    images = pictures(4, 16) / 255
    result = OPERATIONS[name](images, 0.0, torch.ones(4))
    if name == "solarize":
        assert torch.equal(result[images < 1], images[images < 1])
    elif name not in ("autocontrast", "equalize"):
        torch.testing.assert_close(result, images, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_constant_images_stay_in_range(name: str, value: float) -> None:
    result = OPERATIONS[name](torch.full((1, 3, 8, 8), value), 1.0, torch.ones(1))
    assert torch.isfinite(result).all()
    assert 0 <= result.min() <= result.max() <= 1


def test_each_image_draws_its_own_operations() -> None:
    image = pictures(1, 24) / 255
    images = image.expand(2000, -1, -1, -1)
    out = rand_augment(images, seeded(), n=1, magnitude=14)
    variants = {name: set() for name in OPERATIONS}
    for name, operation in OPERATIONS.items():
        for sign in (1.0, -1.0):
            variants[name].add(operation(image, 14 / 30, torch.tensor([sign])).numpy().tobytes())
    found = [one[None].numpy().tobytes() for one in out]
    counts = {name: sum(one in variants[name] for one in found) for name in OPERATIONS}
    # 143 expected of each, 12 a standard deviation; and nothing else comes out.
    assert min(counts.values()) > 80
    assert max(counts.values()) < 210
    assert sum(counts.values()) == 2000


def test_rand_augment_follows_the_generator() -> None:
    images = pictures(32, 16) / 255
    generator = seeded(1)
    first, second = (rand_augment(images, generator, n=2, magnitude=14) for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(first, rand_augment(images, seeded(1), n=2, magnitude=14))
    assert torch.equal(rand_augment(images, seeded(), n=0), images)


def test_host_generator_moves_its_source_on() -> None:
    source = seeded()
    one, two = (torch.rand(3, generator=host_generator(source)) for _ in range(2))
    assert not torch.equal(one, two)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"images": torch.rand(1, 1, 8, 8)}, ValueError, r"images: got shape \[1, 1, 8, 8\]"),
        ({"images": torch.zeros(1, 3, 8, 8, dtype=torch.uint8)}, TypeError, "images: got torch.uint8"),
        ({"n": -1}, ValueError, "n: got -1"),
        ({"magnitude": 31}, ValueError, "magnitude: got 31"),
    ],
)
def test_rand_augment_refuses(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rand_augment(**{"images": torch.rand(1, 3, 8, 8), "generator": seeded(), **arguments})


@pytest.mark.parametrize("name", REGIMES)
@pytest.mark.parametrize("size", [8, 32])
def test_regimes(name: str, size: int) -> None:
    images = pictures(16, size) / 255
    before = images.clone()
    out = regime(name)(images, seeded())
    assert torch.equal(images, before)
    assert out.shape == images.shape
    assert torch.isfinite(out).all()
    assert -1e-6 <= out.min() <= out.max() <= 1 + 1e-6
    assert torch.equal(out, regime(name)(images, seeded()))
    changed = (out - images).abs().mean()
    assert (changed == 0) == (name == "none")


def test_regimes_grow_stronger() -> None:
    images = pictures(64, 32) / 255
    distances = [
        (REGIMES[name](images, seeded()) - images).abs().mean() for name in ("standard", "high", "extreme")
    ]
    assert distances == sorted(distances)


def test_what_the_paper_says() -> None:
    standard, high, extreme = (REGIMES[name] for name in ("standard", "high", "extreme"))
    assert [(r.operations, r.magnitude) for r in (standard, high, extreme)] == [(2, 14), (4, 14), (8, 30)]
    assert (standard.elastic, standard.invert, standard.erase) == (0, 0, 0)
    assert (high.elastic, high.invert, high.erase) == (0.5, 0.1, 0)
    assert extreme.erase > 0
    with pytest.raises(ValueError, match="augment: got 'mad'"):
        regime("mad")


def test_elastic_moves_pixels_by_the_right_amount() -> None:
    # A ramp tells by how many pixels it was moved. Blurred uniform noise has variance 1/3 · 1/(4πσ²).
    size = 96
    ramp = (torch.arange(size) + 0.5).expand(64, 3, size, size) / size
    out = elastic(ramp, seeded(), p=1.0, alpha=50.0, sigma=5.0)
    inner = slice(20, -20)
    moved = ((out - ramp) * size)[:, 0, inner, inner]
    expected = 25 * math.sqrt(1 / 3 / (4 * math.pi * 25))
    assert moved.std() == pytest.approx(expected, rel=0.1)
    assert abs(moved.mean()) < 0.1
    # Smooth: neighbours move together.
    assert moved.diff(dim=1).std() < 0.2 * moved.std()


@pytest.mark.parametrize("function", [elastic, random_invert, random_erase])
def test_probabilities(function: Callable[..., torch.Tensor]) -> None:
    images = torch.rand(400, 3, 12, 12, generator=seeded(5))
    changed = (function(images, seeded(), p=0.3) != images).flatten(1).any(1)
    # 120 expected, 9 a standard deviation.
    assert 80 < changed.sum() < 160
    assert torch.equal(function(images, seeded(), p=0.0), images)
    assert (function(images, seeded(), p=1.0) != images).flatten(1).any(1).all()
    assert function(images.half(), seeded(), p=1.0).dtype == torch.float16
    for bad in ({"p": 1.5}, {"images": images[0]}):
        with pytest.raises(ValueError):
            function(**{"images": images, "generator": seeded(), **bad})
    with pytest.raises(TypeError, match=r"images: got torch\.int64"):
        function(images.long(), seeded())


def test_invert_inverts() -> None:
    images = torch.rand(4, 3, 8, 8)
    assert torch.equal(random_invert(images, seeded(), p=1.0), 1 - images)


def test_erased_boxes_have_the_right_area() -> None:
    size = 48
    out = random_erase(torch.ones(1000, 3, size, size), seeded(), p=1.0)
    gone = out[:, 0] == 0
    rows, columns = gone.any(2).sum(1), gone.any(1).sum(1)
    assert torch.equal(gone.sum((1, 2)), rows * columns)
    area = gone.double().mean((1, 2))
    # U(2 %, 33 %) but for whole pixels, and for boxes too long for the image.
    assert area.mean() == pytest.approx(0.175, abs=0.015)
    assert area.min() > 0.01
    assert area.max() < 0.36
    ratio = rows / columns
    assert 1 / 4 < ratio.min() < 1 / 2 < 2 < ratio.max() < 4

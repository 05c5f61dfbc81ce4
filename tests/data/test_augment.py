"""Batched augmentation: each function against what it says of single images, and the laws of its draws."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from kdfast.data.augment import _beta, _span, cutmix, mixup, padded_crop, random_flip


def batch(count: int = 64, size: int = 8) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


FUNCTIONS = {
    "random_flip": random_flip,
    "padded_crop": padded_crop,
    "mixup": lambda images, g: mixup(images, g).images,
    "cutmix": lambda images, g: cutmix(images, g).images,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_generator_decides_and_the_input_stays(name: str) -> None:
    function, images = FUNCTIONS[name], batch()
    before = images.clone()
    first = function(images, seeded())
    assert torch.equal(images, before)
    assert torch.equal(first, function(images, seeded()))
    assert not torch.equal(first, function(images, seeded(1)))
    assert first.shape == images.shape
    assert first.dtype == images.dtype
    half = function(images.half(), seeded())
    assert half.dtype == torch.float16


@pytest.mark.parametrize("name", FUNCTIONS)
def test_refuses_what_is_no_batch(name: str) -> None:
    with pytest.raises(ValueError, match=r"images: got shape \[3, 8, 8\]"):
        FUNCTIONS[name](batch()[0], seeded())
    with pytest.raises(TypeError, match=r"images: got torch.uint8"):
        FUNCTIONS[name](batch().byte(), seeded())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_empty_batch_stays_empty(name: str) -> None:
    assert FUNCTIONS[name](batch(0), seeded()).shape == (0, 3, 8, 8)


def test_flip_mirrors_about_half() -> None:
    images = batch(1000)
    out = random_flip(images, seeded())
    mirrored = (out == images.flip(-1)).flatten(1).all(1)
    kept = (out == images).flatten(1).all(1)
    assert (mirrored ^ kept).all()
    assert 440 < mirrored.sum() < 560
    assert torch.equal(random_flip(images, seeded(), p=0.0), images)
    assert torch.equal(random_flip(images, seeded(), p=1.0), images.flip(-1))
    with pytest.raises(ValueError, match="p: got 2"):
        random_flip(images, seeded(), p=2)


def test_padded_crop_is_a_window_of_the_padded_image() -> None:
    images = batch(400, size=6)
    out = padded_crop(images, seeded(), padding=2, fill=0.5)
    padded = F.pad(images, (2, 2, 2, 2), value=0.5)
    windows = padded.unfold(2, 6, 1).unfold(3, 6, 1)  # [B, 3, 5, 5, 6, 6]
    matches = (windows == out[:, :, None, None]).flatten(4).all(4).all(1)
    assert matches.flatten(1).any(1).all()
    # All 25 places come up, about equally often (16 each; 40 is six standard deviations away).
    counts = matches.sum(0)
    assert counts.min() > 0
    assert counts.max() < 40
    assert torch.equal(padded_crop(images, seeded(), padding=0), images)
    with pytest.raises(ValueError, match="padding: got -1"):
        padded_crop(images, seeded(), padding=-1)


def test_mixup_is_the_blend_that_it_reports() -> None:
    images = batch(500)
    mixed = mixup(images, seeded())
    share = mixed.lam[:, None, None, None]
    torch.testing.assert_close(mixed.images, share * images + (1 - share) * images[mixed.partner])
    assert sorted(mixed.partner.tolist()) == list(range(500))
    # U(0, 1), one for each image.
    assert abs(mixed.lam.mean() - 0.5) < 0.05
    assert abs(mixed.lam.var() - 1 / 12) < 0.02


@pytest.mark.parametrize("alpha", [0.25, 1.0])
@pytest.mark.parametrize("one_box", [False, True])
def test_cutmix_reports_the_share_that_is_left(alpha: float, one_box: bool) -> None:
    count = 64
    # Each image all of its own number, so that each pixel tells where it is from.
    images = torch.arange(count).float()[:, None, None, None].expand(-1, 3, 16, 16)
    mixed = cutmix(images, seeded(3), alpha=alpha, one_box=one_box)
    foreign = (mixed.images != images)[:, 0]
    moved = mixed.partner != torch.arange(count)
    torch.testing.assert_close(mixed.lam[moved], 1 - foreign[moved].float().mean((1, 2)))
    source = mixed.partner[:, None, None].expand(-1, 16, 16)
    assert torch.equal(mixed.images[:, 0][foreign].long(), source[foreign])
    # What came in is a box: as many pixels as its rows times its columns.
    assert torch.equal(foreign.sum((1, 2)), foreign.any(2).sum(1) * foreign.any(1).sum(1))
    assert (len(mixed.lam.unique()) == 1) == one_box


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_one_box_is_the_one_that_masks_would_draw(layout: torch.memory_format) -> None:
    """Masks are for devices that must not be waited for; the box's edges on a CPU are theirs, pixel for pixel."""
    images = torch.rand(5, 3, 13, 9, generator=seeded(1)).contiguous(memory_format=layout)
    for seed in range(200):
        alpha = (0.05, 0.25, 1.0, 8.0)[seed % 4]
        got, generator = cutmix(images, seeded(seed), alpha=alpha, one_box=True), seeded(seed)
        side = (1 - _beta(alpha, 1, generator)).sqrt()
        rows, columns = _span(13, side, generator), _span(9, side, generator)
        inside = rows[:, :, None] & columns[:, None, :]
        partner = torch.randperm(5, generator=generator)
        assert torch.equal(got.partner, partner)
        assert torch.equal(got.images, torch.where(inside[:, None], images[partner], images))
        torch.testing.assert_close(got.lam, (1 - inside.float().mean()).expand(5))
        assert got.images.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("alpha", [0.25, 1.0, 8.0])
def test_lambda_is_drawn_from_beta(alpha: float) -> None:
    drawn = _beta(alpha, 20000, seeded()).double()
    expected = torch.distributions.Beta(torch.tensor(alpha).double(), torch.tensor(alpha).double())
    assert abs(drawn.mean() - 0.5) < 5 * (expected.variance / 20000) ** 0.5
    assert abs(drawn.var() / expected.variance - 1) < 0.05
    assert ((drawn >= 0) & (drawn <= 1)).all()


def test_cutmix_refuses_alpha_zero() -> None:
    with pytest.raises(ValueError, match="alpha: got 0"):
        cutmix(batch(), seeded(), alpha=0)

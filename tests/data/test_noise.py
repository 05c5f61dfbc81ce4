"""The noise surrogate: the statistics it promises, and images that depend on their index alone."""

from __future__ import annotations

import pytest
import torch

from kdfast.data import surrogate

STATISTICS = {"mean": (0.4, 0.5, 0.6), "std": (0.1, 0.05, 0.02)}


def test_statistics_per_channel() -> None:
    images = surrogate.noise(50, (32, 32), seed=0, **STATISTICS).double() / 255
    assert images.shape == (50, 3, 32, 32)
    # 51200 draws a channel: five standard errors, and half a level for the rounding.
    for channel in range(3):
        mean, std = STATISTICS["mean"][channel], STATISTICS["std"][channel]
        assert abs(images[:, channel].mean() - mean) < 5 * std / 226 + 1 / 510
        assert abs(images[:, channel].std() - std) < 5 * std / 320 + 1 / 510


def test_clipped_not_wrapped() -> None:
    images = surrogate.noise(4, (16, 16), mean=(0.0, 1.0, 0.5), std=(1.0, 1.0, 0.0), seed=0)
    assert images.dtype == torch.uint8
    assert 0.4 < (images[:, 0] == 0).double().mean() < 0.6
    assert 0.4 < (images[:, 1] == 255).double().mean() < 0.6
    assert (images[:, 2] == 128).all()


def test_an_image_depends_on_its_index_alone() -> None:
    whole = surrogate.noise(10, (8, 8), seed=3, **STATISTICS)
    assert torch.equal(whole[4:], surrogate.noise(6, (8, 8), seed=3, start=4, **STATISTICS))
    assert len({image.numpy().tobytes() for image in whole}) == 10
    assert not torch.equal(whole, surrogate.noise(10, (8, 8), seed=4, **STATISTICS))
    assert surrogate.noise(0, (8, 8), seed=3, **STATISTICS).shape == (0, 3, 8, 8)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"n": -1}, "n, start, seed: got -1"),
        ({"seed": -1}, "n, start, seed"),
        ({"mean": (0.5,)}, "mean, std: got 1 and 3 values"),
        ({"std": (0.1, -0.1, 0.1)}, "std: got .* must not be negative"),
        ({"shape": (0, 8)}, r"shape: got \(0, 8\)"),
    ],
)
def test_refusals(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        surrogate.noise(**{"n": 1, "shape": (8, 8), "seed": 0, **STATISTICS, **change})

"""Draws the gallery's pictures: ``python docs/gallery.py out/demo runs/digits-ssdkd``.

The demo gives the synthetic digits and the network whose features are shown, the second run the inverted images
(docs/pages/methods/ssdkd.md says how to make it); the rest is drawn by its number. Writes docs/pages/assets/gallery-*.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

from kdfast.data import load_dataset, surrogate
from kdfast.methods.diffkd import saliency
from kdfast.models import FeatureTaps
from kdfast.report.grid import write_grid
from kdfast.training import load_model, load_model_config

ASSETS = Path(__file__).parent / "pages" / "assets"
SIDE = 96
LAYERS = ("layer1", "layer2", "layer3")


def _sheet(path: Path, images: torch.Tensor, columns: int) -> None:
    """Pictures in rows, as WebP: small, and with gaps that show the page's own ground."""
    grid = write_grid(path.with_suffix(".png"), images, columns=columns, scale=1)
    with Image.open(grid) as picture:
        picture.save(path, quality=85, method=6)
    grid.unlink()


def _png(path: Path, source: bytes | Path, width: int) -> None:
    """The same picture, its pixels whole, no wider than the page, in a palette."""
    image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source).convert("RGBA")
    factor = max(1, round(image.width / width))
    image = image.resize((image.width // factor, image.height // factor), Image.Resampling.NEAREST)
    image.quantize(255, method=Image.Quantize.FASTOCTREE).save(path, optimize=True)


def generations() -> torch.Tensor:
    """Four shader programs, each at the left of a row; to the right a mutant of the one before."""
    pictures = []
    for seed in (7, 8, 21, 33):
        (program,) = surrogate.random_programs(1, seed=seed)
        line = [program]
        for step in range(8):
            line.append(surrogate.mutate(line[-1], seed=100 * seed + step))
        pictures.append(surrogate.shaders(len(line), (SIDE, SIDE), programs=line))
    return torch.cat(pictures)


def features(network: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Held-out digits, each with where its network's three stages are strong."""
    described = load_model_config(network)
    dataset = load_dataset("digits", "test", image_size=described.image_size)
    images = torch.stack([dataset[index][0] for index in range(4)])
    shape = (1, 3, 1, 1)
    mean, std = torch.tensor(described.mean).view(shape), torch.tensor(described.std).view(shape)
    model = load_model(network)
    with torch.no_grad(), FeatureTaps(model, LAYERS) as taps:
        model((images / 255 - mean) / std)
        maps = [saliency(taps[layer]) for layer in LAYERS]
    tiles = [images.numpy()]
    for each in maps:
        low, high = each.amin((1, 2), keepdim=True), each.amax((1, 2), keepdim=True)
        share = interpolate(((each - low) / (high - low))[:, None], size=images.shape[-2:])[:, 0]
        colours = matplotlib.colormaps["viridis"](share.numpy(), bytes=True)[..., :3]
        tiles.append(colours.transpose(0, 3, 1, 2))
    return np.stack(tiles, 1).reshape(-1, *images.shape[1:])


def main() -> None:
    """Draw all of them."""
    demo, inverted = map(Path, sys.argv[1:3])
    _sheet(ASSETS / "gallery-leaves.webp", surrogate.leaves(18, (SIDE, SIDE), seed=3), 9)
    _sheet(ASSETS / "gallery-mutations.webp", generations(), 9)
    _png(ASSETS / "gallery-digits.png", demo / "samples-2-synthetic.png", 864)
    _png(ASSETS / "gallery-inverted.png", inverted / "samples-buffer.png", 864)
    write_grid(ASSETS / "gallery-features.png", features(demo / "teacher"), columns=8, scale=6)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main()

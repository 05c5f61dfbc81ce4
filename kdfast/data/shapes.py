"""A small segmentation set that is drawn, not downloaded: discs, squares and triangles on textured ground.

``python -m kdfast.data.shapes DIR`` writes it as a folder that :mod:`kdfast.data.segmentation` reads.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kdfast.data.labelled import pillow
from kdfast.data.segmentation import IGNORE

__all__ = ["CLASSES", "write_shapes"]

CLASSES = ("ground", "disc", "square", "triangle")


def write_shapes(
    directory: str | Path, *, train: int = 240, test: int = 80, size: int = 64, seed: int = 0
) -> Path:
    """Write images and masks.

    Each image has two to four shapes, which may cover one another and the edges; an outline one pixel wide is
    ambiguous, and ignored. The same seed writes the same files.

    Args:
        directory: Where to.
        train: Images of ``train/``.
        test: Images of ``test/``.
        size: Side in pixels, at least 16.
        seed: Of everything.

    Returns:
        The directory.

    Raises:
        ValueError: A number is out of range.
    """
    if size < 16 or train < 1 or test < 1:
        raise ValueError(f"size, train, test: got {size}, {train}, {test}; accepted: at least 16, 1 and 1")
    image = pillow("writing the shapes")
    root = Path(directory)
    for number, (split, count) in enumerate({"train": train, "test": test}.items()):
        generator = np.random.default_rng([seed, number])
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            pixels, mask = _draw(generator, size)
            image.fromarray(pixels).save(root / split / "images" / f"{index:05d}.png")
            image.fromarray(mask).save(root / split / "masks" / f"{index:05d}.png")
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    return root


def _draw(generator: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """An image uint8 ``[H, W, 3]`` and its mask uint8 ``[H, W]``."""
    rows, columns = np.mgrid[:size, :size] + 0.5
    pixels = np.full((size, size, 3), generator.uniform(40, 215, 3))
    mask = np.zeros((size, size), np.uint8)
    for _ in range(generator.integers(2, 5)):
        label = int(generator.integers(1, len(CLASSES)))
        centre, radius = generator.uniform(0, size, 2), generator.uniform(size / 10, size / 4)
        turn = generator.uniform(0, 2 * np.pi)
        y, x = rows - centre[0], columns - centre[1]
        y, x = np.cos(turn) * y - np.sin(turn) * x, np.sin(turn) * y + np.cos(turn) * x
        # How far outside the shape a pixel's middle lies.
        edges = [(0.0, 1.0), (0.866, -0.5), (-0.866, -0.5)]
        outside = {
            1: np.hypot(x, y) - radius,
            2: np.maximum(np.abs(x), np.abs(y)) - 0.85 * radius,
            3: np.max([a * x + b * y for a, b in edges], axis=0) - 0.6 * radius,
        }[label]
        pixels[outside <= 0] = generator.uniform(0, 255, 3)
        mask[outside <= 0] = label
        mask[np.abs(outside) < 0.5] = IGNORE
    noise = generator.normal(0, 12, pixels.shape)
    return np.clip(pixels + noise, 0, 255).astype(np.uint8), mask


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m kdfast.data.shapes", description="Draw a segmentation set."
    )
    parser.add_argument("directory")
    for name, value in (("train", 240), ("test", 80), ("size", 64), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    given = vars(parser.parse_args(arguments))
    print(write_shapes(given.pop("directory"), **given))


if __name__ == "__main__":
    main()

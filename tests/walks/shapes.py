"""Draw a folder of pictures as somebody might have one: six classes of shapes on coloured grounds, 160 pixels wide.

python shapes.py DIR [TRAIN] [VAL]    DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg, so many of each class
"""

from __future__ import annotations

import math
import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw

SIDE = 160
CORNERS = {"triangle": 3, "square": 4, "pentagon": 5, "star": 10, "circle": 64, "cross": 12}


def outline(name: str, middle: tuple[float, float], radius: float, turn: float) -> list[tuple[float, float]]:
    """The corners of a shape."""
    count = CORNERS[name]
    points = []
    for corner in range(count):
        near = 0.45 if (name == "star" and corner % 2) or (name == "cross" and corner % 3 == 0) else 1.0
        angle = turn + 2 * math.pi * corner / count
        points.append(
            (middle[0] + near * radius * math.cos(angle), middle[1] + near * radius * math.sin(angle))
        )
    return points


def picture(name: str, draw: random.Random) -> Image.Image:
    """One picture of a shape."""
    ground, ink = ([draw.randrange(256) for _ in range(3)] for _ in range(2))
    while sum(abs(a - b) for a, b in zip(ground, ink)) < 200:
        ink = [draw.randrange(256) for _ in range(3)]
    image = Image.new("RGB", (SIDE, SIDE), tuple(ground))
    middle = draw.uniform(60, 100), draw.uniform(60, 100)
    points = outline(name, middle, draw.uniform(35, 55), draw.uniform(0, 2 * math.pi))
    ImageDraw.Draw(image).polygon(points, fill=tuple(ink))
    return image


def main() -> None:
    """Write the folder."""
    root = Path(sys.argv[1])
    sizes = [int(word) for word in sys.argv[2:]] + [150, 40][len(sys.argv) - 2 :]
    draw = random.Random(0)
    for split, count in zip(("train", "val"), sizes):
        for name in CORNERS:
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                picture(name, draw).save(folder / f"{number:03d}.jpg", quality=90)


if __name__ == "__main__":
    main()

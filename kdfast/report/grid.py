"""Sample grids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdfast.errors import require

_GAP = 1


def write_grid(path: str | Path, images: Any, *, columns: int, scale: int = 4) -> Path:
    """Write images as one PNG, row by row.

    Args:
        path: The file.
        images: uint8 ``[N, 3, H, W]``, a tensor or an array.
        columns: Images in a row.
        scale: Each pixel becomes a square of this side.

    Raises:
        ValueError: There are no images, or they have another shape or type.
    """
    image = require("matplotlib.image", extra="report", feature="a sample grid")
    pixels: NDArray[np.uint8] = np.asarray(images)
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3 or not len(pixels):
        raise ValueError(
            f"images: got {pixels.dtype} {list(pixels.shape)}, accepted: uint8 [N, 3, H, W] with N ≥ 1"
        )
    if columns < 1:
        raise ValueError(f"columns: got {columns}, accepted: at least 1")
    count, _, height, width = pixels.shape
    rows = -(-count // columns)
    # Transparent where there is no image, so that the grid sits on a light page and on a dark one.
    sheet = np.zeros((rows * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP, 4), dtype=np.uint8)
    for i, tile in enumerate(pixels.transpose(0, 2, 3, 1)):
        top, left = i // columns * (height + _GAP), i % columns * (width + _GAP)
        sheet[top : top + height, left : left + width, :3] = tile
        sheet[top : top + height, left : left + width, 3] = 255
    image.imsave(path, sheet.repeat(scale, axis=0).repeat(scale, axis=1), metadata={"Software": "kdfast"})
    return Path(path)

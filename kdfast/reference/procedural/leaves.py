"""Dead leaves: what each leaf looks like, and the images they make, in plain PyTorch.

Leaves fall on an image one after the other, each hiding what it covers, until no pixel is bare. Painted one by one,
pixel p ends with the colour of the last leaf on it; painting stops with the leaf that covers the last bare pixel. So

    stop = max over p of (first leaf on p),   colour(p) = colour of the last leaf on p that is not after stop

which each pixel can find on its own. kernels/procedural/leaves.py does that; so does :func:`search`. :func:`paint`
paints, as csrc/dead_leaves.hpp does, which is what runs where the extension was built.

The test that says whether a leaf is on a pixel is made of operations that every backend rounds alike (see
procedural.py), and every backend reads the same table of leaves, so that images agree to the last bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdfast.reference.native import extension
from kdfast.reference.philox import philox
from kdfast.reference.procedural.arithmetic import wave

#: Numbers a leaf: centre, squared radius, four half-planes (A, B, C), colour as 0xRRGGBB.
FIELDS = 16
#: Kinds of leaf: circle, square, turned square, rectangle, triangle, quadrilateral.
KINDS = 6
BINS = 200
SMALLEST = 0.03
#: Leaves times pixels that are worked on at a time.
_CHUNK = 1 << 15
#: Images of at most so many pixels are searched, larger ones painted.
_SMALL = 100 * 100
_KEY = (1 << 64) - 1
#: Leaves are drawn for so many images at once, so many at a time.
_GROUP, _STOCK = 32, 512


@functools.cache
def radius_law() -> tuple[Tensor, Tensor]:
    """The 200 radii, as shares of the image's side, and their cumulative probabilities: p(r) ∝ r⁻³ − 1."""
    radii = torch.linspace(SMALLEST, 1.0, BINS, dtype=torch.float64)
    weights = radii**-3 - 1
    return radii.float(), (weights.cumsum(0) / weights.sum()).float()


def _uniform(word: Tensor) -> Tensor:
    """32 random bits as a number in [0, 1) with 24 bits."""
    return (word >> 8).float() * 2.0**-24


def draw(seed: int, index: Tensor, first: int, count: int, height: int, width: int) -> Tensor:
    """Leaves ``first`` to ``first + count`` of images ``index`` ``[B]``: float32 ``[B, count, 16]``.

    Leaf j of image i is drawn from Philox blocks at the counters (j, i, 0 … 2) under the key ``seed``.
    """
    device = index.device
    leaf = torch.arange(first, first + count, dtype=torch.int64, device=device).expand(len(index), -1)
    image = index[:, None].expand_as(leaf)
    low, high = image & 0xFFFFFFFF, image >> 32

    def words(block: int) -> tuple[Tensor, ...]:
        return philox(seed, (leaf, low, high, torch.full_like(leaf, block)))

    which, size, across, down = words(0)
    colour, angle, aspect, _ = words(1)
    jitter = [_uniform(word) for word in words(2)]
    radii, law = (table.to(device) for table in radius_law())
    bins = torch.searchsorted(law, _uniform(size), right=True).clamp(max=BINS - 1)
    radius = radii[bins] * float(min(height, width))
    kind = (which * KINDS) >> 32
    corners = _corners(kind, _uniform(angle), _uniform(aspect), jitter)
    return torch.stack(
        [
            _uniform(across) * float(width),
            _uniform(down) * float(height),
            radius * radius,
            *_half_planes(kind, corners, radius),
            (colour >> 8).float(),
        ],
        -1,
    )


def _corners(kind: Tensor, angle: Tensor, aspect: Tensor, jitter: list[Tensor]) -> list[Tensor]:
    """Where on its circle each leaf has its four corners, in turns; a triangle's last two coincide."""
    # A rectangle's corners lie ± half of this from its axis: an eighth of a turn makes it a square.
    half = torch.where(kind == 3, 0.03 + 0.19 * aspect, torch.full_like(aspect, 0.125))
    start = torch.where(kind == 1, torch.zeros_like(angle), angle)
    boxes = [start - half, start + half, start + (0.5 - half), start + (0.5 + half)]
    # Corners of the free shapes are drawn one a sector, which keeps them apart and in order.
    third, fourth = 1.0 / 3.0, 0.25
    triangle = [angle + (k + 0.8 * jitter[k]) * third for k in range(3)]
    free = [angle + (k + 0.8 * jitter[k]) * fourth for k in range(4)]
    triangle.append(triangle[2])
    found = []
    for k in range(4):
        polygon = torch.where(kind == 4, triangle[k], free[k])
        found.append(torch.where(kind < 4, boxes[k], polygon))
    return found


def _half_planes(kind: Tensor, corners: list[Tensor], radius: Tensor) -> list[Tensor]:
    """A, B, C of each side: a point (dx, dy) from the centre is inside where A·dx + B·dy + C ≥ 0."""
    xs = [wave(turn + 0.25) * radius for turn in corners]
    ys = [wave(turn) * radius for turn in corners]
    found = []
    zero, one = torch.zeros_like(radius), torch.ones_like(radius)
    for k in range(4):
        after = (k + 1) % 4
        across, up = xs[after] - xs[k], ys[after] - ys[k]
        # A side without length (a triangle's fourth, a circle's) keeps everything.
        none = (kind == 0) | ((across == 0) & (up == 0))
        found += [
            torch.where(none, zero, -up),
            torch.where(none, zero, across),
            torch.where(none, one, up * xs[k] - across * ys[k]),
        ]
    return found


def hits(leaves: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Which leaves ``[K, 16]`` are on which pixels (centres ``[M]``): bool ``[K, M]``."""
    field = [leaves[:, j : j + 1] for j in range(FIELDS)]
    dx, dy = x - field[0], y - field[1]
    inside = dx * dx + dy * dy <= field[2]
    for k in range(3, 15, 3):
        inside &= field[k] * dx + field[k + 1] * dy + field[k + 2] >= 0
    return inside


def render(seed: int, index: Tensor, height: int, width: int, limit: int) -> Tensor:
    """uint8 ``[B, 3, H, W]``: images ``index`` of at most ``limit`` leaves each; bare pixels stay black."""
    native = extension()
    if native is not None:
        law = (table.numpy() for table in radius_law())
        drawn = native.dead_leaves(seed & _KEY, index.cpu().numpy(), height, width, limit, *law)
        return torch.from_numpy(drawn).to(index.device)
    return by_operators(seed, index, height, width, limit)


def by_operators(seed: int, index: Tensor, height: int, width: int, limit: int) -> Tensor:
    """:func:`render` without the extension."""
    make = search if height * width <= _SMALL else paint
    images = []
    for group in torch.split(index.cpu(), _GROUP):
        stock = _Stock(seed, group, height, width, limit)
        images += [make(functools.partial(stock.leaves, i), height, width) for i in range(len(group))]
    if not images:
        return torch.empty(0, 3, height, width, dtype=torch.uint8, device=index.device)
    colour = torch.stack(images).view(-1, height, width)
    return torch.stack([colour >> 16, (colour >> 8) & 255, colour & 255], 1).to(torch.uint8).to(index.device)


class _Stock:
    """The leaves of a few images, drawn for all of them at once and as far as any of them needs."""

    def __init__(self, seed: int, index: Tensor, height: int, width: int, limit: int) -> None:
        self._draw = functools.partial(draw, seed, index, height=height, width=width)
        self._limit = limit
        self._table = torch.empty(len(index), 0, FIELDS)

    def leaves(self, image: int, first: int, count: int) -> Tensor:
        """At most ``count`` leaves of an image, from ``first`` on: fewer where the limit is, then none."""
        last = min(first + count, self._limit)
        while self._table.shape[1] < last:
            done = self._table.shape[1]
            fresh = self._draw(first=done, count=min(_STOCK, self._limit - done))
            self._table = torch.cat([self._table, fresh], 1)
        return self._table[image, first:last]


Leaves = Callable[[int, int], Tensor]


def paint(leaves: Leaves, height: int, width: int) -> Tensor:
    """One image in painter's order, leaf by leaf, each within its bounding box: 0xRRGGBB, int32 ``[H·W]``."""
    colour = np.zeros((height, width), np.int32)
    bare = np.ones((height, width), bool)
    x, y = (np.arange(size, dtype=np.float32) + np.float32(0.5) for size in (width, height))
    left, done = height * width, 0
    while left:
        table = leaves(done, _STOCK).numpy()
        if not len(table):
            break
        reach = np.sqrt(table[:, 2]) + 1
        low = np.maximum(table[:, :2] - reach[:, None], 0).astype(np.int64).tolist()
        high = (table[:, :2] + reach[:, None]).astype(np.int64).tolist()
        for leaf, (x0, y0), (x1, y1) in zip(table, low, high):
            box = slice(y0, y1 + 1), slice(x0, x1 + 1)
            hit = _on(leaf, x[None, box[1]], y[box[0], None])
            colour[box][hit] = leaf[15]
            left -= int(np.count_nonzero(hit & bare[box]))
            bare[box] &= ~hit
            if not left:
                break
        done += len(table)
    return torch.from_numpy(colour).flatten()


def _on(leaf: NDArray[np.float32], x: NDArray[np.float32], y: NDArray[np.float32]) -> NDArray[np.bool_]:
    """:func:`hits` of one leaf on a box of pixels."""
    dx, dy = x - leaf[0], y - leaf[1]
    inside: NDArray[np.bool_] = dx * dx + dy * dy <= leaf[2]
    sides = leaf[3:15].reshape(4, 3, 1, 1)
    if sides[:, :2].any():  # a circle has none
        inside &= ((sides[:, 0] * dx + sides[:, 1] * dy) + sides[:, 2] >= 0).all(0)
    return inside


def search(leaves: Leaves, height: int, width: int) -> Tensor:
    """The same image, pixels looking for their leaves: quicker where there are few pixels."""
    x = (torch.arange(width).float() + 0.5).repeat(height)
    y = (torch.arange(height).float() + 0.5).repeat_interleave(width)
    bare, done, stop = torch.arange(height * width), 0, 0
    while len(bare):
        part = leaves(done, _some(bare))
        if not len(part):
            stop = done
            break
        first = _first(hits(part, x[bare], y[bare]))
        bare, reached = bare[first == len(part)], first[first < len(part)]
        stop = max(stop, done + int(reached.max()) + 1) if len(reached) else stop
        done += len(part)
    colour, open_ = torch.zeros(height * width, dtype=torch.int32), torch.arange(height * width)
    while len(open_) and stop:
        begin = max(0, stop - _some(open_))
        part = leaves(begin, stop - begin).flip(0)
        last = _first(hits(part, x[open_], y[open_]))
        found = last < len(part)
        colour[open_[found]] = part[last[found], 15].to(torch.int32)
        open_, stop = open_[~found], begin
    return colour


def _some(pixels: Tensor) -> int:
    """How many leaves to try on so many pixels at a time."""
    return min(max(32, _CHUNK // len(pixels)), 512)


def _first(hit: Tensor) -> Tensor:
    """Row of each column's first True; the number of rows where there is none."""
    rows = torch.arange(len(hit), dtype=torch.int32)[:, None]
    return torch.where(hit, rows, len(hit)).amin(0).long()

"""Surrogate images: shader programs and dead leaves, images a second.

Traffic of kdfast: 3 bytes a pixel, written once (a leaf's 64 bytes are read from cache). Both are decided by
instructions: a shader program has about 15 operations of some hundred instructions a pixel and sample.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdfast.backend import use_backend
from kdfast.benchmarks.case import Case, Provider, Settings, Traffic, Work, peer
from kdfast.data.surrogate import random_programs
from kdfast.data.surrogate.programs import table
from kdfast.functional import render_leaves, render_shaders
from kdfast.reference.procedural import leaves as leaf_reference

SEED = 0
#: Pictures of a batch that the check renders once more, on one CPU thread: 256 of 224² are a minute.
CHECKED = 8


def cases(settings: Settings) -> Iterator[Case]:
    """All rows of the suite for this device and size of run."""
    sizes = settings.pick([(8, 4)], [(32, 64)], [(32, 256), (224, 8)])
    if settings.device == "cuda" and not settings.tiny:
        sizes = [(32, 256), (224, 256)]
    for side, batch in sizes:
        for antialias in (1, 2):
            yield _shaders(side, batch, antialias, settings)
    for side, batch in sizes:
        yield _leaves(side, min(batch, 16) if settings.device == "cpu" else batch, settings)


def _shaders(side: int, batch: int, antialias: int, settings: Settings) -> Case:
    def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        lot = table(random_programs(batch, seed=SEED), settings.device)
        which = torch.arange(batch, device=settings.device)
        time = (which * 0.618 % 1).float()
        return lot.codes, lot.values, lot.rates, which, time

    def ours() -> Work:
        given = inputs()
        return lambda turn: render_shaders(*given, (side, side), antialias=antialias)

    def eager() -> Work:
        given = inputs()

        def work(turn: int) -> Tensor:
            with use_backend("reference"):
                return render_shaders(*given, (side, side), antialias=antialias)

        return work

    def one_by_one() -> Work:
        codes, values, rates, which, time = inputs()

        def work(turn: int) -> Tensor:
            with use_backend("reference"):
                return torch.cat(
                    [
                        render_shaders(
                            codes,
                            values,
                            rates,
                            which[i : i + 1],
                            time[i : i + 1],
                            (side, side),
                            antialias=antialias,
                        )
                        for i in range(batch)
                    ]
                )

        return work

    @functools.cache
    def wanted() -> Tensor:
        with use_backend("reference"):
            codes, values, rates, which, time = (x.cpu() for x in inputs())
            some = which[:CHECKED], time[:CHECKED]
            return render_shaders(codes, values, rates, *some, (side, side), antialias=antialias)

    def check(provider: str, result: Any) -> None:
        assert result.shape == (batch, 3, side, side)
        assert torch.equal(result[:CHECKED].cpu(), wanted()), "the pictures differ"

    written = Traffic("3 bytes a pixel", float(3 * batch * side * side))
    providers = [
        Provider("eager PyTorch, image by image", one_by_one, graph=False),
        Provider("kdfast", ours, written, graph=settings.device == "cuda"),
    ]
    if settings.device == "cuda" and side > 64:  # half a minute a sample, and nobody would
        del providers[0]
    if settings.device == "cuda":  # on a CPU it is what kdfast is
        providers.insert(-1, Provider("eager PyTorch, by operation", eager, graph=False))
    params = {"side": side, "batch": batch, "samples": antialias**2}
    return Case(
        "surrogate",
        "shader programs",
        params,
        1,
        tuple(providers),
        check,
        batch,
        "images",
        family="procedural",
    )


def _leaves(side: int, batch: int, settings: Settings) -> Case:
    def ours() -> Work:
        index = torch.arange(batch, device=settings.device)
        return lambda turn: render_leaves(index, (side, side), seed=SEED)

    def check(provider: str, result: Any) -> None:
        assert result.shape == (batch, 3, side, side)
        if provider == "kdfast":
            with use_backend("reference"):
                want = render_leaves(torch.arange(min(batch, CHECKED)), (side, side), seed=SEED)
            assert torch.equal(result[:CHECKED].cpu(), want), "the pictures differ"

    written = Traffic("3 bytes a pixel", float(3 * batch * side * side))
    providers = (
        Provider(
            "Pillow",
            lambda: _pillow(side, batch),
            graph=False,
            config="paints the same leaves, its own edges",
        ),
        Provider("kdfast", ours, written, graph=False),
    )
    params = {"side": side, "batch": batch}
    return Case("surrogate", "dead leaves", params, 1, providers, check, batch, "images", family="procedural")


def _pillow(side: int, batch: int) -> Work:
    """Painter's order with a drawing library; its leaves are drawn beforehand, which kdfast does inside."""
    image, draw = peer("PIL.Image"), peer("PIL.ImageDraw")
    tables = leaf_reference.draw(SEED, torch.arange(batch), 0, 5000, side, side).numpy()
    lists = [[_outline(leaf) for leaf in table] for table in tables]

    def work(turn: int) -> Tensor:
        pictures = []
        for outlines in lists:
            picture, covered = image.new("RGB", (side, side)), image.new("1", (side, side))
            paint, cover = draw.Draw(picture), draw.Draw(covered)
            for number, (method, corners, colour) in enumerate(outlines):
                getattr(paint, method)(corners, fill=colour)
                getattr(cover, method)(corners, fill=1)
                if (
                    number % 64 == 63 and covered.getextrema()[0]
                ):  # a look at every leaf would cost more than the leaf
                    break
            pictures.append(np.asarray(picture))
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)

    return work


def _outline(leaf: Any) -> tuple[str, Any, tuple[int, int, int]]:
    """How Pillow draws a leaf: the method, where, and the colour."""
    x, y, square = leaf[:3]
    radius, rgb = float(np.sqrt(square)), int(leaf[15])
    colour = rgb >> 16, rgb >> 8 & 255, rgb & 255
    sides = [(a, b, c) for a, b, c in leaf[3:15].reshape(4, 3) if a or b]
    if not sides:
        return "ellipse", [x - radius, y - radius, x + radius, y + radius], colour
    corners = []
    for (a, b, c), (d, e, f) in zip(sides, [*sides[1:], sides[0]], strict=True):
        over = a * e - b * d
        corners.append((float(x + (b * f - c * e) / over), float(y + (c * d - a * f) / over)))
    return "polygon", corners, colour

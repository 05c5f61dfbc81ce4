"""What the compiler makes of every family's kernels, for every GPU audited: a table, and what must hold of it.

    python -m bench.audit_table [--target sm_90] [--out FILE]

No GPU takes part: launchers run on meta tensors and their launches are compiled (bench/static_audit.py). Instruction
counts are of straight-line code: they compare variants of one kernel; loops and rare branches count once, and what an
element has leaves out the sum that the last program makes (not on AMD's GPUs).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.audit_feature import batch_norm, noised
from bench.audit_rows import Variant, faults, table
from bench.static_audit import TARGETS, audit, meta
from kdfast.kernels import denoise, dist, feature, images, kl, norm, pair, procedural, replay, topk
from kdfast.reference.replay import Meta, SumLayout

#: Temperature and divisor; no weights, no mask.
SCALE = kl.Scale(4.0, 8.0, None, None)
#: The loss alone, and no row of it.
TOTAL = kl.Wanted(False, True)


def _kl(
    shape: tuple[int, ...], dtype: torch.dtype, dim: int = -1, *, both: bool = False
) -> Callable[[], object]:
    def call() -> object:
        student, teacher = meta(*shape, dtype=dtype), meta(*shape, dtype=dtype)
        gradients = torch.empty_like(student), torch.empty_like(teacher) if both else None
        return kl.PLAIN((student, teacher), gradients, dim % len(shape), SCALE, TOTAL)

    return call


def _pair(kind: int, shape: tuple[int, int], dtype: torch.dtype) -> Callable[[], object]:
    def call() -> object:
        student, teacher = meta(*shape, dtype=dtype), meta(*shape, dtype=dtype)
        target = meta(shape[0], dtype=torch.int64) if kind == pair.DKD else None
        own = pair.pair_arguments(kind, target, 1.0, 0.5)
        return pair.PAIR((student, teacher), (torch.empty_like(student), None), 1, SCALE, TOTAL, None, *own)

    return call


def _step(dtype: torch.dtype, *, guided: bool, noise: bool = False, seeds: int = 1) -> Callable[[], object]:
    def call() -> object:
        shape = (64, 4, 32, 32)
        sample = meta(*shape, dtype=dtype)
        output = meta(2 * shape[0] if guided else shape[0], 2 * shape[1], *shape[2:], dtype=dtype)
        table, seed = meta(50, 10), meta(seeds, dtype=torch.int64)
        return denoise.denoise_step(
            sample,
            output,
            table,
            meta(1, dtype=torch.int64),
            dtype=dtype,
            guidance=(4.0, True, None) if guided else denoise.NO_GUIDANCE,
            seed=seed if noise else None,
        )

    return call


@dataclass(frozen=True)
class _Buffer:
    """A replay buffer's memory, three levels deep."""

    capacity: int = 1 << 20
    row: tuple[int, ...] = (3, 32, 32)

    def tensors(self) -> dict[str, torch.Tensor]:
        words = SumLayout.of(self.capacity).words
        return {
            "meta": meta(len(Meta), dtype=torch.int64),
            "leaves": meta(self.capacity, dtype=torch.int32),
            "sums": meta(words, dtype=torch.int64),
            "delta": meta(self.capacity),
            "generation": meta(self.capacity, dtype=torch.int32),
            "labels": meta(self.capacity, dtype=torch.int32),
            "order": meta(self.capacity, dtype=torch.int32),
            "rows": meta(self.capacity, *self.row, dtype=torch.uint8),
        }

    @property
    def layout(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        found = SumLayout.of(self.capacity)
        return found.offsets, found.counts

    def sample(self) -> object:
        t = self.tensors()
        names = ("meta", "leaves", "sums", "generation", "labels", "rows")
        return replay.sample(*(t[name] for name in names), self.layout, 256, 0.4, True, None)

    def update(self) -> object:
        t = self.tensors()
        names = ("meta", "leaves", "sums", "delta", "generation")
        index, priority = meta(256, dtype=torch.int64), meta(256)
        return replay.update(
            *(t[name] for name in names), self.layout, index, priority, index, (0.6, 1e-6, 4e6), False
        )

    def add(self) -> object:
        t = self.tensors()
        names = ("meta", "leaves", "sums", "delta", "generation", "labels")
        counts, samples = meta(10, dtype=torch.int64), meta(256, *self.row, dtype=torch.uint8)
        labels = meta(256, dtype=torch.int64)
        return replay.add(
            *(t[name] for name in names),
            counts,
            t["order"],
            t["rows"],
            self.layout,
            samples,
            labels,
            meta(256),
            (0.6, 1e-6, 4e6),
        )

    def rebuild(self) -> object:
        t = self.tensors()
        return replay.rebuild(t["leaves"], t["sums"], self.layout)


def _topk(num_classes: int, dtype: torch.dtype) -> Callable[[], object]:
    def call() -> object:
        student, index = meta(4096, num_classes, dtype=dtype), meta(4096, 50, dtype=torch.int64)
        own = topk.topk_arguments(student, index, meta(4096, 50), meta(4096), True)
        return topk.TOPK(
            (student,), (torch.empty_like(student),), 1, SCALE, kl.Wanted(True, True), None, *own
        )

    return call


def _dist(shape: tuple[int, int], dtype: torch.dtype) -> Callable[[], object]:
    def call() -> object:
        student, teacher = meta(*shape, dtype=dtype), meta(*shape, dtype=dtype)
        return dist.run(student, teacher, 1.0, 1.0, SCALE, (torch.empty_like(student), None))

    return call


def _noise_mix(dtype: torch.dtype) -> Callable[[], object]:
    def call() -> object:
        x = meta(64, 256, 8, 8, dtype=dtype)
        return feature.noise_mix(x, meta(64), torch.empty_like(x), meta(1, dtype=torch.int64))

    return call


def _crop_flip(
    source: torch.dtype, dtype: torch.dtype, *, nhwc: bool = False, gradient: bool = False
) -> Callable[[], object]:
    def call() -> object:
        x, y = meta(256, 3, 32, 32, dtype=source), meta(256, 3, 32, 32, dtype=dtype)
        layout = torch.channels_last if nhwc else torch.contiguous_format
        offsets, flips = meta(256, 2, dtype=torch.int32), meta(256, dtype=torch.bool)
        bias = None if gradient else meta(3)
        y = y.to(memory_format=layout)
        return images.crop_flip(x, y, offsets, flips, meta(3), bias, 4, transposed=gradient)

    return call


def _statistics(
    shape: tuple[int, ...], dtype: torch.dtype, *, nhwc: bool = False, gradient: bool = False
) -> Callable[[], object]:
    def call() -> object:
        layout = torch.channels_last if nhwc else torch.contiguous_format
        x, channels = meta(*shape, dtype=dtype).to(memory_format=layout), meta(shape[1])
        if gradient:
            stats, upstream = meta(4, shape[1]), meta(1)
            return norm.statistics_loss.bn_statistics_backward(x, stats, upstream, x, torch.empty_like(x))
        average = (channels, channels, meta(1))
        return norm.statistics_loss.bn_statistics(x, channels, channels, *average, squared=False)

    return call


def _shaders(antialias: int) -> Callable[[], object]:
    codes, numbers, time = meta(4096, 32, dtype=torch.int32), meta(4096, 32, 16), meta(256)
    which = meta(256, dtype=torch.int64)
    return lambda: procedural.shaders.render(
        codes, numbers, numbers, which, time, 224, 224, antialias, torch.uint8
    )


def _leaves() -> object:
    return procedural.leaves.render(meta(256, dtype=torch.int64), *meta(2, 200), 1 << 40, 224, 224, 5000)


bf16, fp32 = torch.bfloat16, torch.float32
_REPLAY = _Buffer()
#: A thousand rows and more, so that sizes specialise as they do in training.
VARIANTS = (
    Variant("kl: KL 1000 bf16", _kl((4096, 1000), bf16), 6, 16, 16, fast=True),
    Variant("kl: KL 1000 bf16, both gradients", _kl((4096, 1000), bf16, both=True), 8, 16, 16),
    Variant("kl: KL 1000 fp32", _kl((4096, 1000), fp32), 12, 16, 16),
    Variant("kl: KL 100 fp32", _kl((4096, 100), fp32), 12, 16, 16),
    Variant("kl: KL 10 fp32", _kl((4096, 10), fp32), 12, 8, 8),
    Variant("kl: KL 8192 bf16", _kl((4096, 8192), bf16), 6, 16, 16),
    Variant("kl: KL 16384 bf16", _kl((4096, 16384), bf16), 6, 16, 16),
    Variant("kl: KL 32000 bf16", _kl((4096, 32000), bf16), None, 16, 16),
    Variant("kl: KL 19 classes of 256x512 bf16", _kl((8, 19, 256, 512), bf16, 1), 6, 4, 4),
    Variant("kl: KL 150 classes of 128x128 fp32", _kl((4, 150, 128, 128), fp32, 1), 12, 4, 4),
    Variant("pair: JSD 1000 bf16", _pair(pair.JSD, (4096, 1000), bf16), 6, 16, 16, fast=True),
    Variant("pair: DKD 1000 bf16", _pair(pair.DKD, (4096, 1000), bf16), 6, 16, 16),
    Variant("pair: DKD 100 fp32", _pair(pair.DKD, (4096, 100), fp32), 12, 16, 16),
    Variant("denoise: step bf16", _step(bf16, guided=False), 6, 16, 16),
    Variant("denoise: guided step bf16", _step(bf16, guided=True), 8, 16, 16, fast=True),
    Variant("denoise: guided step fp32", _step(fp32, guided=True), 16, 16, 16),
    Variant(
        "denoise: guided step fp32, a seed for each row",
        _step(fp32, guided=True, noise=True, seeds=64),
        16,
        16,
        16,
    ),
    Variant(
        "denoise: guided step fp32, noise in the kernel", _step(fp32, guided=True, noise=True), 16, 16, 16
    ),
    Variant("topk: 50 of 32000 bf16", _topk(32000, bf16), None, 16, 16, fast=True),
    # Its row statistics are stored as single floats: no width to demand of all of its launches.
    Variant("dist: 256x1000 bf16", _dist((256, 1000), bf16), fast=True),
    Variant("feature: noise_mix bf16", _noise_mix(bf16), 4, 16, 16, fast=True),
    Variant("feature: noise_mix fp32", _noise_mix(fp32), 8, 16, 16),
    # The embedding's gradient reads 49 values a channel, whose rows begin anywhere.
    Variant("feature: noising, error in ε, embedding gradient bf16", noised(bf16)),
    Variant(
        "feature: noising, error in ε, embedding gradient bf16, channels_last",
        noised(bf16, channels_last=True),
    ),
    # Statistics store one float a channel, or two neighbours'.
    Variant("norm: BN + ReLU + residual bf16", batch_norm("act", bf16), None, 16, 4, fast=True),
    Variant(
        "norm: BN + ReLU + residual bf16, channels_last",
        batch_norm("act", bf16, channels_last=True),
        None,
        16,
        4,
    ),
    Variant("norm: BN + ReLU + residual fp32", batch_norm("act", fp32), None, 16, 4),
    Variant("norm: BN + squared error bf16", batch_norm("mse", bf16), None, 16, 4),
    Variant(
        "norm: BN + squared error bf16, channels_last",
        batch_norm("mse", bf16, channels_last=True),
        None,
        16,
        4,
    ),
    Variant("norm: BN statistics 512x4x4 fp32", _statistics((256, 512, 4, 4), fp32), 4, 16),
    Variant(
        "norm: BN statistics 512x4x4 fp32, gradient",
        _statistics((256, 512, 4, 4), fp32, gradient=True),
        12,
        16,
        16,
    ),
    Variant("norm: BN statistics 64x32x32 bf16", _statistics((256, 64, 32, 32), bf16), 2, 16),
    Variant(
        "norm: BN statistics 64x32x32 bf16, gradient",
        _statistics((256, 64, 32, 32), bf16, gradient=True),
        6,
        16,
        16,
    ),
    Variant("norm: BN statistics 2048x7x7 bf16", _statistics((256, 2048, 7, 7), bf16), 2, 16),
    Variant(
        "norm: BN statistics 2048x7x7 bf16, gradient",
        _statistics((256, 2048, 7, 7), bf16, gradient=True),
        6,
        16,
        16,
    ),
    Variant("norm: BN statistics 64x32x32 bf16 NHWC", _statistics((256, 64, 32, 32), bf16, nhwc=True), 2, 16),
    Variant(
        "norm: BN statistics 64x32x32 bf16 NHWC, gradient",
        _statistics((256, 64, 32, 32), bf16, nhwc=True, gradient=True),
        6,
        16,
        16,
    ),
    # Reads are shifted by the crop, each sample's by its own: one element at a time.
    Variant("images: crop and flip uint8 to bf16", _crop_flip(torch.uint8, bf16), 3, 1, 16, fast=True),
    Variant("images: crop and flip uint8 to bf16 NHWC", _crop_flip(torch.uint8, bf16, nhwc=True), 3, 1, 16),
    Variant("images: crop and flip fp32", _crop_flip(fp32, fp32), 8, 4, 16),
    Variant("images: gradient of crop and flip fp32", _crop_flip(fp32, fp32, gradient=True), 8, 4, 16),
    Variant("procedural: leaves 224x224", _leaves, fast=True),
    Variant("procedural: shaders 224x224", _shaders(1), 3, 4, 4, fast=True),
    Variant(
        "procedural: shaders 224x224, 4 samples", _shaders(2), 3, 4, 4, spills=18
    ),  # sm_100; of 5600 instructions
    Variant("replay: sample 256 of 1M", _REPLAY.sample),
    Variant("replay: update 256 of 1M", _REPLAY.update, fast=True),
    Variant("replay: add 256 to 1M", _REPLAY.add),
    Variant("replay: rebuild 1M", _REPLAY.rebuild),
)


def target(text: str) -> int | str:
    """``90`` and ``sm_90`` alike."""
    number = text.removeprefix("sm_")
    return int(number) if number.isdecimal() else text


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.audit_table", description=__doc__)
    parser.add_argument("--target", type=target, action="append", choices=TARGETS, help="default: all")
    parser.add_argument(
        "--fast", action="store_true", help="one variant of each family, as in the documentation"
    )
    parser.add_argument("--only", default="", help="variants whose name contains this")
    parser.add_argument(
        "--out", type=Path, help="file for the table, or a page that ends with one; default: standard output"
    )
    given = parser.parse_args()
    rows = []
    for variant in VARIANTS:
        if given.only in variant.name and (variant.fast or not given.fast):
            for name in given.target or TARGETS:
                rows += [(variant, report) for report in audit(variant.call, name)]
    text = table(rows)
    if given.out:
        # A page keeps what it says above its table.
        above = given.out.read_text().partition(text[:20])[0] if given.out.is_file() else ""
        given.out.write_text(above + text)
    else:
        print(text, end="")
    wrong = [fault for variant, report in rows for fault in faults(variant, report)]
    print("\n".join(wrong), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

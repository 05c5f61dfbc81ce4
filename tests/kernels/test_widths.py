"""Tensors of 2³¹ elements and more, whatever their layout: no kernel computes an address in too few bits.

The launches are followed in their IR, from sizes and program numbers to addresses (tests/support/widths.py); the
tensors have no memory. Every family's launchers are here, their large tensor contiguous, with channels last, or with
classes far apart.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing is compiled in the interpreter", allow_module_level=True)

import triton
import triton.language as tl

from kdfast.kernels import denoise, dist, feature, images, kl, norm, pair, procedural, replay, topk
from kdfast.kernels import launch as launching
from kdfast.kernels.feature import noise
from kdfast.kernels.machine import use_machine
from kdfast.kernels.norm import launch as norm_launch
from kdfast.reference.norm.fused import BatchNorm
from kdfast.reference.replay import Meta, SumLayout
from tests.support.widths import faults_of, follow, meta

F32, INT64 = torch.float32, torch.int64
SCALE, WANTED = kl.Scale(4.0, 8.0, None, None), kl.Wanted(True, True)

#: Logits whose class dimension is not the last, by what the plan makes of them; rows of a transposed matrix, too.
ACROSS = {
    "tile": ((1, 847, 1600, 1600), 1),
    "one row": ((1, 2000, 1100, 1000), 1),
    "few": ((1, 19, 11_000, 11_000), 1),
    "pixels": ((1, 150, 4000, 4000), 1),
    "long": ((1, 20_000, 400, 400), 1),
}


def logits(name: str) -> tuple[torch.Tensor, int]:
    if name == "transposed":
        return meta(70_000, 32_000).t(), 1
    if name == "few rows":
        return meta(32_000, 70_000).t()[:3], 1
    if name == "last":
        return meta(2**21, 1024), 1
    if name == "last, anywhere":
        return meta(2**21 + 1, 1027), 1
    shape, dim = ACROSS[name]
    return meta(*shape), dim


LAYOUTS = (*ACROSS, "transposed", "few rows", "last", "last, anywhere")


#: Triton 3.6 orders tiles in its own way; an A100 has no clusters.
PLANNED = [*((layout, "90:132:3.6") for layout in LAYOUTS), ("tile", "90:132"), ("transposed", "90:132")]


@pytest.mark.parametrize(("layout", "machine"), PLANNED)
@pytest.mark.parametrize("riding", ["plain", "labels"])
def test_kl(layout: str, machine: str, riding: str) -> None:
    student, dim = logits(layout)
    rows = (student.numel() // student.shape[dim],)
    label, factor = meta(*rows, dtype=INT64), meta(*rows, dtype=F32)

    def call() -> None:
        both = torch.empty_like(student), torch.empty_like(student)
        if riding == "labels":
            labels = (label, factor, label, factor, 0.1, 0.0)
            kl.LABELS((student, student), both, dim, SCALE, WANTED, None, labels, (2, None, False))
        else:
            kl.PLAIN((student, student), both, dim, SCALE, WANTED)

    with use_machine(machine):
        found = faults_of(call, int(machine[:2]))
    assert found == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gradient_alone_may_lie_across(layout: str) -> None:
    student, dim = logits(layout)
    dense = torch.empty(student.shape, dtype=student.dtype, device="meta").movedim(dim, -1).contiguous()
    dense = dense.movedim(-1, dim)
    across, _ = logits(layout)
    assert faults_of(lambda: kl.PLAIN((dense, dense), (across, None), dim, SCALE, WANTED)) == []


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", [pair.JSD, pair.DKD])
def test_pair(layout: str, kind: int) -> None:
    student, dim = logits(layout)
    target = meta(student.numel() // student.shape[dim], dtype=INT64) if kind == pair.DKD else None

    def call() -> object:
        both, own = (torch.empty_like(student),) * 2, pair.pair_arguments(kind, target, 1.0, 0.5)
        return pair.PAIR((student, student), both, dim, SCALE, WANTED, None, *own)

    assert faults_of(call) == []


@pytest.mark.parametrize("layout", ["transposed", "few rows", "last", "many rows"])
def test_dist_and_topk(layout: str) -> None:
    student = meta(2**30 + 2, 4) if layout == "many rows" else logits(layout)[0]
    rows = student.shape[0]
    kept = meta(rows, 3, dtype=INT64), meta(rows, 3), meta(rows, dtype=F32)

    def call() -> None:
        grad = torch.empty_like(student)
        dist.run(student, student, 1.0, 1.0, SCALE, (grad, grad))
        topk.TOPK((student,), (grad,), 1, SCALE, WANTED, None, *topk.topk_arguments(student, *kept, True))

    assert faults_of(call) == []


def test_more_rows_than_a_launch_has_programs_are_refused() -> None:
    student = meta(2**31, 2)
    with pytest.raises(ValueError, match="rows: got 2147483648; accepted: fewer than 2147418112"):
        kl.PLAIN((student, student), (None, None), 1, SCALE, WANTED)


#: [B, C, H, W] of 2³¹ elements: in many samples, in one, in one of few channels, in short planes.
IMAGES = {
    "samples": (70_000, 32, 32, 32),
    "one sample": (1, 64, 6000, 6000),
    "one channel": (1, 1, 50_000, 50_000),
    "unaligned": (22_000, 2048, 7, 7),
    "channels": (2, 2**24, 9, 9),
}


def images_of(name: str, last: bool, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty(IMAGES[name], dtype=dtype, device="meta").to(memory_format=layout)


in_layouts = pytest.mark.parametrize("last", [False, True], ids=["NCHW", "NHWC"])
of_shapes = pytest.mark.parametrize("name", IMAGES)


@of_shapes
@in_layouts
def test_batch_norm(name: str, last: bool) -> None:
    x = images_of(name, last)
    found, channels = norm.matrix(x), x.shape[1]
    assert found is not None
    c = [meta(channels, dtype=F32) for _ in range(8)]
    held = BatchNorm(*c[:4], meta(1, dtype=INT64), True, 0.1, 1e-5)
    centre, sums = (c[4], c[5]), meta(2 * channels, dtype=F32)
    kind: dict[str, Any] = {"relu": True, "scale": 1.0, "carry": 1.0}
    grads = {"grad_x": x, "grad_weight": c[6], "grad_bias": c[7]}

    def call() -> None:
        norm_launch.statistics(x, found, held, mean=c[4], rstd=c[5], target=x, sums=sums)
        norm_launch.act(x, x, x, found, held, centre, **kind)
        norm_launch.act_backward(x, x, x, found, held, centre, grad_residual=x, **grads, **kind)
        norm_launch.mse(x, x, found, held, centre, (x, c[6], c[7]), sums=sums, loss=meta(1, dtype=F32))

    assert faults_of(call) == []


@of_shapes
@in_layouts
def test_distance_of_statistics(name: str, last: bool) -> None:
    x = images_of(name, last)
    c = meta(x.shape[1], dtype=F32)

    def call() -> None:
        norm.statistics_loss.bn_statistics(x, c, c, c, c, meta(1, dtype=F32), squared=False)
        stats, one = meta(4, x.shape[1], dtype=F32), meta(1, dtype=F32)
        norm.statistics_loss.bn_statistics_backward(x, stats, one, x, torch.empty_like(x))

    assert faults_of(call) == []


@of_shapes
@in_layouts
def test_features(name: str, last: bool) -> None:
    x, found = noise.laid_out(images_of(name, last))
    seed = meta(1, dtype=INT64)
    batch, channels = x.shape[:2]
    timesteps, table = meta(batch, dtype=INT64), meta(1000, dtype=F32)

    def call() -> None:
        feature.noise_mix(x, meta(batch, dtype=F32), torch.empty_like(x), seed)
        feature.noise_mix_backward(x, x, meta(batch, dtype=F32), seed, grad_x=x, want_gamma=True)
        noise.noise_mse(x, seed, loss=meta(1, dtype=F32), grad=torch.empty_like(x))
        embedding = meta(1280, channels, dtype=F32)
        noise.add_noise_embed(x, found, timesteps, table, embedding, x, seed)
        noise.embedding_gradient(x, found, timesteps, embedding)

    assert faults_of(call) == []


@of_shapes
def test_branches(name: str) -> None:
    x = images_of(name, False)
    branches = torch.empty(3, *x.shape, dtype=x.dtype, device="meta")
    u = meta(3, dtype=F32)

    def call() -> None:
        given = {"noise_scale": u, "seed": meta(1, dtype=INT64), "loss": meta(1, dtype=F32), "mean": x}
        feature.reparam_middle(branches, x, u, u, meta(3, dtype=INT64), grad=branches, **given)

    assert faults_of(call) == []


@of_shapes
@in_layouts
@pytest.mark.parametrize("doubled", [False, True])
def test_denoising(name: str, last: bool, doubled: bool) -> None:
    x = images_of(name, last)
    layout = torch.channels_last if last else torch.contiguous_format
    batch, channels, height, width = x.shape
    half = batch // 2 if doubled else batch
    if doubled and batch == 1:
        return
    output = meta(2 * half, 2 * channels, height, width).to(memory_format=layout)
    guidance = (4.0, True, 1)

    def call() -> None:
        denoise.denoise_step(
            x,
            output,
            meta(50, 10, dtype=F32),
            meta(1, dtype=INT64),
            dtype=x.dtype,
            guidance=guidance,
            history=(x,),
            seed=meta(batch, dtype=INT64),
            learned_variance=True,
            clip=1.0,
            want_x0=True,
            want_mask=True,
            next_dtype=x.dtype,
            next_copies=2,
        )
        if not doubled:
            order = (0, 2, 3, 1) if last else (0, 1, 2, 3)
            grads = {"grad_sample": torch.empty_like(x), "grad_output": output}
            one = meta(1, dtype=INT64)
            denoise.denoise_step_backward(
                x, x, meta(50, 10, dtype=F32), one, order=order, guidance=guidance, **grads
            )

    assert faults_of(call) == []


@pytest.mark.parametrize("shape", [(800_000, 3, 32, 32), (1, 3, 30_000, 30_000)])
@in_layouts
@pytest.mark.parametrize("transposed", [False, True])
def test_crops(shape: tuple[int, ...], last: bool, transposed: bool) -> None:
    layout = torch.channels_last if last else torch.contiguous_format
    x = torch.empty(shape, dtype=torch.uint8, device="meta").to(memory_format=layout)
    y = torch.empty(shape, dtype=torch.bfloat16, device="meta").to(memory_format=layout)
    offsets, flips = meta(shape[0], 2, dtype=INT64), meta(shape[0], dtype=torch.bool)
    channel = meta(3, dtype=F32)
    assert (
        faults_of(lambda: images.crop_flip(x, y, offsets, flips, channel, channel, 4, transposed=transposed))
        == []
    )


@pytest.mark.parametrize("side", [224, 30_000])
def test_drawings(side: int) -> None:
    batch = 2**16 if side == 224 else 2

    def call() -> None:
        codes, numbers = meta(4096, 32, dtype=torch.int32), meta(4096, 32, 16, dtype=F32)
        which, time = meta(batch, dtype=INT64), meta(batch, dtype=F32)
        procedural.shaders.render(codes, numbers, numbers, which, time, side, side, 2, torch.uint8)
        law = meta(200, dtype=F32)
        procedural.leaves.render(which, law, law, 1, side, side, 5000)

    assert faults_of(call) == []


def test_a_table_of_any_length_is_one_kernel() -> None:
    """The longest program of a table is another one each time: it may not be a constant of the compiler's."""
    which, time = meta(4, dtype=INT64), meta(4, dtype=F32)

    def ir(length: int) -> str:
        codes, numbers = meta(64, length, dtype=torch.int32), meta(64, length, 16, dtype=F32)
        (trace,) = follow(
            lambda: procedural.shaders.render(codes, numbers, numbers, which, time, 32, 32, 1, torch.uint8)
        )
        return trace.text

    assert len({ir(length) for length in (1, 25, 28, 32)}) == 1


@pytest.mark.parametrize("row", [(3, 64, 64), (3, 20_000, 20_000)])
def test_replay(row: tuple[int, ...]) -> None:
    capacity, batch = (2**18, 2**18) if row[1] < 100 else (8, 4)
    layout = SumLayout.of(capacity)
    where = layout.offsets, layout.counts
    counters, leaves = meta(len(Meta), dtype=INT64), meta(capacity, dtype=torch.int32)
    sums, delta = meta(layout.words, dtype=INT64), meta(capacity, dtype=F32)
    rows, samples = (torch.empty(n, *row, dtype=torch.uint8, device="meta") for n in (capacity, batch))
    index, priority = meta(batch, dtype=INT64), meta(batch, dtype=F32)
    rule, counts = (0.6, 1e-6, 4e6), meta(10, dtype=INT64)

    def call() -> None:
        state = counters, leaves, sums
        replay.sample(*state, leaves, leaves, rows, where, batch, 0.4, True, None)
        replay.sample(*state, leaves, leaves, rows, where, batch, 0.4, True, (meta(3), meta(3)))
        replay.update(*state, delta, leaves, where, index, priority, index, rule, False)
        replay.add(*state, delta, leaves, leaves, counts, leaves, rows, where, samples, index, priority, rule)

    assert faults_of(call) == []


@triton.jit
def _narrow(x, stride, n, WIDE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if WIDE:
        row = row.to(tl.int64)
    tl.store(x + row * stride, 0.0, mask=row < n)


@pytest.mark.parametrize(
    ("rows", "wide", "wraps"), [(2**20, False, False), (2**22, False, True), (2**22, True, False)]
)
def test_what_wraps_is_found(rows: int, wide: bool, wraps: bool) -> None:
    x = meta(rows, 1000, dtype=F32)
    grid = (triton.cdiv(rows, 64),)
    found = faults_of(lambda: launching.launch(_narrow, grid, x, 1000, rows, WIDE=wide, BLOCK=64))
    assert [("arith.muli" in fault, "in 32 bits" in fault) for fault in found] == [(True, True)] * wraps


@triton.jit
def _left_over(x, n, N: tl.constexpr):  # type: ignore[no-untyped-def]
    number = tl.program_id(0)
    tl.store(x + (number - number // N * n) * 2**26, 0.0)


@pytest.mark.parametrize("n", [30, 31])
def test_what_a_division_leaves_is_less_than_its_divisor(n: int) -> None:
    found = faults_of(lambda: launching.launch(_left_over, (2**20,), meta(64), n, N=31))
    assert bool(found) == (n != 31)


def test_a_grid_that_cuda_refuses_is_found() -> None:
    x = meta(64, 1000, dtype=F32)
    found = faults_of(lambda: launching.launch(_narrow, (1, 65_536), x, 1000, 64, WIDE=False, BLOCK=64))
    assert found == ["grid (1, 65536): CUDA allows (2147483647, 65535, 65535)"]

"""Bodies of the feature kernels; equations, traffic and launch plans: feature.py."""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.across import locate_across, normal_across
from ..common.normal import normal_at, normal_run
from ..common.reduce import reduce_last
from ..common.walk import locate, offset_of


@triton.jit
def key_of(seed, FROM_MEMORY: tl.constexpr):
    """The Philox key: a launch argument, or read on the device so that a replayed graph sees its value."""
    if FROM_MEMORY:
        return tl.load(seed).to(tl.uint64)
    else:
        return seed.to(tl.uint64)


@triton.jit
def place(
    numel, inner,
    SIZES: tl.constexpr, NDIM: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """This program's block: live lanes, where it begins along coordinates 0 and 1, its coordinates."""
    if TILE is None:
        _, live, column, c0, c1, c2, c3, c4, c5 = locate(numel, inner, SIZES, NDIM, ROWS, WIDE, BLOCK)
        return live, column, c1, c0, c1, c2, c3, c4, c5
    else:
        return locate_across(SIZES, NDIM, WIDE, TILE, BLOCK)


@triton.jit
def normals(
    key, step, base, first0, first1, c0, c1, c2, c3, c4, c5,
    E: tl.constexpr, NDIM: tl.constexpr, RUN: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The normals of this block's elements, numbered row-major from ``base`` on whatever the layout."""
    if RUN:
        return normal_run(key, step, base + offset_of(first0, first1, c2, c3, c4, c5, E, NDIM), BLOCK)
    elif TILE is not None:
        return normal_across(
            key, step, base + offset_of(first0, first1, c2, c3, c4, c5, E, NDIM), TILE, BLOCK
        )
    else:
        return normal_at(key, step, base + offset_of(c0, c1, c2, c3, c4, c5, E, NDIM))


@triton.jit
def _is_permutation(pi_ptr, M: tl.constexpr):
    """Whether each branch is there once: else the result is NaN, since refusing would mean waiting for the device."""
    seen = tl.full([], 0, tl.int64)
    one = tl.full([], 1, tl.int64)
    for k in tl.static_range(M):
        j = tl.load(pi_ptr + k)
        seen = seen | tl.where((j >= 0) & (j < M), one << (j & 63), 0)
    return seen == (-1 if M == 64 else (1 << M) - 1)


@triton.jit
def _branch(pi_ptr, k, valid):
    """Which branch step ``k`` takes; any order, of all of them, where the permutation is none."""
    return tl.where(valid, tl.load(pi_ptr + k), k)


@triton.jit(do_not_specialize=["seed", "inverse_n"])
def reparam_middle_kernel(
    s_ptr, x0_ptr, mean_ptr, grad_ptr, grad_mean_ptr, upstream_ptr,
    loss_ptr, partial_ptr, counter_ptr, u_ptr, v_ptr, w_ptr, pi_ptr,
    seed, numel, inner, s_branch, grad_branch, inverse_n,
    M: tl.constexpr, S: tl.constexpr, X0: tl.constexpr, MEAN: tl.constexpr, GRAD: tl.constexpr,
    GMEAN: tl.constexpr, E: tl.constexpr,
    SIZES: tl.constexpr, NDIM: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
    HAS_NOISE: tl.constexpr, NOISE_RUN: tl.constexpr, TILE: tl.constexpr, SEED_ON_DEVICE: tl.constexpr,
    CARRY: tl.constexpr, EARLY_EXIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The recursion of every element in registers: loss, mean of the branches, gradient of each branch."""
    factor = 2.0 * inverse_n
    if upstream_ptr is not None:
        upstream = tl.load(upstream_ptr).to(tl.float32)
        if EARLY_EXIT:
            if upstream == 1.0:
                return
        factor *= upstream
    live, f0, f1, c0, c1, c2, c3, c4, c5 = place(numel, inner, SIZES, NDIM, ROWS, WIDE, TILE, BLOCK)
    x0 = tl.load(x0_ptr + offset_of(c0, c1, c2, c3, c4, c5, X0, NDIM), mask=live, other=0).to(tl.float32)
    at_s = offset_of(c0, c1, c2, c3, c4, c5, S, NDIM)
    valid = _is_permutation(pi_ptr, M)
    total = x0 * 0.0
    mean = x0 * 0.0
    behind = x0 * 0.0  # P_{k-1} - X_{k-1}
    residuals = ()
    for k in tl.static_range(M):
        j = _branch(pi_ptr, k, valid)
        s = tl.load(s_ptr + j * s_branch + at_s, mask=live, other=0).to(tl.float32)
        s = tl.where(valid, s, float("nan"))
        mean += s
        r = tl.load(u_ptr + k) * behind + tl.load(v_ptr + k) * tl.where(live, s - x0, 0.0)
        total += r * r
        residuals = residuals + (r,)  # noqa: RUF005 (the compiler knows + on tuples, not unpacking)
        behind = r
        if HAS_NOISE:
            if k < M - 1:
                key = key_of(seed, SEED_ON_DEVICE)
                step = tl.full([], k, tl.int64)
                z = normals(key, step, 0, f0, f1, c0, c1, c2, c3, c4, c5, E, NDIM, NOISE_RUN, TILE, BLOCK)
                behind = r - tl.load(w_ptr + k) * tl.where(live, z, 0.0)

    if mean_ptr is not None:
        at_mean = offset_of(c0, c1, c2, c3, c4, c5, MEAN, NDIM)
        tl.store(mean_ptr + at_mean, (mean * (1.0 / M)).to(mean_ptr.dtype.element_ty), mask=live)
    if grad_ptr is not None:
        from_mean = x0 * 0.0
        if grad_mean_ptr is not None:
            at_gmean = offset_of(c0, c1, c2, c3, c4, c5, GMEAN, NDIM)
            from_mean = tl.load(grad_mean_ptr + at_gmean, mask=live, other=0).to(tl.float32) * (1.0 / M)
        at_grad = offset_of(c0, c1, c2, c3, c4, c5, GRAD, NDIM)
        a = x0 * 0.0
        for back in tl.static_range(M):
            # k = M - 1 - back, written out: a constexpr cannot be assigned twice.
            if CARRY:
                if back > 0:
                    a = tl.load(u_ptr + M - back) * a
                a += factor * residuals[M - 1 - back]
            else:
                a = factor * residuals[M - 1 - back]
            j = _branch(pi_ptr, M - 1 - back, valid)
            g = tl.load(v_ptr + M - 1 - back) * a + from_mean
            tl.store(grad_ptr + j * grad_branch + at_grad, g.to(grad_ptr.dtype.element_ty), mask=live)
    if loss_ptr is not None:
        reduce_last(tl.sum(total) * inverse_n, loss_ptr, partial_ptr, counter_ptr, 1024)


@triton.jit(do_not_specialize=["seed", "batch"])
def noise_mix_kernel(
    x_ptr, gamma_ptr, z_ptr, seed, batch, numel, inner, x_sample, z_sample,
    X: tl.constexpr, Z: tl.constexpr, E: tl.constexpr,
    SIZES: tl.constexpr, NDIM: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
    NOISE_RUN: tl.constexpr, TILE: tl.constexpr, SEED_ON_DEVICE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """z = γ·x + (1-γ)·ε of one block of one sample (of several, when there are more samples than programs)."""
    live, f0, f1, c0, c1, c2, c3, c4, c5 = place(numel, inner, SIZES, NDIM, ROWS, WIDE, TILE, BLOCK)
    key = key_of(seed, SEED_ON_DEVICE)
    step = tl.full([], 0, tl.int64)
    for b in range(tl.program_id(1), batch, tl.num_programs(1)):
        sample = tl.full([], 0, tl.int64) + b
        gamma = tl.load(gamma_ptr + sample).to(tl.float32)
        at_x = sample * x_sample + offset_of(c0, c1, c2, c3, c4, c5, X, NDIM)
        x = tl.load(x_ptr + at_x, mask=live, other=0).to(tl.float32)
        e = normals(
            key, step, sample * numel, f0, f1, c0, c1, c2, c3, c4, c5, E, NDIM, NOISE_RUN, TILE, BLOCK
        )
        z = gamma * x + (1.0 - gamma) * e
        at_z = sample * z_sample + offset_of(c0, c1, c2, c3, c4, c5, Z, NDIM)
        tl.store(z_ptr + at_z, z.to(z_ptr.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["seed", "batch"])
def noise_mix_backward_kernel(
    gz_ptr, x_ptr, gamma_ptr, gx_ptr, partial_ptr, seed, batch, numel, inner, gz_sample, x_sample, gx_sample,
    GZ: tl.constexpr, X: tl.constexpr, GX: tl.constexpr, E: tl.constexpr,
    SIZES: tl.constexpr, NDIM: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
    NOISE_RUN: tl.constexpr, TILE: tl.constexpr, SEED_ON_DEVICE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """gx = γ·gz, and this block's share of dγ = Σ gz·(x - ε), with ε drawn again."""
    live, f0, f1, c0, c1, c2, c3, c4, c5 = place(numel, inner, SIZES, NDIM, ROWS, WIDE, TILE, BLOCK)
    key = key_of(seed, SEED_ON_DEVICE)
    step = tl.full([], 0, tl.int64)
    for b in range(tl.program_id(1), batch, tl.num_programs(1)):
        sample = tl.full([], 0, tl.int64) + b
        at_gz = sample * gz_sample + offset_of(c0, c1, c2, c3, c4, c5, GZ, NDIM)
        gz = tl.load(gz_ptr + at_gz, mask=live, other=0).to(tl.float32)
        if gx_ptr is not None:
            gamma = tl.load(gamma_ptr + sample).to(tl.float32)
            at_gx = sample * gx_sample + offset_of(c0, c1, c2, c3, c4, c5, GX, NDIM)
            tl.store(gx_ptr + at_gx, (gamma * gz).to(gx_ptr.dtype.element_ty), mask=live)
        if partial_ptr is not None:
            at_x = sample * x_sample + offset_of(c0, c1, c2, c3, c4, c5, X, NDIM)
            x = tl.load(x_ptr + at_x, mask=live, other=0).to(tl.float32)
            e = normals(
                key, step, sample * numel, f0, f1, c0, c1, c2, c3, c4, c5, E, NDIM, NOISE_RUN, TILE, BLOCK
            )
            share = tl.sum(tl.where(live, gz * (x - e), 0.0))
            tl.store(partial_ptr + sample * tl.num_programs(0) + tl.program_id(0), share)

"""The normals of kernels/common/normal.py in exact mathematics: the same integers, float64 functions.

On a CPU float32 ones come from csrc/philox_normal.hpp, which does what the kernel does, operation by operation: some
forty times as fast, and within 3e-7 of the others.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from kdfast.reference.native import PLAIN, extension

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def philox(key: int | Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox-4x32-10 (Salmon et al. 2011).

    Args:
        key: 64-bit key, or an int64 tensor of such, which broadcasts against the counter.
        counter: Four int64 tensors holding 32-bit words.

    Returns:
        Four int64 tensors of 32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key & _LOW, (key >> 32) & _LOW
    for _ in range(10):
        # int64 products wrap, but keep all 64 bits; the mask turns the arithmetic shift into a logical one.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & _LOW) ^ c1 ^ k0, p1 & _LOW, ((p0 >> 32) & _LOW) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return c0, c1, c2, c3


def normal(seed: int, step: int, shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """Standard normals keyed by (seed, step, element), element in row-major order of ``shape``.

    Returns:
        float64 tensor of ``shape``.
    """
    return _normal(seed, step, math.prod(shape), torch.device(device)).view(shape)


def normal_rows(seeds: Tensor, step: int, shape: tuple[int, ...]) -> Tensor:
    """As :func:`normal`, with a row of ``shape`` for each of ``seeds`` (int64), on their device.

    Returns:
        float64 ``[len(seeds), *shape]``.
    """
    rows = _normal(seeds.reshape(-1, 1), step, math.prod(shape), seeds.device)
    return rows.reshape(seeds.numel(), *shape)


def noise(
    seed: int | Tensor, step: int, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> Tensor:
    """As :func:`normal`, in ``dtype`` and as fast as the device can.

    Args:
        seed: 64-bit key.
        step: 32-bit step.
        shape: Of the result, whose elements are numbered row-major.
        device: Where the result lies.
        dtype: Of the result; float64 has float64 normals, all others are rounded from float32 ones.
    """
    native = extension()
    # A mode that watches operators (tracing, fake tensors) has to see some.
    plain = dtype != torch.float64 and device.type == "cpu" and _get_current_dispatch_mode() is None
    if native is None or not plain:
        return normal(int(seed), step, shape, device).to(dtype)
    drawn = native.normals(int(seed) & 0xFFFFFFFFFFFFFFFF, step & _LOW, math.prod(shape))
    return torch.from_numpy(drawn).view(shape).to(dtype)


def noised(x: Tensor, scale: Tensor, sigma: Tensor, seed: int | Tensor) -> Tensor:
    """``scale·x + sigma·ε`` of x ``[B, …]`` in the dtype to compute in, a factor a sample, ε of step 0; no gradients.

    Dense float32 on a CPU is drawn and added in one loop.
    """
    native = extension()
    rows = len(x)
    if (
        native is not None
        and all(type(t) in PLAIN for t in (x, scale, sigma))  # fake tensors live on without their mode
        and x.dtype is scale.dtype is sigma.dtype is torch.float32
        and x.device.type == "cpu"
        and x.numel()
        and x.is_contiguous()
        and _get_current_dispatch_mode() is None
        and not torch._C._are_functorch_transforms_active()
    ):
        out = torch.empty_like(x)
        scale, sigma = scale.contiguous(), sigma.contiguous()
        native.noised_rows(
            int(seed) & 0xFFFFFFFFFFFFFFFF,
            0,
            rows,
            x.numel() // rows,
            *(t.data_ptr() for t in (x, scale, sigma, out)),
            torch.get_num_threads(),
        )
        return out
    shape = (rows, *[1] * (x.dim() - 1))
    drawn = noise(seed, 0, tuple(x.shape), x.device, x.dtype)
    return (scale.view(shape) * x).addcmul_(sigma.view(shape), drawn)


def _normal(key: int | Tensor, step: int, count: int, device: torch.device) -> Tensor:
    """``count`` normals under each key."""
    group = torch.arange((count + 3) // 4, dtype=torch.int64, device=device)
    words = philox(
        key, (group & _LOW, group >> 32, torch.full_like(group, step & _LOW), torch.zeros_like(group))
    )
    lanes = []
    for i, k in (words[:2], words[2:]):
        # float32 first, as the kernel does: it rounds a 32-bit integer to 24 bits.
        radius = (-2 * ((i.float() + 0.5).double() * 2.0**-32).log()).clamp(min=0).sqrt()
        angle = k.double() * (2 * math.pi * 2.0**-32)
        lanes += [radius * angle.cos(), radius * angle.sin()]
    return torch.stack(lanes, -1).flatten(-2)[..., :count]

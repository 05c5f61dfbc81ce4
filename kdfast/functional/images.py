"""Random crops, flips and normalisation of a batch, on its device, with the gradient that inversion needs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kdfast.constants import constant
from kdfast.documents import shown
from kdfast.functional._checks import check_real, check_tensor, elsewhere, on_host
from kdfast.ops import images as ops
from kdfast.profiling import annotate

__all__ = ["crop_flip_normalize", "draw_crop_flip"]

#: One number, one a channel, or a tensor of those.
PerChannel = float | Sequence[float] | Tensor

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@annotate("crop_flip_normalize")
def crop_flip_normalize(
    images: Tensor,
    offsets: Tensor,
    flips: Tensor,
    mean: PerChannel = 0.0,
    std: PerChannel = 1.0,
    *,
    padding: int = 4,
    size: int | tuple[int, int] | None = None,
    dtype: torch.dtype | None = None,
    channels_last: bool | None = None,
) -> Tensor:
    r"""Each image padded with zeros, cropped at its own place, flipped or not, and normalised: in one launch.

    .. math:: y_{bcij} = \frac{X_{b,c,\,i + \mathrm{top}_b - p,\;j' + \mathrm{left}_b - p} - \mu_c}{\sigma_c}

    with j' = w − 1 − j where the image is flipped, and X = 0 outside of the image: black, as in torchvision's
    ``RandomCrop(size, padding)`` followed by ``RandomHorizontalFlip`` and ``Normalize``. It draws nothing itself:
    :func:`draw_crop_flip` does. Nothing waits for the device, and calls can be captured in a CUDA graph (after a
    first one outside of it, which puts numbers given as ``mean`` and ``std`` on the device).

    Args:
        images: ``[B, C, H, W]``, any strides. uint8 counts 0 to 255 as 0 to 1; float32, bfloat16, float16 and
            float64 are taken as they are, and get a gradient.
        offsets: int32 or int64 ``[B, 2]``: top and left of each crop in the padded image, from 0 to
            H + 2p − h and W + 2p − w. On a GPU the values are not checked (that would wait for it); further zeros
            come in there.
        flips: bool or integers ``[B]``: whether the crop is mirrored left to right.
        mean: μ in units of [0, 1]: a number, one a channel, or a tensor ``[C]`` or 0-d. Gets no gradient.
        std: σ likewise; not 0.
        padding: p, pixels of zeros on every side.
        size: (h, w) of the crop, or one number for both. None: the image's.
        dtype: Of the result. None: the images', and float32 for uint8.
        channels_last: Layout of the result. None: the images'.

    Returns:
        ``[B, C, h, w]``.

    Raises:
        TypeError: A dtype or type other than those named.
        ValueError: A shape, device or value other than those named; a crop larger than the padded image.
    """
    _check_images(images)
    if channels_last is not None and not isinstance(channels_last, bool):
        raise TypeError(f"channels_last: got {type(channels_last).__name__}; a bool, or None, is needed")
    height, width = _crop_size(images, padding, size)
    if dtype is None:
        dtype = images.dtype if images.is_floating_point() else torch.float32
    elif not isinstance(dtype, torch.dtype) or dtype not in _FLOATS:
        raise TypeError(f"dtype: got {shown(dtype)}; accepted: {', '.join(map(str, _FLOATS))}")
    room = (images.shape[2] + 2 * padding - height, images.shape[3] + 2 * padding - width)
    offsets, flips = _check_draws(images, offsets, flips, room)
    precise = torch.float64 in (images.dtype, dtype)
    gain, bias = _gain_and_bias(images, mean, std, torch.float64 if precise else torch.float32)
    last = ops.is_channels_last(images) if channels_last is None else bool(channels_last)
    return ops.crop_flip(images, offsets, flips, gain, bias, ops.Crop(padding, height, width, dtype, last))


@annotate("draw_crop_flip")
def draw_crop_flip(
    images: Tensor,
    *,
    padding: int = 4,
    size: int | tuple[int, int] | None = None,
    flip: float = 0.5,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Random crops and flips for :func:`crop_flip_normalize`, drawn where the images are.

    Args:
        images: ``[B, C, H, W]``; only its shape and device matter.
        padding: As there.
        size: As there.
        flip: Share of images that are mirrored, from 0 to 1.
        generator: On the images' device. None: the device's own.

    Returns:
        Offsets, int32 ``[B, 2]``, uniform over all places; flips, bool ``[B]``.

    Raises:
        TypeError: Images that are no batch of images.
        ValueError: A value out of what is said above.
    """
    _check_images(images)
    height, width = _crop_size(images, padding, size)
    check_real("flip", flip, 0, 1)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: got {type(generator).__name__}; a torch.Generator, or None, is needed")
    if generator is not None and generator.device.type != images.device.type:
        raise ValueError(
            f"generator: is on {generator.device}; images is on {images.device}, and they must match"
        )
    batch, device = images.shape[0], images.device
    offsets = torch.empty((batch, 2), dtype=torch.int32, device=device)
    down, right = images.shape[2] + 2 * padding - height, images.shape[3] + 2 * padding - width
    if down == right:
        offsets.random_(0, down + 1, generator=generator)
    else:
        offsets[:, 0].random_(0, down + 1, generator=generator)
        offsets[:, 1].random_(0, right + 1, generator=generator)
    return offsets, torch.rand(batch, generator=generator, device=device) < flip


def _check_images(images: Tensor) -> None:
    check_tensor("images", images)
    if images.dtype not in (torch.uint8, *_FLOATS):
        raise TypeError(f"images: got dtype {images.dtype}; accepted: uint8, {', '.join(map(str, _FLOATS))}")
    if images.dim() != 4 or 0 in images.shape[1:]:
        raise ValueError(f"images: got shape {tuple(images.shape)}; [B, C, H, W] with pixels is needed")


def _crop_size(images: Tensor, padding: int, size: int | tuple[int, int] | None) -> tuple[int, int]:
    if not isinstance(padding, int) or isinstance(padding, bool) or not 0 <= padding <= 2**20:
        raise ValueError(f"padding: got {shown(padding)}; accepted: an int from 0 to {2**20}")
    if (
        size is not None
        and not isinstance(size, int)
        and not (isinstance(size, (tuple, list)) and len(size) == 2)
    ):
        raise TypeError(f"size: got {shown(size)}; an int, height and width, or None is needed")
    height, width = images.shape[2:] if size is None else (size, size) if isinstance(size, int) else size
    for what, side, whole in (("height", height, images.shape[2]), ("width", width, images.shape[3])):
        if not isinstance(side, int) or isinstance(side, bool) or not 1 <= side <= whole + 2 * padding:
            raise ValueError(
                f"size: got {shown(size)}; accepted: {what} 1 to {whole + 2 * padding}, of the padded image"
            )
    return height, width


def _check_draws(
    images: Tensor, offsets: Tensor, flips: Tensor, room: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    batch = images.shape[0]
    for name, value, shape in (("offsets", offsets, (batch, 2)), ("flips", flips, (batch,))):
        check_tensor(name, value)
        if value.shape != shape:
            raise ValueError(f"{name}: got shape {tuple(value.shape)}; {list(shape)} is needed")
        if value.device != images.device:
            raise elsewhere(name, value, "images", images.device)
    if offsets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"offsets: got dtype {offsets.dtype}; accepted: int32, int64")
    if flips.is_floating_point() or flips.is_complex():
        raise TypeError(f"flips: got dtype {flips.dtype}; bool or integers are needed")
    if batch and on_host(offsets):
        low, high = (found.tolist() for found in torch.aminmax(offsets, dim=0))
        if min(low) < 0 or high[0] > room[0] or high[1] > room[1]:
            raise ValueError(
                f"offsets: got {low} to {high}; accepted: [0, 0] to {list(room)} for this padding and size"
            )
    return offsets.contiguous(), flips.contiguous()


def _gain_and_bias(
    images: Tensor, mean: PerChannel, std: PerChannel, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """g and β of g·x + β: on the images' device, made of numbers once."""
    scale = 1.0 / 255 if images.dtype == torch.uint8 else 1.0
    channels = images.shape[1]
    if isinstance(mean, Tensor) or isinstance(std, Tensor):
        mu, sigma = (_channel_tensor(name, value, images) for name, value in (("mean", mean), ("std", std)))
        return (scale / sigma).to(dtype), (-mu / sigma).to(dtype)
    mus, sigmas = _numbers("mean", mean, channels), _numbers("std", std, channels)
    gains, biases = (scale / s for s in sigmas), (-m / s for m, s in zip(mus, sigmas, strict=True))
    return constant(tuple(gains), images.device, dtype), constant(tuple(biases), images.device, dtype)


def _channel_tensor(name: str, value: PerChannel, images: Tensor) -> Tensor:
    channels = images.shape[1]
    if not isinstance(value, Tensor):
        return constant(_numbers(name, value, channels), images.device, torch.float64)
    check_tensor(name, value)
    if value.is_complex():
        raise TypeError(f"{name}: got dtype {value.dtype}; real numbers are needed")
    if value.requires_grad:
        raise ValueError(f"{name}: requires grad; kdfast gives it no gradient, pass {name}.detach()")
    if value.device != images.device:
        raise elsewhere(name, value, "images", images.device)
    if value.shape not in ((), (channels,)):
        raise ValueError(f"{name}: got shape {tuple(value.shape)}; a number or [{channels}] is needed")
    return value.to(torch.float64).expand(channels)


def _numbers(name: str, value: float | Sequence[float], channels: int) -> tuple[float, ...]:
    if not isinstance(value, (int, float, Sequence)) or isinstance(value, (str, bytes)):
        raise TypeError(f"{name}: got {type(value).__name__}; a number, one a channel, or a tensor is needed")
    given = (value,) * channels if isinstance(value, (int, float)) else tuple(value)
    if len(given) != channels:
        raise ValueError(
            f"{name}: got {len(given)} numbers; one, or one for each of {channels} channels, is needed"
        )
    for number in given:
        if check_real(name, number) == 0 and name == "std":
            raise ValueError("std: got 0; values other than 0 are needed")
    return tuple(map(float, given))

"""Crop, flip and normalise: conformance, gradients, identities, draws, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kdfast.functional import crop_flip_normalize, draw_crop_flip
from tests.conftest import INTERPRETING, Target
from tests.support.conformance import ConformanceSuite, OpCase, assert_verbose_allclose

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


def make(
    generator: torch.Generator, shape: tuple[int, ...], *, padding: int = 4, cut: int = 0
) -> dict[str, Tensor]:
    batch = shape[0]
    top = torch.randint(0, 2 * padding + cut + 1, (batch,), generator=generator)
    left = torch.randint(0, 2 * padding + cut + 1, (batch,), generator=generator)
    flips = torch.rand(batch, generator=generator) < 0.5
    images = torch.rand(shape, generator=generator)
    return {"images": images, "offsets": torch.stack([top, left], 1), "flips": flips}


def one_by_one(
    images: Tensor,
    offsets: Tensor,
    flips: Tensor,
    *,
    padding: int = 4,
    size: tuple[int, int] | None = None,
    mean: Any = MEAN,
    std: Any = STD,
) -> Tensor:
    """As torchvision's transforms do it: an image at a time."""
    height, width = size or tuple(images.shape[2:])
    out = []
    for image, (top, left), flip in zip(images, offsets.tolist(), flips.tolist(), strict=True):
        crop = F.pad(image, (padding,) * 4)[:, top : top + height, left : left + width]
        out.append(crop.flip(-1) if flip else crop)
    cut = torch.stack(out) if out else images.new_zeros(0, images.shape[1], height, width)
    mu, sigma = (torch.tensor(v, dtype=images.dtype).view(-1, 1, 1) for v in (mean, std))
    return (cut - mu) / sigma


def case(name: str, shapes: Any, small: Any, *, size: Any = None, padding: int = 4) -> OpCase:
    def build(generator: torch.Generator, shape: tuple[int, ...]) -> dict[str, Tensor]:
        cut = shape[2] - size if size else 0
        return make(generator, shape, padding=padding, cut=cut)

    def sides(images: Tensor) -> tuple[int, int]:
        return (size, images.shape[3] - images.shape[2] + size) if size else tuple(images.shape[2:])  # type: ignore[return-value]

    def opcheck(inputs: dict[str, Tensor]) -> tuple[Any, tuple[Any, ...]]:
        x = inputs["images"].requires_grad_()
        gain = torch.linspace(0.5, 1.5, x.shape[1], device=x.device)
        crop = (padding, *sides(x), torch.float32, True, False)
        return torch.ops.kdfast.crop_flip.default, (x, inputs["offsets"], inputs["flips"], gain, gain, *crop)

    def run(images: Tensor, offsets: Tensor, flips: Tensor) -> Tensor:
        return crop_flip_normalize(
            images, offsets, flips, MEAN, STD, padding=padding, size=sides(images) if size else None
        )

    def oracle(images: Tensor, offsets: Tensor, flips: Tensor) -> Tensor:
        return one_by_one(images, offsets, flips, padding=padding, size=sides(images))

    return OpCase(
        name=name,
        make=build,
        run=run,
        oracle=oracle,
        shapes=shapes,
        small_shapes=small,
        differentiable=["images"],
        cast=["images"],
        launches=1,
        opcheck=opcheck,
        empty_shape=(0, 3, 6, 6),
        # The oracle sees the rounded image; the result is rounded once more, up to about 2.
        tolerances={torch.bfloat16: (1.6e-2, 8e-3), torch.float16: (2e-3, 1e-3)},
    )


class TestConformance(ConformanceSuite):
    cases = (
        # 32×32 as CIFAR: several programs a sample; 7×5 odd and unequal.
        case("crop_flip", [(4, 3, 7, 5), (3, 3, 32, 32), (1, 3, 1, 1)], [(3, 3, 7, 5), (2, 3, 10, 12)]),
        case("cut smaller", [(4, 3, 9, 8)], [(3, 3, 7, 6)], size=5, padding=1),
        case("no padding", [(4, 3, 8, 8)], [(2, 3, 5, 5)], padding=0),
    )


def drawn(target: Target, *shape: int, seed: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    made = make(torch.Generator().manual_seed(seed), shape)
    return tuple(made[key].to(target.device) for key in ("images", "offsets", "flips"))  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_bytes_count_as_0_to_1(target: Target, dtype: torch.dtype) -> None:
    images, offsets, flips = drawn(target, 3, 3, 9, 8)
    quantised = (images * 255).round().to(torch.uint8)
    got = crop_flip_normalize(quantised, offsets, flips, MEAN, STD, dtype=dtype)
    want = one_by_one(quantised.cpu().double() / 255, offsets, flips)
    assert got.dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6}.get(dtype, 1.6e-2)
    assert_verbose_allclose(got, want, rtol=tolerance, atol=tolerance)
    assert crop_flip_normalize(quantised, offsets, flips).dtype == torch.float32


def test_the_middle_unflipped_is_the_image(target: Target) -> None:
    images, offsets, flips = drawn(target, 3, 2, 6, 6)
    still = torch.full_like(offsets, 4), torch.zeros_like(flips)
    assert torch.equal(crop_flip_normalize(images, *still), images)
    assert torch.equal(crop_flip_normalize(images, still[0], ~still[1]), images.flip(-1))
    assert not torch.equal(crop_flip_normalize(images, offsets, flips), images)


def test_zeros_come_in_before_normalisation(target: Target) -> None:
    images = torch.ones(1, 3, 4, 4, device=target.device)
    offsets, flips = (
        torch.zeros(1, 2, dtype=torch.int32, device=target.device),
        torch.zeros(1, device=target.device),
    )
    out = crop_flip_normalize(images, offsets, flips.bool(), MEAN, STD, padding=4)
    want = -torch.tensor(MEAN) / torch.tensor(STD)
    torch.testing.assert_close(out.cpu(), want.view(1, 3, 1, 1).expand(1, 3, 4, 4))


@pytest.mark.parametrize("offset_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("flip_dtype", [torch.bool, torch.uint8, torch.int64])
def test_any_integers_say_where(target: Target, offset_dtype: torch.dtype, flip_dtype: torch.dtype) -> None:
    images, offsets, flips = drawn(target, 3, 3, 6, 5)
    got = crop_flip_normalize(images, offsets.to(offset_dtype), flips.to(flip_dtype))
    torch.testing.assert_close(got, crop_flip_normalize(images, offsets, flips), rtol=0, atol=0)


@pytest.mark.parametrize(
    "mean, std",
    [(0.5, 0.25), ((0.5, 0.4, 0.3), 0.25), (torch.tensor([0.5, 0.4, 0.3]), 0.25), (0.5, torch.tensor(0.25))],
    ids=["numbers", "one a channel", "tensor", "0-d"],
)
def test_mean_and_std_come_in_any_form(target: Target, mean: Any, std: Any) -> None:
    images, offsets, flips = drawn(target, 2, 3, 5, 5)
    given = [v.to(target.device) if isinstance(v, Tensor) else v for v in (mean, std)]
    each = [torch.as_tensor(v).expand(3).tolist() for v in (mean, std)]
    for _ in range(2):  # the second call finds the numbers on the device
        got = crop_flip_normalize(images, offsets, flips, *given)
        want = one_by_one(images.cpu(), offsets, flips, mean=each[0], std=each[1])
        torch.testing.assert_close(got.cpu(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("given", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("wanted", [None, False, True])
def test_the_layout_is_the_images_or_the_one_asked_for(
    target: Target, given: Any, wanted: bool | None
) -> None:
    images, offsets, flips = drawn(target, 2, 3, 6, 5)
    images = images.contiguous(memory_format=given).requires_grad_()
    out = crop_flip_normalize(images, offsets, flips, channels_last=wanted)
    last = given == torch.channels_last if wanted is None else wanted
    assert out.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    (grad,) = torch.autograd.grad(out.square().sum(), images)
    assert grad.is_contiguous(memory_format=given)
    plain = images.detach().contiguous().requires_grad_()
    other = crop_flip_normalize(plain, offsets, flips)
    assert torch.equal(out, other)
    assert torch.equal(grad, torch.autograd.grad(other.square().sum(), plain)[0])


def test_pixels_that_no_crop_shows_get_no_gradient(target: Target) -> None:
    images, _, flips = drawn(target, 2, 3, 6, 6)
    offsets = torch.zeros(2, 2, dtype=torch.int64, device=target.device)
    images = images.requires_grad_()
    out = crop_flip_normalize(images, offsets, flips, std=0.5, padding=2)
    (grad,) = torch.autograd.grad(out.sum(), images)
    want = torch.zeros_like(grad)
    want[:, :, :4, :4] = 2.0
    assert torch.equal(grad, want)


def test_bytes_and_detached_images_get_no_gradient(target: Target) -> None:
    images, offsets, flips = drawn(target, 2, 3, 6, 6)
    assert not crop_flip_normalize(images, offsets, flips).requires_grad
    assert not crop_flip_normalize((images * 255).to(torch.uint8), offsets, flips).requires_grad
    with torch.no_grad():
        assert not crop_flip_normalize(images.requires_grad_(), offsets, flips).requires_grad


def test_gradients_can_be_differentiated_again(target: Target) -> None:
    images, offsets, flips = drawn(target, 2, 3, 5, 5)

    def second(dtype: torch.dtype) -> Tensor:
        x = images.detach().to(dtype).requires_grad_()
        out = crop_flip_normalize(x, offsets, flips, MEAN, STD)
        (first,) = torch.autograd.grad(out.pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    assert_verbose_allclose(second(torch.float32), second(torch.float64), rtol=1e-4, atol=1e-3)


@pytest.mark.skipif(INTERPRETING, reason="float64 takes the reference")
def test_gradcheck_in_float64() -> None:
    made = make(torch.Generator().manual_seed(1), (2, 2, 3, 4))
    x = made["images"].double().requires_grad_()

    def call(x: Tensor) -> Tensor:
        return crop_flip_normalize(x, made["offsets"], made["flips"], (0.1, 0.2), 0.5)

    assert torch.autograd.gradcheck(call, (x,))
    assert torch.autograd.gradgradcheck(call, (x,))


def test_the_backward_is_one_launch(target: Target) -> None:
    if target.backend == "reference":
        pytest.skip("nothing is launched")
    from kdfast.kernels.launch import count_launches

    images, offsets, flips = drawn(target, 2, 3, 6, 6)
    out = crop_flip_normalize(images.requires_grad_(), offsets, flips, MEAN, STD)
    with count_launches() as counts:
        torch.autograd.grad(out.sum(), images)
    assert sum(counts.values()) == 1


def test_offsets_beyond_the_border_are_safe_in_the_kernel(target: Target) -> None:
    """On a GPU nobody has looked at them."""
    if target.backend == "reference":
        pytest.skip("refused on a CPU")
    from kdfast.kernels import images as kernels

    images, _, flips = drawn(target, 4, 3, 6, 6)
    wild = torch.tensor([[-(2**62), 0], [0, 2**40], [4, 4], [2**31, -(2**31)]], device=target.device)
    for transposed in (False, True):
        out = torch.full_like(images, 7.0)
        kernels.crop_flip(
            images, out, wild, flips & False, images.new_ones(3), None, 4, transposed=transposed
        )
        assert torch.equal(out[2], images[2])
        assert not out[[0, 1, 3]].any()


def test_compiled_is_eager(target: Target) -> None:
    images, offsets, flips = drawn(target, 2, 3, 6, 6)
    images = images.requires_grad_()

    def call(x: Tensor) -> Tensor:
        return crop_flip_normalize(x * 1.5, offsets, flips, MEAN, STD).square().sum()

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    got, want = (torch.autograd.grad(f(images), images) for f in (compiled, call))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_torch_func_sees_the_same_gradient(target: Target) -> None:
    images, offsets, flips = drawn(target, 2, 3, 6, 6)

    def call(x: Tensor) -> Tensor:
        return crop_flip_normalize(x, offsets, flips, MEAN, STD).square().sum()

    got = torch.func.grad(call)(images)
    want = torch.autograd.grad(call(images.requires_grad_()), images)[0]
    torch.testing.assert_close(got, want)


def test_numbers_first_seen_in_inference_mode_still_train(target: Target) -> None:
    images, offsets, flips = drawn(target, 2, 3, 5, 5)
    with torch.inference_mode():
        crop_flip_normalize(images, offsets, flips, 0.123, 0.456)
    out = crop_flip_normalize(images.requires_grad_(), offsets, flips, 0.123, 0.456)
    assert torch.autograd.grad(out.sum(), images)[0].any()


# --- draws ---------------------------------------------------------------------------------------------------


def test_every_place_is_drawn_alike(generator: torch.Generator) -> None:
    offsets, flips = draw_crop_flip(torch.empty(9000, 3, 8, 8), padding=1, generator=generator)
    assert offsets.dtype == torch.int32
    counts = torch.bincount((offsets[:, 0] * 3 + offsets[:, 1]).long())
    assert counts.shape == (9,)
    # 1000 expected of each, standard deviation 30.
    assert (counts - 1000).abs().max() < 5 * 30
    assert abs(int(flips.sum()) - 4500) < 5 * 48


def test_draws_reach_both_ends_of_an_oblong_crop(generator: torch.Generator) -> None:
    images = torch.empty(4000, 3, 8, 10)
    offsets, _ = draw_crop_flip(images, padding=1, size=(8, 7), generator=generator)
    assert offsets.amin(0).tolist() == [0, 0]
    assert offsets.amax(0).tolist() == [2, 5]


def test_draws_follow_the_generator_and_the_share() -> None:
    images = torch.empty(50, 3, 8, 8)
    one, same, other = (draw_crop_flip(images, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not torch.equal(one[0], other[0])
    assert not draw_crop_flip(images, flip=0.0)[1].any()
    assert draw_crop_flip(images, flip=1.0)[1].all()
    assert not draw_crop_flip(images, padding=0)[0].any()


X = torch.zeros(2, 3, 4, 4)
AT, NO = torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, dtype=torch.bool)


@pytest.mark.parametrize(
    "error, match, call",
    [
        (TypeError, "images: got list", lambda: crop_flip_normalize([0.0], AT, NO)),  # type: ignore[arg-type]
        (TypeError, "images: got dtype", lambda: crop_flip_normalize(X.int(), AT, NO)),
        (ValueError, r"images: got shape \(3, 4, 4\)", lambda: crop_flip_normalize(X[0], AT, NO)),
        (ValueError, "with pixels", lambda: crop_flip_normalize(X[..., :0], AT, NO)),
        (TypeError, "offsets: got list", lambda: crop_flip_normalize(X, [[0, 0]] * 2, NO)),  # type: ignore[arg-type]
        (ValueError, r"offsets: got shape \(2,\)", lambda: crop_flip_normalize(X, AT[0], NO)),
        (TypeError, "offsets: got dtype", lambda: crop_flip_normalize(X, AT.float(), NO)),
        (ValueError, "offsets: is on meta", lambda: crop_flip_normalize(X, AT.to("meta"), NO)),
        (
            ValueError,
            r"offsets: got \[0, 0\] to \[0, 9\]",
            lambda: crop_flip_normalize(X, AT + AT.new_tensor([[0, 9], [0, 0]]), NO),
        ),
        (ValueError, r"offsets: got \[-1, -1\]", lambda: crop_flip_normalize(X, AT - 1, NO)),
        (ValueError, r"flips: got shape \(1,\)", lambda: crop_flip_normalize(X, AT, NO[:1])),
        (TypeError, "flips: got dtype", lambda: crop_flip_normalize(X, AT, NO.float())),
        (ValueError, "padding: got -1", lambda: crop_flip_normalize(X, AT, NO, padding=-1)),
        (ValueError, "padding: got 1.0", lambda: crop_flip_normalize(X, AT, NO, padding=1.0)),  # type: ignore[arg-type]
        (ValueError, "size: got 7", lambda: crop_flip_normalize(X, AT, NO, padding=1, size=7)),
        (ValueError, "size: got 0", lambda: crop_flip_normalize(X, AT, NO, size=0)),
        (ValueError, r"size: got \(4, 2.0\)", lambda: crop_flip_normalize(X, AT, NO, size=(4, 2.0))),  # type: ignore[arg-type]
        (TypeError, "dtype: got torch.int32", lambda: crop_flip_normalize(X, AT, NO, dtype=torch.int32)),
        (ValueError, "mean: got 2 numbers", lambda: crop_flip_normalize(X, AT, NO, (0.0, 1.0))),
        (ValueError, "mean: got nan", lambda: crop_flip_normalize(X, AT, NO, float("nan"))),
        (ValueError, "std: got 0", lambda: crop_flip_normalize(X, AT, NO, 0.0, 0.0)),
        (ValueError, r"mean: got shape \(2,\)", lambda: crop_flip_normalize(X, AT, NO, torch.zeros(2))),
        (
            ValueError,
            "std: requires grad",
            lambda: crop_flip_normalize(X, AT, NO, 0.0, torch.ones(3).requires_grad_()),
        ),
        (
            ValueError,
            "mean: is on meta",
            lambda: crop_flip_normalize(X, AT, NO, torch.zeros(3, device="meta")),
        ),
        (ValueError, "flip: got 1.5", lambda: draw_crop_flip(X, flip=1.5)),
        (ValueError, "images: got shape", lambda: draw_crop_flip(X[0])),
        (ValueError, "size: got 13", lambda: draw_crop_flip(X, size=13)),
    ],
)
def test_refusals_name_the_argument(error: type[Exception], match: str, call: Any) -> None:
    with pytest.raises(error, match=match):
        call()

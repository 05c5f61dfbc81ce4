"""The denoising step: kernel, reference, op and public function."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kdfast.functional import denoise_step
from kdfast.ops import denoise as ops
from kdfast.ops.denoise.run import implementation
from kdfast.reference import denoise as reference
from kdfast.reference.philox import normal
from tests.conftest import INTERPRETING, Target
from tests.support.conformance import ConformanceSuite, Inputs, OpCase, assert_verbose_allclose

STEPS = 5


def make(
    channels: int = 4, output_rows: int = 1, output_channels: int = 4, history: int = 0, noise: bool = False
):
    """Inputs for a sample of ``shape``; the output may have further rows and channels."""

    def inputs(generator: torch.Generator, shape: tuple[int, ...]) -> Inputs:
        def randn(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator)

        batch, _, *rest = shape
        made = {
            "sample": 2 * randn(*shape),
            "model_output": randn(output_rows * batch, output_channels, *rest),
            "coefficients": randn(STEPS, 10),
        }
        made.update({f"h{at}": randn(*shape) for at in range(1, history + 1)})
        if noise:
            made["noise"] = randn(*shape)
        return made

    return inputs


def run(step: int | torch.Tensor = 3, **options: Any):
    def call(sample, model_output, coefficients, **rest):
        history = [rest.pop(key) for key in sorted(rest) if key.startswith("h")]
        at = torch.tensor(step, device=sample.device) if options.get("device_step") else step
        kept = {key: value for key, value in options.items() if key != "device_step"}
        if sample.dtype == torch.float64:
            coefficients = coefficients.double()
        return denoise_step(sample, model_output, coefficients, at, history=history, **rest, **kept)

    return call


def oracle(
    step: int = 3,
    guidance_scale: float | None = None,
    order: str = "cond_uncond",
    cfg_channels: int | None = None,
    clip: float | None = None,
    seed: int | None = None,
    **_: Any,
):
    """The equation of kernels/denoise/, term by term."""

    def call(sample, model_output, coefficients, **rest):
        px, po, a, b, d, d1, d2, d3, c, _ = coefficients[step].tolist()
        x, o = sample, model_output[:, : sample.shape[1]]
        if guidance_scale is not None:
            first, second = o.chunk(2)
            cond, uncond = (first, second) if order == "cond_uncond" else (second, first)
            guided = uncond + guidance_scale * (cond - uncond)
            keep = sample.shape[1] if cfg_channels is None else cfg_channels
            halves = [first, second] if x.shape[0] == o.shape[0] else [cond]
            o = torch.cat([torch.cat([guided[:, :keep], half[:, keep:]], 1) for half in halves])
        m = px * x + po * o
        if clip is not None:
            m = m.clamp(-clip, clip)
        y = a * x + b * m + d * o
        for key, factor in (("h1", d1), ("h2", d2), ("h3", d3)):
            if key in rest:
                y = y + factor * rest[key]
        z = normal(seed, step, tuple(x.shape)) if seed is not None else rest.get("noise")
        return y if z is None else y + c * z

    return call


def opcheck_args(inputs: Inputs) -> tuple[Any, tuple[Any, ...]]:
    sample, output = (inputs[key].clone().requires_grad_() for key in ("sample", "model_output"))
    args = (sample, output, inputs["coefficients"], None, 3, [], None, None, None, None, None, torch.float32)
    return torch.ops.kdfast.denoise_step.default, (
        *args,
        None,
        True,
        None,
        False,
        1.0,
        True,
        True,
        torch.float32,
    )


def case(name: str, maker: Any, options: dict[str, Any] | None = None, **more: Any) -> OpCase:
    options = options or {}
    return OpCase(
        name=name,
        make=maker,
        run=run(**options),
        oracle=oracle(**options),
        # 257 is a multiple of nothing; [3, 4, 16, 16] divides into blocks; [2, 4, 5] has no row of 8.
        shapes=more.pop("shapes", [(3, 4, 16, 16), (2, 4, 5), (1, 4, 257), (2, 4, 2, 3, 5)]),
        small_shapes=more.pop("small_shapes", [(2, 4, 3, 5), (2, 4, 131)]),
        launches=1,
        empty_shape=(0, 4, 8, 8),
        **more,
    )


HISTORY = ("h1", "h2", "h3")
BOTH = ("sample", "model_output")
CASES = [
    case("plain", make(), cast=BOTH, differentiable=BOTH, opcheck=opcheck_args),
    case("device_step", make(), {"device_step": True}, cast=BOTH, differentiable=BOTH),
    case("clip", make(), {"clip": 1.0}, cast=BOTH, differentiable=BOTH),
    case(
        "dit", make(output_rows=2, output_channels=8), {"guidance_scale": 2.0}, cast=BOTH, differentiable=BOTH
    ),
    case(
        "partial_guidance",
        make(output_rows=2, output_channels=8),
        {"guidance_scale": 1.5, "order": "uncond_cond", "cfg_channels": 3, "clip": 2.0},
        cast=BOTH,
        differentiable=BOTH,
    ),
    case(
        "history_and_noise",
        make(history=3, noise=True),
        cast=(*BOTH, *HISTORY, "noise"),
        differentiable=(*BOTH, *HISTORY, "noise"),
        # Six terms of order one: half a unit in the last place of a sum of a few is the coarser bound.
        tolerances={torch.bfloat16: (1.6e-2, 1e-2), torch.float16: (2e-3, 1e-3)},
    ),
    case("philox", make(), {"seed": 123456789012}, cast=BOTH, differentiable=BOTH),
]


class TestConformance(ConformanceSuite):
    cases = CASES


def randn(
    *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def table(device: str = "cpu", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return randn(STEPS, 10, seed=9).to(device, dtype)


# --- guidance -------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["cond_uncond", "uncond_cond"])
@pytest.mark.parametrize("cfg_channels", [None, 3, 0])
def test_a_doubled_sample_gets_a_doubled_result(target: Target, order: Any, cfg_channels: int | None) -> None:
    options = {"guidance_scale": 2.5, "order": order, "cfg_channels": cfg_channels}
    x, o = randn(4, 4, 3, 5, device=target.device), randn(4, 8, 3, 5, seed=1, device=target.device)
    got = denoise_step(x, o, table(target.device), 2, **options)
    want = oracle(2, **options)(x.cpu().double(), o.cpu().double(), table())
    assert_verbose_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_gradients_through_a_doubled_sample(target: Target) -> None:
    x, o = (randn(*shape, device=target.device).requires_grad_() for shape in ((4, 4, 3), (4, 6, 3)))
    got = torch.autograd.grad(
        denoise_step(x, o, table(target.device), 2, guidance_scale=2.0).square().sum(), (x, o)
    )
    x64, o64 = (t.detach().cpu().double().requires_grad_() for t in (x, o))
    want = torch.autograd.grad(oracle(2, guidance_scale=2.0)(x64, o64, table()).square().sum(), (x64, o64))
    for grad, wanted in zip(got, want, strict=True):
        assert_verbose_allclose(grad, wanted, rtol=1e-5, atol=1e-4)


# --- further outputs, which the schedulers use ----------------------------------------------------


def test_predicted_x0_and_next_model_input(target: Target) -> None:
    x, o = randn(2, 4, 3, 8, device=target.device), randn(2, 4, 3, 8, seed=1, device=target.device)
    rows = table(target.device)
    y, x0, following = ops.denoise_step(
        x, o, rows, 1, clip=0.5, want_x0=True, next_dtype=torch.float16, next_copies=2
    )
    px, po, *_, s = rows[1].tolist()
    torch.testing.assert_close(x0, (px * x + po * o).clamp(-0.5, 0.5), rtol=1e-6, atol=1e-6)
    assert following is not None
    torch.testing.assert_close(following, torch.cat([y * s] * 2).half(), rtol=0, atol=0)


def test_learned_variance(target: Target) -> None:
    x, o = randn(2, 4, 3, 5, device=target.device), randn(4, 8, 3, 5, seed=1, device=target.device)
    z, rows = randn(2, 4, 3, 5, seed=2, device=target.device), table(target.device)
    with_noise = ops.denoise_step(x, o, rows, 1, guidance=ops.Guidance(2.0), noise=z, learned_variance=True).y
    without = ops.denoise_step(x, o, rows, 1, guidance=ops.Guidance(2.0)).y
    want = (rows[1, 8] + rows[1, 7] * o[:2, 4:]).exp() * z
    torch.testing.assert_close(with_noise - without, want, rtol=1e-5, atol=1e-5)


def test_the_clip_mask_is_one_bit_an_element_in_memory_order(target: Target) -> None:
    x = randn(2, 3, 4, 5, device=target.device).contiguous(memory_format=torch.channels_last)
    o = randn(2, 3, 4, 5, seed=1, device=target.device)
    chosen = implementation(x, o)
    rows = table(target.device)
    _, _, bits, _ = chosen.denoise_step(x, o, rows, 1, dtype=torch.float32, clip=0.8, want_mask=True)
    inside = (rows[1, 0] * x + rows[1, 1] * o).abs() <= 0.8
    assert bits.shape == (15,)
    assert torch.equal(
        reference.unpack_bits(bits, x.shape, reference.iteration_order(x.shape, x.stride())), inside
    )


# --- layouts and dtypes ---------------------------------------------------------------------------


def test_strides_are_kept(target: Target) -> None:
    rows = table(target.device)
    base = randn(2, 4, 6, 8, device=target.device)
    output = randn(2, 8, 6, 8, seed=1, device=target.device)
    for sample in (
        base,
        base.contiguous(memory_format=torch.channels_last),
        base.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    ):
        assert denoise_step(sample, output[:, :4], rows, 1).stride() == sample.stride()
    # Where the sample is not dense, torch's own elementwise result is the model.
    sliced = output[:, :4]
    assert denoise_step(sliced, base, rows, 1).stride() == (sliced * 2).stride()
    volume = randn(2, 4, 3, 2, 5, device=target.device).contiguous(memory_format=torch.channels_last_3d)
    assert denoise_step(volume, volume.contiguous(), rows, 1).stride() == volume.stride()


def test_broadcast_inputs(target: Target) -> None:
    rows = table(target.device)
    x, o = randn(3, 4, 2, 5, device=target.device), randn(1, 4, 1, 5, seed=1, device=target.device)
    want = denoise_step(x, o.expand_as(x).contiguous(), rows, 1)
    for result in (denoise_step(x, o, rows, 1), denoise_step(x, o.expand_as(x), rows, 1)):
        torch.testing.assert_close(result, want, rtol=0, atol=0)
    leaf = o.clone().requires_grad_()
    (grad,) = torch.autograd.grad(denoise_step(x, leaf, rows, 1).sum(), leaf)
    assert grad.shape == o.shape


def test_mixed_dtypes_promote(target: Target) -> None:
    x, o = (
        randn(2, 4, 5, dtype=torch.bfloat16, device=target.device),
        randn(2, 4, 5, seed=1, device=target.device),
    )
    got = denoise_step(x, o, table(target.device), 1)
    assert got.dtype == torch.float32
    assert_verbose_allclose(got, oracle(1)(x.cpu().double(), o.cpu().double(), table()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(target: Target, dtype: torch.dtype) -> None:
    x, o = (randn(2, 4, 40, seed=seed, dtype=dtype, device=target.device) for seed in (0, 1))
    rows = table(target.device)
    got = denoise_step(x, o, rows, 1, clip=1.0).double().cpu()
    exact = oracle(1, clip=1.0)(x.cpu().double(), o.cpu().double(), table())
    spacing = torch.finfo(dtype).eps * exact.abs().clamp(min=2.0**-10)
    # Triton's interpreter truncates to bfloat16 where hardware rounds to nearest.
    truncates = INTERPRETING and dtype == torch.bfloat16
    assert ((got - exact).abs() <= spacing * (1.0 if truncates else 0.502) + 1e-6).all()
    if truncates:
        return
    px, po, a, b, d, *_ = (value.item() for value in rows[1].unbind())
    eager = (a * x + b * (px * x + po * o).clamp(-1, 1) + d * o).double().cpu()
    assert (got - exact).abs().max() <= (eager - exact).abs().max()


# --- autograd -------------------------------------------------------------------------------------


def double_inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    x, o, z, h = (randn(*shape, seed=at).double().requires_grad_() for at, shape in enumerate(
        [(2, 3, 4), (4, 5, 4), (2, 3, 4), (2, 3, 4)]
    ))  # fmt: skip
    return x, o, z, h


@pytest.mark.skipif(INTERPRETING, reason="float64 takes the reference")
@pytest.mark.parametrize("clip", [None, 0.7])
@pytest.mark.parametrize("cfg_channels", [None, 2])
def test_gradcheck_and_gradgradcheck(clip: float | None, cfg_channels: int | None) -> None:
    rows = table(dtype=torch.float64)

    def function(x: torch.Tensor, o: torch.Tensor, z: torch.Tensor, h: torch.Tensor) -> Any:
        guidance = ops.Guidance(2.0, True, cfg_channels)
        result = ops.denoise_step(
            x, o, rows, 1, guidance=guidance, noise=z, history=[h], clip=clip, want_x0=True
        )
        return result.y, result.x0

    assert torch.autograd.gradcheck(function, double_inputs())
    assert torch.autograd.gradgradcheck(function, double_inputs())


def test_the_second_derivative_runs_on_the_backend(target: Target) -> None:
    """A gradient penalty: differentiating a gradient launches kernels again, and agrees with float64."""
    x, o = (randn(2, 4, 3, seed=seed, device=target.device).requires_grad_() for seed in (0, 1))

    def penalty(x: torch.Tensor, o: torch.Tensor, step: Any) -> tuple[torch.Tensor, ...]:
        y = step(x, o)
        (gx,) = torch.autograd.grad((y * y).sum(), x, create_graph=True)
        return torch.autograd.grad((gx * gx).sum(), (x, o))

    got = penalty(x, o, lambda a, b: denoise_step(a, b, table(target.device), 1, clip=0.8))
    x64, o64 = (t.detach().cpu().double().requires_grad_() for t in (x, o))
    want = penalty(x64, o64, lambda a, b: oracle(1, clip=0.8)(a, b, table()))
    for grad, wanted in zip(got, want, strict=True):
        assert_verbose_allclose(grad, wanted, rtol=1e-4, atol=1e-4)


def test_the_subgradient_at_the_clip_is_one(target: Target) -> None:
    rows = torch.zeros(1, 10, device=target.device)
    rows[0, 0] = rows[0, 3] = 1.0  # y = clamp(x)
    x = torch.tensor([[-1.5, -1.0, 0.0, 1.0, 1.5, 1.0, -1.0, 2.0]], device=target.device, requires_grad=True)
    denoise_step(x, torch.zeros_like(x), rows, 0, clip=1.0).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[0, 1, 1, 1, 0, 1, 1, 0]]


def test_without_a_clip_nothing_large_is_saved() -> None:
    x, o = randn(2, 4, 64).requires_grad_(), randn(2, 4, 64, seed=1).requires_grad_()
    for clip, most in ((None, 0), (1.0, 64)):
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.append(t.nbytes) or t, lambda t: t
        ):
            denoise_step(x, o, table(), 1, clip=clip)
        assert sum(saved) == most, clip


# --- registered ops -------------------------------------------------------------------------------


def test_opcheck_of_the_backward() -> None:
    gy, gm = randn(2, 4, 5).requires_grad_(), randn(2, 4, 5, seed=1).requires_grad_()
    mask = torch.randint(0, 256, (5,), dtype=torch.uint8)
    shapes = ([2, 4, 5], torch.float32, [4, 4, 5], torch.float32)
    args = (gy, gm, table(), None, 1, mask, [0, 1, 2], 2.0, True, 3, *shapes)
    torch.library.opcheck(torch.ops.kdfast.denoise_step_backward.default, args)


@pytest.mark.skipif(INTERPRETING, reason="the compiler is not what is tested there")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_compiled_equals_eager(layout: torch.memory_format) -> None:
    x = randn(2, 4, 3, 5).contiguous(memory_format=layout).requires_grad_()
    o, z = randn(4, 8, 3, 5, seed=1).requires_grad_(), randn(2, 4, 3, 5, seed=2).requires_grad_()

    def function(x: torch.Tensor, o: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return denoise_step(x, o, table_, torch.tensor(1), guidance_scale=2.0, clip=1.0, noise=z)

    table_ = table()
    want = function(x, o, z)
    got = torch.compile(function, backend="aot_eager", fullgraph=True)(x, o, z)
    assert got.stride() == want.stride()
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    grads = [torch.autograd.grad(y.square().sum(), (x, o, z)) for y in (got, want)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)

"""An accelerated pipeline is the plain one in all that can be set, read, changed or saved before, between, after calls.

Its graphs are taped ones, which like CUDA's replay what was recorded from where it was, and run no Python again.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor

from kdfast.diffusion import DDIMScheduler, accelerate_pipeline, restore_pipeline
from tests.support.diffusion import stable_diffusion
from tests.support.graphs import TapedGraph, on_a_cpu

ASKED = {"prompt": ["a cat"], "num_inference_steps": 3, "output_type": "pt", "guidance_scale": 4.0}


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[TapedGraph]:
    return on_a_cpu(monkeypatch)


def _two(folder: Path) -> tuple[Any, Any]:
    """A pipeline, and one with the same weights accelerated."""
    plain = stable_diffusion(folder)
    fast = stable_diffusion(folder)
    for name in ("unet", "vae", "text_encoder"):
        getattr(fast, name).load_state_dict(getattr(plain, name).state_dict())
    return plain, accelerate_pipeline(fast)


def images(pipe: Any, **options: Any) -> torch.Tensor:
    return pipe(**{**ASKED, **options}, generator=torch.Generator().manual_seed(0)).images


def _scheduler(pipe: Any, **settings: Any) -> None:
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **settings)


def _replace_weights(pipe: Any) -> None:
    state = {name: torch.roll(value, 1).clone() for name, value in pipe.unet.state_dict().items()}
    pipe.unet.load_state_dict(state, assign=True)


def _scale_weights(pipe: Any) -> None:
    with torch.no_grad():
        for parameter in pipe.unet.parameters():
            parameter.mul_(0.5)


def _processor(pipe: Any) -> None:
    class Halved(AttnProcessor):
        def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            return 0.5 * super().__call__(*args, **kwargs)

    pipe.unet.set_attn_processor(Halved())


def _hook(pipe: Any) -> None:
    pipe.unet.conv_in.register_forward_hook(lambda module, args, out: out * 0.5)


def _layer(pipe: Any) -> None:
    torch.manual_seed(7)
    old = pipe.unet.conv_in
    pipe.unet.conv_in = torch.nn.Conv2d(old.in_channels, old.out_channels, 3, padding=1)


def _model(pipe: Any) -> None:
    torch.manual_seed(8)
    pipe.unet = diffusers.UNet2DConditionModel.from_config(pipe.unet.config).eval()


def _flag(pipe: Any) -> None:
    for module in pipe.unet.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.eps = 0.5


CHANGES: dict[str, Callable[[Any], object]] = {
    "clip range": lambda pipe: _scheduler(pipe, clip_sample=True, clip_sample_range=0.01),
    "prediction type": lambda pipe: _scheduler(pipe, prediction_type="v_prediction"),
    "another sampler": lambda pipe: setattr(pipe, "scheduler", diffusers.EulerDiscreteScheduler()),
    "weights replaced": _replace_weights,
    "weights changed": _scale_weights,
    "attention processors": _processor,
    "fused qkv": lambda pipe: pipe.fuse_qkv_projections(),
    "freeu": lambda pipe: pipe.enable_freeu(s1=0.2, s2=0.1, b1=2.5, b2=3.0),
    "a hook": _hook,
    "a layer": _layer,
    "a model": _model,
    "a flag": _flag,
    "dtype": lambda pipe: pipe.unet.to(torch.float64).to(torch.float32),
}
#: Changes that leave the images as they are, and only have to be harmless.
HARMLESS = ("fused qkv", "dtype")


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_between_calls_is_seen(name: str, tmp_path: Path, recorded: list[TapedGraph]) -> None:
    plain, fast = _two(tmp_path)
    before = images(fast)
    torch.testing.assert_close(before, images(plain), rtol=0, atol=2e-4)
    assert recorded, "nothing was recorded: the test would show nothing"
    for pipe in (plain, fast):
        CHANGES[name](pipe)
    wanted = images(plain)
    if name not in HARMLESS:
        assert float((wanted - before).abs().max()) > 1e-3, "the change changes nothing"
    torch.testing.assert_close(images(fast), wanted, rtol=0, atol=2e-4)


def test_what_stays_the_same_is_recorded_once(tmp_path: Path, recorded: list[TapedGraph]) -> None:
    pipe = accelerate_pipeline(stable_diffusion(tmp_path))
    first = images(pipe)
    assert torch.equal(images(pipe), first)
    assert len(recorded) == 1


def test_autocast_is_part_of_what_was_recorded(tmp_path: Path, recorded: list[TapedGraph]) -> None:
    plain, fast = _two(tmp_path)
    for pipe in (plain, fast):
        images(pipe)
    with torch.autocast("cpu", torch.bfloat16):
        wanted, got = images(plain), images(fast)
    assert len(recorded) == 2
    torch.testing.assert_close(got.float(), wanted.float(), rtol=0, atol=5e-2)
    torch.testing.assert_close(images(fast), images(plain), rtol=0, atol=2e-4)


def test_properties_after_a_call_are_the_pipelines(tmp_path: Path) -> None:
    plain, fast = _two(tmp_path)
    for pipe in (plain, fast):
        images(pipe, guidance_scale=3.5)
    for name in (
        "guidance_scale",
        "guidance_rescale",
        "clip_skip",
        "cross_attention_kwargs",
        "num_timesteps",
        "interrupt",
    ):
        assert getattr(fast, name) == getattr(plain, name), name


def test_a_scheduler_set_later_is_saved_and_given_back(tmp_path: Path) -> None:
    pipe = accelerate_pipeline(stable_diffusion(tmp_path))
    _scheduler(pipe, clip_sample=True, clip_sample_range=0.25)
    pipe.save_pretrained(tmp_path / "saved")
    saved = diffusers.DDIMScheduler.from_pretrained(tmp_path / "saved", subfolder="scheduler")
    assert saved.config.clip_sample_range == 0.25
    assert isinstance(pipe.scheduler, DDIMScheduler)
    restore_pipeline(pipe)
    assert type(pipe.scheduler) is diffusers.DDIMScheduler
    assert pipe.scheduler.config.clip_sample_range == 0.25
    chosen = diffusers.EulerDiscreteScheduler()
    accelerate_pipeline(pipe).scheduler = chosen
    assert restore_pipeline(pipe).scheduler is chosen


def test_a_first_call_in_inference_mode_forbids_no_later_one(tmp_path: Path) -> None:
    plain, fast = _two(tmp_path)
    with torch.inference_mode():
        images(fast)
    torch.testing.assert_close(images(fast), images(plain), rtol=0, atol=2e-4)


def test_a_sampler_made_from_the_config_has_the_defaults_that_it_would_have(tmp_path: Path) -> None:
    """diffusers keeps a list of values that nobody set, which a class made of this config sets anew."""
    plain, fast = _two(tmp_path)
    for pipe in (plain, fast):
        pipe.scheduler = diffusers.UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    assert dict(plain.scheduler.config) == dict(fast.scheduler.config)
    torch.testing.assert_close(images(fast), images(plain), rtol=0, atol=2e-4)

"""What a user does to a pipeline, in random order, done to a plain one and to an accelerated one: the same is seen."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from kdfast.diffusion import restore_pipeline
from tests.diffusion.test_accelerate_changes import CHANGES, _two, images
from tests.support.graphs import TapedGraph, on_a_cpu

CALLS: list[dict[str, Any]] = [
    {},
    {"guidance_scale": 1.0},
    {"num_inference_steps": 2},
    {"prompt": ["a cat", "a dog"]},
    {"eta": 0.7},
    {"num_images_per_prompt": 2},
    {"negative_prompt": ["blurry"]},
    {"output_type": "latent"},
    {"guidance_rescale": 0.5},
]
SCHEDULERS = [
    "DDIMScheduler",
    "DDPMScheduler",
    "EulerDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
]
#: What is read after every action.
READ = (
    "guidance_scale",
    "num_timesteps",
    "do_classifier_free_guidance",
    "interrupt",
    "clip_skip",
    "guidance_rescale",
)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[TapedGraph]:
    return on_a_cpu(monkeypatch)


def seen(pipe: Any, folder: Path) -> dict[str, Any]:
    """Everything that a user can ask a pipeline, without running it."""
    pipe.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    files = {
        str(path.relative_to(folder)): json.loads(path.read_text())
        for path in sorted(folder.rglob("*_config.json"))
        if path.name != "model_index.json"
    }
    return {
        "class": type(pipe).__name__,
        "index": index,
        "files": files,
        "components": {name: type(part).__name__ for name, part in pipe.components.items()},
        "modes": {name: pipe.components[name].training for name in ("unet", "vae")},
        **{name: getattr(pipe, name, None) for name in READ},
    }


def set_scheduler(pipe: Any, name: str) -> None:
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)


def act(rng: random.Random) -> tuple[str, Any]:
    """One action: its name, and what it does to a pipeline."""
    kind = rng.choice(["change", "change", "scheduler", "call", "call", "train", "grad"])
    if kind == "change":
        name = rng.choice([name for name in sorted(CHANGES) if name != "another sampler"])
        return name, CHANGES[name]
    if kind == "scheduler":
        name = rng.choice(SCHEDULERS)
        return name, lambda pipe: set_scheduler(pipe, name)
    if kind == "train":
        return "unet.train() and eval()", lambda pipe: pipe.unet.train().eval()
    if kind == "grad":
        return "requires_grad_", lambda pipe: pipe.unet.requires_grad_(
            not next(pipe.unet.parameters()).requires_grad
        )
    return "nothing", lambda pipe: None


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_a_sequence_of_actions_shows_no_difference(
    seed: int, tmp_path: Path, recorded: list[TapedGraph]
) -> None:
    rng = random.Random(seed)
    plain, fast = _two(tmp_path)
    images(fast)
    assert recorded, "nothing was recorded: the test would show nothing"
    done: list[str] = []
    for number in range(6):
        name, action = act(rng)
        asked = rng.choice(CALLS)
        done.append(f"{name}, then {asked}")
        results = []
        for pipe in (plain, fast):
            try:
                action(pipe)
                results.append(images(pipe, **asked))
            except Exception as error:
                results.append(error)
        if isinstance(results[0], Exception):
            assert type(results[0]) is type(results[1]), (done, results)
            continue
        assert not isinstance(results[1], Exception), (done, results[1])
        torch.testing.assert_close(results[1], results[0], rtol=0, atol=5e-4, msg=lambda m: f"{done}\n{m}")
        found = [
            seen(pipe, tmp_path / f"{kind}-{number}") for pipe, kind in ((plain, "plain"), (fast, "fast"))
        ]
        assert found[0] == found[1], done
    # And back: what is left is the plain one.
    restored = restore_pipeline(fast)
    assert type(restored) is type(plain)
    torch.testing.assert_close(images(restored), images(plain), rtol=0, atol=5e-4)

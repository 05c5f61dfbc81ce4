"""What `kdfast synth` asks of a pipeline: size, negative and several prompts; and weights that are pickles."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from kdfast.data import ShardError, read_manifest
from kdfast.diffusion import Synthesizer
from kdfast.diffusion.sampling import sample_noise
from kdfast.errors import CheckpointError, ConfigError
from kdfast.experiments.synth import run as synth
from tests.experiments.test_synth_pipelines import NAMES, config, pictures
from tests.support.diffusion import dit_pipeline, stable_diffusion


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    stable_diffusion(folder).save_pretrained(folder / "pipe")
    return folder / "pipe"


def asked(
    pipe: Any, prompts: list[str], keys: tuple[list[int], list[int]], shape: Any, **options: Any
) -> Any:
    latents = sample_noise(4, *keys, shape)
    found = pipe(
        prompts, latents=latents, num_inference_steps=2, guidance_scale=7.5, output_type="pt", **options
    )
    return found.images


def test_a_negative_prompt_and_a_size_are_the_pipelines_own(tmp_path: Path) -> None:
    pipe = stable_diffusion(tmp_path)
    options: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 7.5, "seed": 4}
    options |= {"class_names": NAMES, "mode": "eager"}
    made = Synthesizer(pipe, negative_prompt="blurry, dark", height=24, width=16, **options)
    images, _ = made.sample([2, 0], [1, 5])
    prompts = ["A realistic photo of red fox", "A realistic photo of cat"]
    wanted = asked(
        pipe, prompts, ([2, 0], [1, 5]), (4, 12, 8), negative_prompt=["blurry, dark"] * 2, height=24, width=16
    )
    assert images.shape == (2, 3, 24, 16)
    torch.testing.assert_close(images / 255, wanted, rtol=0, atol=1.01 / 255)
    plain, _ = Synthesizer(pipe, height=24, width=16, **options).sample([2, 0], [1, 5])
    assert not torch.equal(plain, images)


def test_several_prompts_are_taken_in_turn(tmp_path: Path) -> None:
    pipe = stable_diffusion(tmp_path)
    prompts = ("A photo of CLASS", "CLASS, drawn")
    made = Synthesizer(
        pipe, class_names=NAMES, prompt=prompts, num_inference_steps=2, guidance_scale=7.5, seed=4
    )
    images, _ = made.sample([0, 0, 1, 0], [0, 1, 3, 2])
    said = ["A photo of cat", "cat, drawn", "dog, drawn", "A photo of cat"]
    wanted = asked(pipe, said, ([0, 0, 1, 0], [0, 1, 3, 2]), (4, 8, 8))
    torch.testing.assert_close(images / 255, wanted, rtol=0, atol=1.01 / 255)


class Asked(diffusers.DiffusionPipeline):
    """Makes nothing; remembers what it was asked for."""

    def __init__(self, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(scheduler=scheduler)
        self.calls: list[dict[str, Any]] = []

    def __call__(  # type: ignore[no-untyped-def]
        self,
        prompt,
        height=8,
        width=8,
        negative_prompt=None,
        num_inference_steps=1,
        generator=None,
        output_type="",
    ):
        self.calls.append({"prompt": prompt, "height": height, "width": width, "negative": negative_prompt})
        import types

        import numpy as np

        return types.SimpleNamespace(images=np.zeros((len(prompt), height, width, 3), dtype=np.float32))


def test_any_pipeline_is_asked_for_them() -> None:
    pipe = Asked(diffusers.DDIMScheduler())
    options: dict[str, Any] = {"class_names": NAMES, "num_inference_steps": 2}
    made = Synthesizer(
        pipe, prompt=["a CLASS", "the CLASS"], height=16, negative_prompt="text", weights_id="x", **options
    )
    images, _ = made.sample([1, 1], [0, 1])
    assert images.shape == (2, 3, 16, 8)
    assert pipe.calls == [
        {"prompt": ["a dog", "the dog"], "height": 16, "width": 8, "negative": ["text"] * 2}
    ]
    metadata = made.metadata([0, 1, 2])
    assert metadata["prompt"] == ["a CLASS", "the CLASS"]
    assert (metadata["height"], metadata["negative_prompt"]) == (16, "text")
    assert "width" not in metadata


def test_a_set_of_another_size_or_prompt_is_another_set(text_folder: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"class_names": NAMES, "guidance_scale": 7.5, "height": 24, "width": 24}
    options["prompt"] = ("A CLASS", "CLASS!")
    synth.run(config(text_folder, tmp_path / "set", **options))
    assert pictures(tmp_path / "set")[0].shape[-2:] == (24, 24)
    metadata = read_manifest(tmp_path / "set").metadata
    assert (metadata["height"], metadata["prompt"]) == (24, ["A CLASS", "CLASS!"])
    with pytest.raises(ShardError, match="negative_prompt is None there, 'text' here"):
        synth.run(config(text_folder, tmp_path / "set", resume=True, negative_prompt="text", **options))


def test_refusals(text_folder: Path, tmp_path: Path) -> None:
    dit = dit_pipeline()
    for name, value in (("height", 16), ("width", 16), ("negative_prompt", "text")):
        with pytest.raises(ConfigError, match=rf"{name}: got .*, accepted: null; a class-conditional"):
            Synthesizer(dit, **{name: value})  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=rf"{name}: got .* for source=noise, accepted: null"):
            synth.SynthConfig(out="x", source="noise", **{name: value})
    with pytest.raises(ConfigError, match="width: got 15, accepted: a multiple of 2, the VAE's factor"):
        synth.run(config(text_folder, tmp_path / "a", class_names=NAMES, width=15))
    with pytest.raises(ConfigError, match="prompt: got 'a photo', accepted: a text with CLASS in it"):
        synth.run(config(text_folder, tmp_path / "a", class_names=NAMES, prompt=("a CLASS", "a photo")))
    with pytest.raises(ConfigError, match="prompt: got none"):
        synth.run(config(text_folder, tmp_path / "a", class_names=NAMES, prompt=()))


class Payload:
    """Makes a folder when it is unpickled carelessly."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.place),)


def test_pickles_are_read_when_that_is_said_and_never_run(tmp_path: Path) -> None:
    """The published DiT's form: config.json and diffusion_pytorch_model.bin."""
    dit_pipeline().save_pretrained(tmp_path / "safe")
    dit_pipeline().save_pretrained(tmp_path / "pipe", safe_serialization=False)
    assert list((tmp_path / "pipe").rglob("*.safetensors")) == []
    values: dict[str, Any] = {"images": 3, "classes": (0, 1)}
    with pytest.raises(CheckpointError, match=r"\.bin: is a pickle, .*; allow_pickle=true reads it"):
        synth.run(config(tmp_path / "pipe", tmp_path / "refused", **values))
    synth.run(config(tmp_path / "safe", tmp_path / "wanted", **values))
    synth.run(config(tmp_path / "pipe", tmp_path / "made", allow_pickle=True, **values))
    assert torch.equal(pictures(tmp_path / "made", 3)[0], pictures(tmp_path / "wanted", 3)[0])
    file = tmp_path / "pipe" / "transformer" / "diffusion_pytorch_model.bin"
    torch.save({"x": Payload(tmp_path / "was run")}, file)
    with pytest.raises(CheckpointError, match="cannot be read"):
        synth.run(config(tmp_path / "pipe", tmp_path / "bad", allow_pickle=True, **values))
    assert not (tmp_path / "was run").exists()


def test_a_text_pipeline_of_pickles(tmp_path: Path) -> None:
    pipe = stable_diffusion(tmp_path)
    pipe.save_pretrained(tmp_path / "pipe", safe_serialization=False)
    if list((tmp_path / "pipe" / "unet").glob("*.safetensors")):
        pytest.skip("this diffusers writes safetensors alone")
    options: dict[str, Any] = {"class_names": NAMES, "images": 3}
    with pytest.raises(CheckpointError, match=r"\.bin: is a pickle"):
        synth.run(config(tmp_path / "pipe", tmp_path / "refused", **options))
    synth.run(config(tmp_path / "pipe", tmp_path / "made", allow_pickle=True, **options))
    assert pictures(tmp_path / "made", 3)[1] == [0, 1, 2]

"""`kdfast synth` from prompts, from any pipeline's folder, from one file; its refusals; its scorer."""

from __future__ import annotations

import json
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from kdfast.data import ShardError, ShardLoader, ShardWriteError, read_manifest
from kdfast.diffusion import DDIMScheduler, Synthesizer
from kdfast.diffusion.notes import noted
from kdfast.diffusion.plans import fused_scheduler
from kdfast.errors import CheckpointError, ConfigError, DataError
from kdfast.experiments.synth import run as synth
from tests.support.diffusion import dit_pipeline, stable_diffusion, tiny_dit

NAMES = ("cat", "dog", "red fox")


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    stable_diffusion(folder).save_pretrained(folder / "pipe")
    return folder / "pipe"


@pytest.fixture(scope="module")
def dit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dit") / "pipe"
    dit_pipeline().save_pretrained(folder)
    return folder


def config(weights: Path, out: Path, **values: Any) -> synth.SynthConfig:
    settings: dict[str, Any] = {
        "images": 7, "steps": 2, "batch_size": 3, "samples_per_shard": 4, "device": "cpu", "image_format": "png",
    }  # fmt: skip
    return synth.SynthConfig(out=str(out), weights=str(weights), progress=False, **{**settings, **values})


def pictures(folder: Path, count: int = 7) -> tuple[torch.Tensor, list[int]]:
    with ShardLoader(folder, count, shuffle=False, loader="torch") as loader:
        images, labels = next(iter(loader))
    return images, labels.tolist()


# --- prompts -------------------------------------------------------------------------------------------------------


def test_prompts_make_what_the_pipeline_makes(tmp_path: Path) -> None:
    pipe = stable_diffusion(tmp_path)
    made = Synthesizer(pipe, class_names=NAMES, num_inference_steps=3, guidance_scale=7.5, seed=4)
    images, _ = made.sample([2, 0], [1, 5])
    from kdfast.diffusion.sampling import sample_noise

    latents = sample_noise(4, [2, 0], [1, 5], (4, 8, 8))
    prompts = ["A realistic photo of red fox", "A realistic photo of cat"]
    wanted = pipe(
        prompts, latents=latents, num_inference_steps=3, guidance_scale=7.5, output_type="pt"
    ).images
    torch.testing.assert_close(images / 255, wanted, rtol=0, atol=1.01 / 255)


def test_a_text_set_is_labelled_and_its_prompts_are_kept(text_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("cat\ndog\nred fox\n\n")
    options = {"class_names": str(tmp_path / "names.txt"), "guidance_scale": 7.5}
    synth.run(config(text_folder, tmp_path / "set", **options))
    images, labels = pictures(tmp_path / "set")
    assert labels == [0, 1, 2, 0, 1, 2, 0]
    metadata = read_manifest(tmp_path / "set").metadata
    assert metadata["class_names"] == list(NAMES)
    assert metadata["prompt"] == "A realistic photo of CLASS"
    other = {**options, "prompt": "CLASS!"}
    synth.run(config(text_folder, tmp_path / "other", **other))
    assert not torch.equal(pictures(tmp_path / "other")[0], images)
    with pytest.raises(ShardError, match="prompt is 'A realistic photo of CLASS' there, 'CLASS!' here"):
        synth.run(config(text_folder, tmp_path / "set", resume=True, **other))


def test_without_guidance_prompts_make_one_pass(tmp_path: Path) -> None:
    pipe = stable_diffusion(tmp_path)
    seen: list[int] = []
    pipe.unet.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    Synthesizer(pipe, class_names=NAMES, num_inference_steps=2, guidance_scale=1.0).sample([0, 1], [0, 0])
    assert seen == [2, 2]


SAMPLERS = {
    "ddpm": "DDPMScheduler",
    "dpm_solver": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "lcm": "LCMScheduler",
}


@pytest.mark.parametrize("sampler", ["ddim", "own", *SAMPLERS])
def test_samplers_are_made_of_the_pipelines_own_schedule(
    text_folder: Path, tmp_path: Path, sampler: Any
) -> None:
    synth.run(config(text_folder, tmp_path / "set", class_names=NAMES, sampler=sampler))
    manifest = read_manifest(tmp_path / "set")
    assert manifest.metadata["scheduler"] == SAMPLERS.get(sampler, "DDIMScheduler")
    assert manifest.metadata["scheduler_config"]["steps_offset"] == 1


# --- any pipeline --------------------------------------------------------------------------------------------------


class Painter(diffusers.DiffusionPipeline):
    """A pipeline of a kind that nobody knows: it paints noise of its generators."""

    def __init__(self, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(scheduler=scheduler)
        self.asked: list[Any] = []

    def __call__(
        self,
        prompt: Any = None,
        generator: Any = None,
        guidance_scale: float = 1.0,
        output_type: str = "pil",
        negative: Any = None,
    ) -> Any:
        self.asked.append((prompt, guidance_scale, output_type))
        rows = [torch.rand(6, 6, 3, generator=g) for g in generator]
        return types.SimpleNamespace(images=torch.stack(rows).numpy())


class Labeller(Painter):
    def __call__(self, class_labels: Any, generator: Any = None) -> Any:  # type: ignore[override]
        return super().__call__(class_labels, generator)


def test_any_pipeline_that_takes_prompts_will_do(tmp_path: Path) -> None:
    pipe = Painter(diffusers.PNDMScheduler())
    made = Synthesizer(pipe, class_names=NAMES, guidance_scale=3.0, seed=1)
    both, _ = made.sample([0, 2], [3, 3])
    alone, _ = made.sample([2], [3])
    assert torch.equal(both[1], alone[0])
    assert pipe.asked[0] == (["A realistic photo of cat", "A realistic photo of red fox"], 3.0, "np")
    made.write(tmp_path / "set", 5, batch_size=2, samples_per_shard=3, image_format="png")
    assert read_manifest(tmp_path / "set").metadata["scheduler"] == "PNDMScheduler"
    assert Synthesizer(Labeller(diffusers.DDIMScheduler()), num_classes=2).sample([1], [0])[0].shape == (
        1,
        3,
        6,
        6,
    )


def test_a_pipeline_brings_its_sampler_which_is_swapped() -> None:
    made = Synthesizer(dit_pipeline(), num_inference_steps=2)
    assert type(made.scheduler) is DDIMScheduler
    assert made.num_classes == 1000
    assert made.sample([999], [0])[0].shape == (1, 3, 16, 16)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: Synthesizer(Painter(diffusers.DDIMScheduler())), "class_names: missing; Painter takes prompts"),
        (lambda: Synthesizer(Labeller(diffusers.DDIMScheduler())), "num_classes: got None.*Labeller"),
        (
            lambda: Synthesizer(Painter(diffusers.DDIMScheduler()), class_names=["a"], cfg_channels=3),
            "cfg_channels: got 3, accepted: null, as Painter guides by itself",
        ),
        (
            lambda: Synthesizer(Painter(diffusers.DDIMScheduler()), class_names=["a"], prompt="a photo"),
            "prompt: got 'a photo', accepted: a text with CLASS",
        ),
        (
            lambda: Synthesizer(Painter(diffusers.DDIMScheduler()), class_names=["a", " "]),
            "class_names: number 1 is empty",
        ),
        (
            lambda: Synthesizer(diffusers.DDPMPipeline(None, diffusers.DDPMScheduler())),
            "DDPMPipeline, which takes neither prompts nor labels",
        ),
        (
            lambda: Synthesizer(Painter(diffusers.DDIMScheduler()), class_names=["a"], guidance_scale=0.5),
            r"guidance_scale: got 0\.5",
        ),
        (
            lambda: Synthesizer(tiny_dit(), DDIMScheduler(), mode="graph"),
            "mode: got 'graph' on cpu",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(make: Any, names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        make()


# --- weights -------------------------------------------------------------------------------------------------------


def test_a_dit_pipelines_folder_and_its_file_make_the_same_images(dit_folder: Path, tmp_path: Path) -> None:
    synth.run(config(dit_folder, tmp_path / "folder", classes=(5, 7), guidance_scale=4.0))
    file = dit_folder / "transformer" / "diffusion_pytorch_model.safetensors"
    synth.run(config(file, tmp_path / "file", classes=(5, 7), guidance_scale=4.0))
    (one, labels), (two, _) = pictures(tmp_path / "folder"), pictures(tmp_path / "file")
    assert torch.equal(one, two)
    assert labels == [5, 7, 5, 7, 5, 7, 5]


def test_a_file_that_does_not_fit_its_config_says_which_keys(dit_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(dit_folder / "transformer", tmp_path / "model")
    path = tmp_path / "model" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    for change, fault in (
        (lambda t: t.pop("proj_out_2.bias"), r"missing keys proj_out_2\.bias"),
        (lambda t: t.update(extra=torch.zeros(1)), "unexpected keys extra"),
        (lambda t: t.update({"proj_out_2.bias": torch.zeros(3)}), r"mismatched keys proj_out_2\.bias"),
    ):
        changed = dict(tensors)
        change(changed)
        save_file(changed, path)
        with pytest.raises(CheckpointError, match=fault):
            synth.run(config(path, tmp_path / "out"))
    path.write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match=r"safetensors: (is damaged|cannot be read)"):
        synth.run(config(path, tmp_path / "out"))
    (tmp_path / "model" / "config.json").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        synth.run(config(path, tmp_path / "out"))
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"weights\.bin: is no folder and no \.safetensors"):
        synth.run(config(tmp_path / "weights.bin", tmp_path / "out"))


def test_a_pipelines_folder_that_is_broken_is_named(text_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pipe"
    shutil.copytree(text_folder, folder)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="pipe: "):
        synth.run(config(folder, tmp_path / "out", class_names=NAMES))
    (folder / "model_index.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"model_index\.json: cannot be read"):
        synth.run(config(folder, tmp_path / "out", class_names=NAMES))


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"steps": 1001}, "^steps: got 1001, accepted: 1 to 1000, the steps that the model was trained on"),
        ({"classes": (1000,)}, "classes: got 1000, accepted: 0 to 999"),
        ({"mode": "graph"}, "mode: got 'graph' on cpu"),
        ({"scorer": "nowhere"}, "scorer: got 'nowhere', accepted: module:callable"),
        ({"scorer": "kdfast.nothing:x"}, "scorer: got 'kdfast.nothing:x', which cannot be imported"),
        ({"scorer": "kdfast:nothing"}, "cannot be imported"),
        ({"scorer": "kdfast:__version__"}, "is a str and not callable"),
        ({"scorer": "none.py:score"}, "scorer 'none.py:score': .*none.py is no file"),
        ({"scorer": f"{__file__}:NAMES"}, "has no 'NAMES'; it has "),
        ({"class_names": "/none/names.txt"}, "names.txt: cannot be read: No such file"),
    ],
)  # fmt: skip
def test_bad_values_are_named_by_the_users_key(
    dit_folder: Path, tmp_path: Path, values: dict[str, Any], names: str
) -> None:
    with pytest.raises(ConfigError, match=names):
        synth.run(config(dit_folder, tmp_path / "out", **values))
    assert not (tmp_path / "out").exists()


def test_guidance_below_one_and_an_empty_list_of_names_are_refused(text_folder: Path, tmp_path: Path) -> None:
    from kdfast.experiments.common.recipe import build_config

    values = {"out": str(tmp_path), "weights": "w", "guidance_scale": 0.5}
    with pytest.raises(ConfigError, match=r"guidance_scale: got 0\.5, accepted: greater than or equal to 1"):
        build_config(synth.SynthConfig, values, source="synth")
    (tmp_path / "names.txt").write_text("\n\n")
    with pytest.raises(ConfigError, match=r"names\.txt: is empty, accepted: a name a line"):
        synth.run(config(text_folder, tmp_path / "out", class_names=str(tmp_path / "names.txt")))
    with pytest.raises(ConfigError, match="class_names: missing; StableDiffusionPipeline takes prompts"):
        synth.run(config(text_folder, tmp_path / "out"))
    with pytest.raises(ConfigError, match="random_weights: got true for the pipeline"):
        synth.run(config(text_folder, tmp_path / "out", class_names=NAMES, random_weights=True))


def test_folders_that_cannot_be_used_are_named(dit_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ShardWriteError, match="file"):  # no folder can be made below a file, whoever asks
        synth.run(config(dit_folder, tmp_path / "file" / "set"))
    synth.run(config(dit_folder, tmp_path / "set"))
    (tmp_path / "set" / "manifest.json").write_text('{"format": "kdfast-shards", "ver')
    with pytest.raises(ShardError, match=r"set/manifest\.json: cannot be read"):
        synth.run(config(dit_folder, tmp_path / "set", resume=True))


# --- scores --------------------------------------------------------------------------------------------------------


def test_a_scorers_numbers_are_kept_in_order(dit_folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    module = types.ModuleType("judge")
    module.mean = lambda images, labels: images.float().mean((1, 2, 3)) + labels  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "judge", module)
    metrics = synth.run(config(dit_folder, tmp_path / "set", scorer="judge:mean", classes=(3, 4)))
    images, labels = pictures(tmp_path / "set")
    wanted = [float(image.mean() * 255) + label for image, label in zip(images, labels)]
    entries = noted(tmp_path / "set" / "scores.jsonl")
    assert [entry["image"] for entry in entries] == list(range(7))
    assert [entry["class"] for entry in entries] == labels
    torch.testing.assert_close([entry["score"] for entry in entries], wanted, rtol=1e-4, atol=1e-3)
    assert metrics["score"] == pytest.approx(sum(wanted) / 7, rel=1e-4)
    assert json.loads((tmp_path / "set" / "metrics.json").read_text())["settings"]["guidance_scale"] == 2.0


def test_scores_survive_resuming_and_ranks(dit_folder: Path, tmp_path: Path) -> None:
    made = Synthesizer(dit_pipeline(), num_inference_steps=2)
    options: dict[str, Any] = {"batch_size": 2, "samples_per_shard": 4, "classes": [1, 2]}

    def score(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return images.double().mean((1, 2, 3))

    whole = made.write(tmp_path / "whole", 10, scorer=score, **options)
    made.write(tmp_path / "grown", 4, scorer=score, **options)
    with open(tmp_path / "grown" / "scores.jsonl", "a") as handle:  # what a run that was killed later leaves
        handle.write('{"image": 4, "class": 1, "score": 0.5}\n{"image": 5, "cl')
    made.write(tmp_path / "grown", 10, scorer=score, resume=True, **options)
    for rank in (1, 0):
        made.write(tmp_path / "ranks", 10, scorer=score, rank=rank, world_size=2, **options)
    wanted = (tmp_path / "whole" / "scores.jsonl").read_text()
    assert (tmp_path / "grown" / "scores.jsonl").read_text() == wanted
    assert (tmp_path / "ranks" / "scores.jsonl").read_text() == wanted
    assert whole.score == pytest.approx(sum(json.loads(line)["score"] for line in wanted.splitlines()) / 10)


def test_a_file_of_ones_own_and_a_trained_network_score(dit_folder: Path, tmp_path: Path) -> None:
    from kdfast.models import create_model
    from kdfast.training.model_io import ModelConfig, save_model

    (tmp_path / "judge.py").write_text("def dark(images, labels): return -images.float().mean((1, 2, 3))")
    synth.run(config(dit_folder, tmp_path / "set", scorer=f"{tmp_path / 'judge.py'}:dark", classes=(3, 4)))
    images, labels = pictures(tmp_path / "set")
    scores = [entry["score"] for entry in noted(tmp_path / "set" / "scores.jsonl")]
    assert scores == pytest.approx([-float(image.mean() * 255) for image in images], rel=1e-4)

    network = create_model("resnet8", 5)
    side = images.shape[-1] // 2  # it sees them smaller
    described = ModelConfig("resnet8", 5, side, (0.5,) * 3, (0.25,) * 3)
    save_model(tmp_path / "teacher", network.eval(), described)
    taught = str(tmp_path / "teacher")
    synth.run(config(dit_folder, tmp_path / "again", scorer=taught, classes=(3, 4)))
    shown = torch.nn.functional.interpolate(images, size=(side, side), mode="bilinear", antialias=True)
    with torch.no_grad():
        sure = network((shown - 0.5) / 0.25).softmax(1)[range(len(labels)), list(labels)]
    scores = [entry["score"] for entry in noted(tmp_path / "again" / "scores.jsonl")]
    assert scores == pytest.approx(sure.tolist(), rel=1e-4)
    with pytest.raises(ConfigError, match="scorer: got teacher of 5 classes, accepted: one that knows all 6"):
        synth.run(config(dit_folder, tmp_path / "new", scorer=taught, classes=(3, 5)))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("answer", "names"),
    [([1.0], "gave 1 numbers for 2 images"), ([1.0, float("nan")], "not finite for 2 images")],
)
def test_a_scorer_that_does_not_score_is_refused(tmp_path: Path, answer: Any, names: str) -> None:
    made = Synthesizer(dit_pipeline(), num_inference_steps=2)
    with pytest.raises(DataError, match=names):
        made.write(tmp_path, 4, batch_size=2, scorer=lambda images, labels: answer)


def test_a_namesake_is_found_for_every_sampler_of_a_text_pipeline(tmp_path: Path) -> None:
    for theirs in (diffusers.EulerDiscreteScheduler(), diffusers.DPMSolverMultistepScheduler()):
        pipe = stable_diffusion(tmp_path, theirs)
        made = Synthesizer(pipe, class_names=NAMES, num_inference_steps=2)
        assert type(made.scheduler) is type(fused_scheduler(theirs))
        assert made.sample([1], [0])[0].shape == (1, 3, 16, 16)

"""`kdfast synth` and the small diffusion model: weights in, shards out, and what is wrong with the weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kdfast.data import ShardLoader, read_manifest
from kdfast.data.surrogate.uniform import uniform_noise
from kdfast.errors import CheckpointError, ConfigError, ShardError
from kdfast.experiments.diffusion_model import run as diffusion_model
from kdfast.experiments.diffusion_model.batches import NoisyBatches
from kdfast.experiments.diffusion_model.config import DiffusionConfig
from kdfast.experiments.diffusion_model.run import build_dit
from kdfast.experiments.synth import run as synth

TINY = DiffusionConfig(
    image_size=8, heads=2, head_dim=8, layers=1, epochs=2, steps_per_epoch=3, batch_size=16, device="cpu"
)
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("diffusion") / "model"
    metrics = diffusion_model.run(TINY, out, progress=False)
    assert metrics["steps"] == 6
    assert metrics["images"] == 96
    assert metrics == json.loads((out / "metrics.json").read_text())
    return out


def config(trained: Path | None, out: Path, **values: Any) -> synth.SynthConfig:
    settings: dict[str, Any] = {
        "images": 12,
        "steps": 2,
        "batch_size": 5,
        "samples_per_shard": 6,
        "device": "cpu",
    }
    weights = None if trained is None else str(trained)
    return synth.SynthConfig(out=str(out), weights=weights, progress=False, **{**settings, **values})


def damaged(trained: Path, folder: Path, change: Any) -> Path:
    shutil.copytree(trained, folder)
    change(folder)
    return folder


def edit_tensors(change: Any) -> Any:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return apply


def lively(trained: Path, folder: Path) -> Path:
    """Weights whose output depends on everything that goes in, which those of six steps' training do not."""

    def shake(tensors: dict[str, torch.Tensor]) -> None:
        generator = torch.Generator().manual_seed(0)
        for tensor in tensors.values():
            tensor.normal_(std=0.3, generator=generator)

    return damaged(trained, folder, edit_tensors(shake))


def test_a_trained_model_makes_shards(trained: Path, tmp_path: Path) -> None:
    result = synth.run(config(trained, tmp_path / "set"))
    assert (result["images"], result["refused"]) == (12, 0)
    assert json.loads((tmp_path / "set" / "metrics.json").read_text()) == result
    manifest = read_manifest(tmp_path / "set")
    assert (manifest.num_samples, manifest.num_classes, len(manifest.shards)) == (12, 10, 2)
    assert manifest.metadata["scheduler_config"]["prediction_type"] == "sample"
    with ShardLoader(tmp_path / "set", 12, shuffle=False, loader="torch") as loader:
        images, labels = next(iter(loader))
    assert labels.tolist() == [*range(10), 0, 1]
    assert torch.equal(images[:, 0], images[:, 1]) or float((images[:, 0] - images[:, 1]).abs().max()) < 0.02


def test_the_sampler_of_the_paper_is_there_too(trained: Path, tmp_path: Path) -> None:
    made, weights = {}, lively(trained, tmp_path / "weights")
    for name in ("ddim", "ddpm"):
        synth.run(config(weights, tmp_path / name, sampler=name, image_format="png"))
        made[name] = read_manifest(tmp_path / name)
    assert made["ddpm"].metadata["scheduler"] == "DDPMScheduler"
    assert made["ddpm"].shards[0].sha256 != made["ddim"].shards[0].sha256


def test_samplers_by_name(trained: Path, tmp_path: Path) -> None:
    weights = lively(trained, tmp_path / "weights")
    classes = {"dpm_solver": "DPMSolverMultistepScheduler", "lcm": "LCMScheduler"}
    sums = set()
    for name, kind in classes.items():
        synth.run(config(weights, tmp_path / name, sampler=name, image_format="png", steps=3))
        manifest = read_manifest(tmp_path / name)
        assert (manifest.metadata["scheduler"], manifest.complete) == (kind, True)
        sums.add(manifest.shards[0].sha256)
    assert len(sums) == 2


def test_noise_with_a_teacher_s_statistics(tmp_path: Path) -> None:
    told: dict[str, Any] = {"source": "noise", "noise": "gaussian", "images": 8, "image_size": 32}
    told |= {"noise_mean": (0.2, 0.5, 0.8), "noise_std": (0.05,) * 3, "image_format": "png"}
    synth.run(config(None, tmp_path / "set", **told))
    with ShardLoader(tmp_path / "set", 8, shuffle=False, loader="torch") as loader:
        images, _ = next(iter(loader))
    assert images.mean((0, 2, 3)).tolist() == pytest.approx([0.2, 0.5, 0.8], abs=0.01)
    assert images.std((0, 2, 3)).tolist() == pytest.approx([0.05] * 3, abs=0.01)
    assert read_manifest(tmp_path / "set").metadata["noise_mean"] == [0.2, 0.5, 0.8]


def test_ddpm_images_do_not_depend_on_their_batch(trained: Path, tmp_path: Path) -> None:
    sets, weights = [], lively(trained, tmp_path / "weights")
    for size in (1, 5):
        folder = tmp_path / str(size)
        synth.run(config(weights, folder, sampler="ddpm", batch_size=size, image_format="png", steps=3))
        with ShardLoader(folder, 12, shuffle=False, loader="torch") as loader:
            sets.append(next(iter(loader))[0])
    assert float((sets[0] - sets[1]).abs().max()) <= 1.01 / 255
    assert (
        float((sets[0][0] - sets[0][10]).abs().max()) > 0.1
    )  # two images of one class, by their noise alone


def test_resuming_a_finished_set_keeps_its_metrics(trained: Path, tmp_path: Path) -> None:
    synth.run(config(trained, tmp_path))
    before = (tmp_path / "metrics.json").read_text()
    synth.run(config(trained, tmp_path, resume=True))
    assert (tmp_path / "metrics.json").read_text() == before
    with pytest.raises(ShardError, match="steps is 2 there, 3 here"):
        synth.run(config(trained, tmp_path, resume=True, steps=3))


def test_noise_of_both_kinds(tmp_path: Path) -> None:
    for kind in ("uniform", "gaussian"):
        synth.run(config(None, tmp_path / kind, source="noise", noise=kind, image_size=8, num_classes=3))
        manifest = read_manifest(tmp_path / kind)
        assert manifest.class_counts == {0: 4, 1: 4, 2: 4}
        assert manifest.metadata["noise"] == kind


def test_uniform_noise_is_uniform_and_made_in_any_pieces() -> None:
    images = uniform_noise(40, (16, 16), seed=1)
    assert torch.equal(images[7:9], uniform_noise(2, (16, 16), seed=1, start=7))
    counts = torch.bincount(images.flatten().long(), minlength=256).double()
    expected = counts.sum() / 256
    # 255 degrees of freedom: mean 255, standard deviation 22.6.
    assert abs(float(((counts - expected) ** 2 / expected).sum()) - 255) < 5 * 22.6
    for bad in ({"seed": -1}, {"seed": 0, "start": -1}):
        with pytest.raises(ValueError, match="at least 0"):
            uniform_noise(1, (2, 2), **bad)
    with pytest.raises(ValueError, match="shape"):
        uniform_noise(1, (0, 2), seed=0)


def test_random_weights_need_a_config_alone(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "transformer", tmp_path / "weights")
    (tmp_path / "weights" / Path(WEIGHTS).name).unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        synth.run(config(tmp_path / "weights", tmp_path / "a"))
    synth.run(config(tmp_path / "weights", tmp_path / "b", random_weights=True, precision="bf16"))
    assert read_manifest(tmp_path / "b").metadata["dtype"] == "bfloat16"


def edit_config(**values: Any) -> Any:
    def apply(folder: Path) -> None:
        path = folder / "transformer" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return apply


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (edit_tensors(lambda t: t.pop("proj_out_2.bias")), r"missing keys proj_out_2\.bias"),
        (edit_tensors(lambda t: t.update(extra=torch.zeros(1))), "unexpected keys extra"),
        (edit_config(num_layers=2), r"transformer_blocks\.1"),
        (edit_config(attention_head_dim=4), "transformer"),
        (lambda f: (f / WEIGHTS).write_bytes(b"nonsense"), "transformer"),
        (lambda f: (f / "transformer" / "config.json").write_text("{"), "transformer"),
        (lambda f: (f / "scheduler" / "scheduler_config.json").write_text("{"), "scheduler"),
        (shutil.rmtree, "does not exist"),
    ],
)
def test_weights_that_do_not_fit_are_refused(trained: Path, tmp_path: Path, change: Any, names: str) -> None:
    folder = damaged(trained, tmp_path / "weights", change)
    with pytest.raises(CheckpointError, match=names):
        synth.run(config(folder, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_diffusion_needs_weights_and_a_directory(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="weights: missing"):
        config(None, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="which is a file"):
        synth.run(config(trained, tmp_path / "file"))


def test_training_resumes_to_the_same_weights(trained: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    whole, seen = NoisyBatches.__iter__, []
    last = -(-360 // TINY.batch_size) + 4  # the held-out batches come first, then three steps of epoch one

    def limited(self: NoisyBatches) -> Any:
        for batch in whole(self):
            seen.append(batch)
            if len(seen) > last:
                raise Stop
            yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NoisyBatches, "__iter__", limited)
        with pytest.raises(Stop):
            diffusion_model.run(TINY, tmp_path / "model", progress=False)
    assert (tmp_path / "model" / "checkpoints" / "step-00000003").exists()
    diffusion_model.run(TINY, tmp_path / "model", resume=True, progress=False)
    assert (tmp_path / "model" / WEIGHTS).read_bytes() == (trained / WEIGHTS).read_bytes()


def test_labels_are_dropped_for_the_whole_network_at_once() -> None:
    model = build_dit(TINY, 10).train()
    images, steps = torch.randn(64, 1, 8, 8), torch.zeros(64).long()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    labels = torch.zeros(64).long()
    first, second = (model(images, timestep=steps, class_labels=labels).sample for _ in range(2))
    assert torch.equal(first, second)  # nothing random left inside


def test_noisy_batches_are_what_the_process_says() -> None:
    class Set:
        images = torch.randint(0, 256, (50, 3, 8, 8), dtype=torch.uint8)
        labels = torch.arange(50) % 10

    noising = diffusion_model._noising(TINY)
    settings = replace(TINY, batch_size=4000)
    noisy, steps, labels, clean, weight = next(iter(NoisyBatches(Set(), noising, settings, 10, batches=1)))
    alpha = noising.alphas_cumprod[steps][:, None, None, None]
    noise = (noisy - alpha.sqrt() * clean) / (1 - alpha).sqrt()
    assert abs(float(noise.mean())) < 0.01
    assert abs(float(noise.std()) - 1) < 0.01
    dropped = float((labels == 10).float().mean())
    assert abs(dropped - 0.1) < 0.03
    ratio = (alpha / (1 - alpha)).flatten()
    torch.testing.assert_close(weight, ratio.clamp(max=5.0))
    assert clean.min() >= -1
    assert clean.max() <= 1


def test_an_image_size_that_patches_do_not_fill_is_refused() -> None:
    with pytest.raises(ConfigError, match="image_size: got 10, accepted: a multiple of patch_size=4"):
        DiffusionConfig(image_size=10)

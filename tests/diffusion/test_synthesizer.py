"""The sampling loop and the synthesizer: who makes an image, when, and after what, must not show in it."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from kdfast.data import ShardError, ShardLoader, ShardWriter, read_manifest
from kdfast.diffusion import DDIMScheduler, Synthesizer, sources
from kdfast.diffusion.parts import shard_range
from kdfast.diffusion.sampling import sample_latents, sample_noise, step_generators
from kdfast.errors import ConfigError, DataError

CLASSES, SIZE = 4, 8


def tiny_dit(channels: int = 1, out_channels: int | None = None) -> torch.nn.Module:
    torch.manual_seed(0)
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=channels,
        out_channels=out_channels or channels,
        num_layers=1,
        sample_size=SIZE,
        patch_size=4,
        num_embeds_ada_norm=CLASSES,
    ).eval()


def synthesizer(model: torch.nn.Module | None = None, **options: Any) -> Synthesizer:
    settings: dict[str, Any] = {"num_inference_steps": 3, "seed": 5, **options}
    scheduler = settings.pop("scheduler", None) or DDIMScheduler(prediction_type="sample")
    return Synthesizer(model or tiny_dit(), scheduler, **settings)


def write(made: Synthesizer, directory: Path, images: int = 23, **options: Any) -> Any:
    return made.write(directory, images, **{"batch_size": 4, "samples_per_shard": 6, **options})


def contents(directory: Path) -> dict[str, str]:
    files = [p for p in directory.rglob("*") if p.is_file() and p.name != ".lock"]
    return {str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


# --- noise ---------------------------------------------------------------------------------------------------------


def test_noise_belongs_to_the_key_and_not_to_the_batch() -> None:
    together = sample_noise(3, [0, 1, 2], [7, 7, 9], (2, 4))
    alone = torch.cat([sample_noise(3, [c], [i], (2, 4)) for c, i in ((0, 7), (1, 7), (2, 9))])
    assert torch.equal(together, alone)


def test_noise_is_standard_normal_and_differs_between_all_keys() -> None:
    rows = [
        sample_noise(s, [c], [i], (4096,), attempt=a)
        for s in (0, 1)
        for c in (0, 1)
        for i in (0, 1)
        for a in (0, 1)
    ]
    stacked = torch.cat(rows).double()
    correlation = stacked @ stacked.T / 4096
    # 16 streams of 4096: an entry off the diagonal has a standard deviation of 1/64.
    assert (correlation - torch.eye(16, dtype=torch.float64)).abs().max() < 6 / 64
    assert abs(float(stacked.mean())) < 6 / 256


def test_noise_of_a_key_never_changes() -> None:
    # Sets in the field are resumed by later versions.
    expected = [-0.973176, 0.646503, -0.3119]
    np.testing.assert_allclose(sample_noise(1, [2], [3], (3,))[0].numpy(), expected, atol=5e-5)


def test_paper_rng_gives_all_classes_the_same_noise() -> None:
    noise = sample_noise(0, [0, 1, 2], [5, 5, 6], (8,), paper_rng=True)
    assert torch.equal(noise[0], noise[1])
    assert not torch.equal(noise[0], noise[2])


def test_step_generators_belong_to_the_key() -> None:
    both = [torch.randn(3, generator=g) for g in step_generators(0, [1, 2], [0, 0])]
    [second] = [torch.randn(3, generator=g) for g in step_generators(0, [2], [0])]
    assert torch.equal(both[1], second)
    assert not torch.equal(both[0], both[1])


@pytest.mark.parametrize(
    ("seed", "classes", "indices", "names"),
    [
        (-1, [0], [0], "seed"),
        (0, [-1], [0], "classes"),
        (0, [0], [-1], "indices"),
        (0, [0, 1], [0], "indices"),
    ],
)
def test_bad_keys_are_refused(seed: int, classes: list[int], indices: list[int], names: str) -> None:
    with pytest.raises(ValueError, match=names):
        sample_noise(seed, classes, indices, (1,))


# --- sampling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_sampling_equals_a_plain_loop_over_diffusers(scale: float) -> None:
    model, ours, theirs = tiny_dit(), DDIMScheduler(), diffusers.DDIMScheduler()
    labels, noise = torch.tensor([0, 3]), torch.randn(2, 1, SIZE, SIZE)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(5)
    x = noise
    with torch.no_grad():
        for t in theirs.timesteps:
            conditional = model(x, timestep=t[None], class_labels=labels).sample
            free = model(x, timestep=t[None], class_labels=torch.full_like(labels, CLASSES)).sample
            x = theirs.step(free + scale * (conditional - free), t, x).prev_sample
    made = sample_latents(model, ours, noise, labels, guidance_scale=scale, null_class=CLASSES)
    torch.testing.assert_close(made, x, rtol=1e-4, atol=1e-5)


def test_without_guidance_there_is_no_unconditional_pass() -> None:
    seen = []
    model = tiny_dit()
    model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(2)
    for scale in (1.0, 2.0):
        sample_latents(
            model,
            scheduler,
            torch.randn(3, 1, 8, 8),
            torch.zeros(3).long(),
            guidance_scale=scale,
            null_class=4,
        )
    assert seen == [3, 3, 6, 6]


def test_guidance_without_a_null_class_is_refused() -> None:
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match="null_class"):
        sample_latents(tiny_dit(), scheduler, torch.randn(1, 1, 8, 8), torch.tensor([0]), guidance_scale=2.0)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_learned_variance_channels_are_left_aside(scale: float) -> None:
    made = synthesizer(tiny_dit(channels=3, out_channels=6), guidance_scale=scale, cfg_channels=2)
    images, _ = made.sample([0, 1], [0, 0])
    assert images.shape == (2, 3, SIZE, SIZE)


def test_guiding_fewer_channels_changes_the_image() -> None:
    model = tiny_dit(channels=3)
    for parameter in model.parameters():  # fresh adaLN weights barely tell classes apart
        torch.nn.init.normal_(parameter, std=0.3)
    some, every = (
        synthesizer(model, guidance_scale=4.0, cfg_channels=c).sample([1], [0])[0] for c in (1, None)
    )
    assert not torch.equal(some, every)


# --- the synthesizer -----------------------------------------------------------------------------------------------


def test_an_image_does_not_depend_on_its_batch() -> None:
    made = synthesizer(eta=1.0)
    together, _ = made.sample([0, 1, 2, 3], [4, 4, 4, 5])
    alone = torch.cat([made.sample([c], [i])[0] for c, i in ((0, 4), (1, 4), (2, 4), (3, 5))])
    # Matrix products of another size may round otherwise.
    assert (together.int() - alone.int()).abs().max() <= 1
    assert len({image.numpy().tobytes() for image in together}) == 4


def test_labels_and_balance(tmp_path: Path) -> None:
    result = write(synthesizer(), tmp_path, classes=[3, 1])
    assert (result.images, result.written, result.refused, result.complete) == (23, 23, 0, True)
    manifest = read_manifest(tmp_path)
    assert manifest.complete
    assert manifest.class_counts == {1: 11, 3: 12}
    with ShardLoader(tmp_path, 23, shuffle=False, loader="torch") as loader:
        _, labels = next(iter(loader))
    assert labels.tolist() == [3, 1] * 11 + [3]


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_ranks_make_the_same_files_as_one_process(tmp_path: Path, ranks: int) -> None:
    made = synthesizer()
    write(made, tmp_path / "one")
    # In an order of their own, the last first: whichever finishes last joins the parts.
    results = [write(made, tmp_path / "many", rank=r, world_size=ranks) for r in reversed(range(ranks))]
    assert results[-1].complete
    assert not results[0].complete
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    again = write(made, tmp_path / "many", rank=0, world_size=ranks, resume=True)
    assert (again.written, again.complete) == (0, True)


def test_shards_are_shared_out_whole_and_once() -> None:
    for images, ranks in ((1, 3), (23, 2), (24, 4), (100, 7)):
        spans = [shard_range(images, 6, rank, ranks) for rank in range(ranks)]
        assert [n for start, stop in spans for n in range(start, stop)] == list(range(images))
        assert all(start % 6 == 0 for start, stop in spans if stop > start)


def test_a_larger_set_begins_with_the_smaller_one(tmp_path: Path) -> None:
    made = synthesizer()
    write(made, tmp_path / "grown", 9)
    write(made, tmp_path / "grown", 23, resume=True)
    write(made, tmp_path / "fresh", 23)
    assert contents(tmp_path / "grown") == contents(tmp_path / "fresh")


def killed_child(work: Any) -> int:
    """Run ``work`` in a forked process and return the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def die_at_sync(count: int) -> None:
    """From here on the ``count``-th flush to disk is the process's last act."""
    flush, seen = os.fsync, [0]

    def fsync(descriptor: int) -> None:
        seen[0] += 1
        if seen[0] == count:
            os.kill(os.getpid(), signal.SIGKILL)
        flush(descriptor)

    os.fsync = fsync


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_at_any_point_the_same_set_comes_of_resuming(tmp_path: Path, ranks: int) -> None:
    made = synthesizer()
    write(made, tmp_path / "whole")
    kills = 0
    for sync in (1, 2, 4, 5, 7, 9, 11, 13, 16, 20) if ranks == 1 else (3, 8, 14):
        folder = tmp_path / f"killed-{sync}"

        def interrupted(sync: int = sync, folder: Path = folder) -> None:
            die_at_sync(sync)
            for rank in range(ranks):
                write(made, folder, rank=rank, world_size=ranks, resume=True)

        kills += killed_child(interrupted) == signal.SIGKILL
        for rank in range(ranks):
            write(made, folder, rank=rank, world_size=ranks, resume=True)
        assert contents(folder) == contents(tmp_path / "whole"), f"killed at flush {sync}"
    assert kills >= (9 if ranks == 1 else 3)


def test_another_runs_folder_is_refused_and_both_are_named(tmp_path: Path) -> None:
    write(synthesizer(seed=1), tmp_path)
    other = tiny_dit()
    torch.nn.init.ones_(next(other.parameters()))
    for ranks in (1, 2):
        with pytest.raises(ShardError, match="seed is 1 there, 2 here"):
            write(synthesizer(seed=2), tmp_path, resume=True, world_size=ranks)
        with pytest.raises(ShardError, match="weights is"):
            write(synthesizer(other, seed=1), tmp_path, resume=True, world_size=ranks)
    with pytest.raises(ShardError, match="already holds"):
        write(synthesizer(seed=1), tmp_path)


class Failing(torch.nn.Module):
    """A denoiser whose output is not finite for chosen calls."""

    def __init__(self, bad_calls: range) -> None:
        super().__init__()
        self.inner, self.calls, self.bad_calls = tiny_dit(), 0, bad_calls
        self.config = self.inner.config

    def forward(self, x: torch.Tensor, **options: Any) -> Any:
        output = self.inner(x, **options)
        if self.calls in self.bad_calls:
            output.sample[0] = float("nan")
        self.calls += 1
        return output


def test_non_finite_latents_are_refused_counted_and_drawn_again(tmp_path: Path) -> None:
    result = write(synthesizer(Failing(range(1))), tmp_path, 8)
    assert (result.written, result.refused) == (8, 1)
    assert json.loads((tmp_path / "refused.jsonl").read_text()) == {"class": 0, "index": 0, "attempt": 0}
    assert read_manifest(tmp_path).num_samples == 8
    expected, _ = synthesizer()._decode(synthesizer()._latents([0], [0], 1)), None
    refused, _ = synthesizer(Failing(range(1))).sample([0], [0])
    assert torch.equal(refused, expected)


def test_weights_that_give_nothing_finite_are_an_error_that_names_the_image(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"class 2, index 1: .*not finite"):
        synthesizer(Failing(range(10**6))).sample([2], [1])


def test_guidance_is_what_was_asked_for() -> None:
    model = tiny_dit()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    made = synthesizer(model, guidance_scale=4.0)
    expected = sample_latents(
        model,
        made.scheduler,
        sample_noise(5, [1], [2], (1, SIZE, SIZE)),
        torch.tensor([1]),
        guidance_scale=4.0,
        null_class=CLASSES,
    )
    assert torch.equal(made.sample([1], [2])[0], made._decode(expected))
    assert not torch.equal(
        made.sample([1], [2])[0], synthesizer(model, guidance_scale=2.0).sample([1], [2])[0]
    )


def test_a_resumed_run_makes_the_same_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Rounding differs between batches of different sizes, so equal files need equal batches.
    made, calls = synthesizer(), []
    draw = made._finite_latents
    monkeypatch.setattr(made, "_finite_latents", lambda c, i: (calls.append(list(zip(c, i))), draw(c, i))[1])
    write(made, tmp_path / "whole")
    whole = calls.copy()
    calls.clear()
    write(made, tmp_path / "grown", 6)
    write(made, tmp_path / "grown", 23, resume=True)
    assert calls == whole


def test_captured_loops_of_a_set_have_one_size_wherever_a_run_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A short batch is filled up also where nothing longer came before: resumed at it, or another rank's only one."""
    sizes: dict[str, set[int]] = {}
    for name, ranks in (("undisturbed", 1), ("ranks", 4)):
        for rank in range(ranks):
            made = synthesizer()
            monkeypatch.setattr(made.source, "_mode", "graph")
            plain = sources.SamplingLoop
            monkeypatch.setattr(sources, "SamplingLoop", lambda step, mode, plain=plain: plain(step, "eager"))
            write(made, tmp_path / name, 19, rank=rank, world_size=ranks)
            monkeypatch.setattr(sources, "SamplingLoop", plain)
            sizes[f"{name} {rank}"] = set(made.source._loops)
            assert made.source.fill_to == 0  # a batch that is sampled by itself is as long as it is
    assert sizes == {name: {4} for name in sizes}
    assert contents(tmp_path / "undisturbed") == contents(tmp_path / "ranks")


def test_a_crash_after_joining_leaves_neither_parts_nor_lock_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = synthesizer()
    write(made, tmp_path / "one")
    write(made, tmp_path / "two", rank=0, world_size=2)

    def crash(path: Path, **_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("kdfast.diffusion.parts.shutil.rmtree", crash)
        with pytest.raises(KeyboardInterrupt):
            write(made, tmp_path / "two", rank=1, world_size=2)
    assert (tmp_path / "two" / "parts").exists()
    write(made, tmp_path / "two", rank=1, world_size=2, resume=True)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_a_vae_turns_latents_into_images() -> None:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
    )
    made = synthesizer(tiny_dit(channels=4), vae=vae)
    images, _ = made.sample([0], [0])
    with torch.no_grad():
        latents = made._latents([0], [0], 0)
        expected = vae.decode(latents / vae.config.scaling_factor).sample
    assert images.shape == (1, 3, 2 * SIZE, 2 * SIZE)
    torch.testing.assert_close(
        images.float(), (expected * 127.5 + 127.5).clamp(0, 255).round(), atol=1, rtol=0
    )


def test_a_pipeline_brings_its_parts() -> None:
    class Pipeline:
        transformer, vae, scheduler = tiny_dit(), None, DDIMScheduler(prediction_type="sample")

    made, _ = Synthesizer(Pipeline(), num_inference_steps=3, seed=5).sample([1], [1])
    assert torch.equal(made, synthesizer().sample([1], [1])[0])


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"guidance_scale": 0.5}, r"guidance_scale: got 0\.5"),
        ({"num_inference_steps": 1001}, "num_inference_steps: got 1001, accepted: 1 to 1000"),
        ({"num_inference_steps": 0}, "num_inference_steps: got 0"),
        ({"scheduler": diffusers.DDIMScheduler()}, "no step_cfg; use the scheduler of the same name"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        synthesizer(**options)


def test_something_that_is_no_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="pipeline_or_model: got str"):
        Synthesizer("DiT-XL/2", DDIMScheduler())
    with pytest.raises(ConfigError, match="scheduler: got None"):
        Synthesizer(tiny_dit())
    with pytest.raises(ConfigError, match="num_classes"):
        Synthesizer(torch.nn.Linear(1, 1), DDIMScheduler())
    with pytest.raises(ConfigError, match="sample_shape"):
        Synthesizer(torch.nn.Linear(1, 1), DDIMScheduler(), num_classes=3)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"classes": [4]}, "classes: got 4, accepted: 0 to 3"),
        ({"classes": []}, r"classes: got \[\]"),
        ({"classes": [1, 1]}, r"classes: got \[1, 1\]"),
        ({"images": 0}, "images: got 0"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"rank": 2, "world_size": 2}, "rank: got 2, accepted: 0 to 1"),
    ],
)
def test_a_bad_plan_is_refused(tmp_path: Path, options: dict[str, Any], names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        write(synthesizer(), tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_an_unknown_class_is_refused() -> None:
    with pytest.raises(ConfigError, match="classes: got 7, accepted: 0 to 3"):
        synthesizer().sample([7], [0])


def test_a_set_inside_a_larger_one_begins_at_a_shard(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="first_sample: got 3"):
        ShardWriter(tmp_path, samples_per_shard=2, first_sample=3)

"""Loading shards: every sample as it was written, in an order that a state can name, on both loaders."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdfast.data import ShardError, ShardLoader, ShardWriter
from kdfast.data.schedule import Schedule
from kdfast.errors import CheckpointError, MissingExtraError
from tests.support.shards import good, jpeg, label, numbered, numbers, pictures, tar, write_numbered


@pytest.fixture(params=["dali", "torch"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 numbered images in 10 classes."""
    return write_numbered(tmp_path_factory.mktemp("numbered"), 50)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 JPEGs of 48x48."""
    folder = tmp_path_factory.mktemp("photos")
    with ShardWriter(folder, samples_per_shard=5, num_classes=4) as writer:
        writer.write(pictures(12, 48), torch.arange(12) % 4)
    return folder


def seen(batches: Iterator[tuple[torch.Tensor, torch.Tensor]] | ShardLoader) -> list[list[int]]:
    """The number of each image, batch by batch; checks that labels go with their images."""
    out = []
    for images, labels in batches:
        found = numbers(images)
        assert labels.tolist() == [number % 10 for number in found]
        out.append(found)
    return out


def flat(batches: list[list[int]]) -> list[int]:
    return [number for batch in batches for number in batch]


def test_images_and_labels_come_back_as_written(shards: Path, kind: str) -> None:
    with ShardLoader(shards, 16, shuffle=False, loader=kind) as loader:
        assert (len(loader), loader.num_samples, loader.num_classes) == (4, 50, 10)
        for _ in range(2):
            batches = list(loader)
            assert [len(labels) for _, labels in batches] == [16, 16, 16, 2]
            images, labels = (torch.cat(part) for part in zip(*batches))
            assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
            assert torch.equal((images * 255).round().to(torch.uint8), numbered(50))
            assert torch.equal(labels, torch.arange(50) % 10)


def test_batches_stay_as_they_are_while_later_ones_are_decoded(shards: Path, kind: str) -> None:
    with ShardLoader(shards, 5, shuffle=False, loader=kind) as loader:
        kept, copies = [], []
        for images, _ in loader:
            kept.append(images)
            copies.append(images.clone())
        list(loader)
        assert all(torch.equal(a, b) for a, b in zip(kept, copies))


def test_both_loaders_give_the_same_batches(photos: Path) -> None:
    options: dict[str, Any] = dict(seed=3, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    with (
        ShardLoader(photos, 5, **options) as dali,
        ShardLoader(photos, 5, loader="torch", **options) as plain,
    ):
        for (a, x), (b, y) in zip(dali, plain):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
            assert torch.equal(x, y)


def test_both_loaders_scale_and_crop_alike(tmp_path: Path) -> None:
    # Wide, tall and square ones: the shorter side becomes 20, the middle is cut out.
    with ShardWriter(tmp_path) as writer:
        writer.write(pictures(2, 40)[:, :, :, :30], [0, 1])
        writer.write(pictures(2, 64)[:, :, :50], [2, 3])
        writer.write(pictures(1, 20), [4])
    with ShardLoader(tmp_path, 8, shuffle=False, image_size=20) as loader:
        ((dali, _),) = list(loader)
    with ShardLoader(tmp_path, 8, shuffle=False, image_size=20, loader="torch") as loader:
        ((plain, _),) = list(loader)
    assert dali.shape == plain.shape == (5, 3, 20, 20)
    # The two round edges and weights differently; a shift by half a pixel would differ by 5 levels.
    assert (dali - plain).abs().mean() * 255 < 2
    assert (dali - plain).abs().max() * 255 < 12
    torch.testing.assert_close(dali[4], plain[4], rtol=0, atol=1e-5)


def test_images_of_several_sizes_need_a_size(tmp_path: Path) -> None:
    with ShardWriter(tmp_path) as writer:
        writer.write(pictures(1, 16), [0])
        writer.write(pictures(1, 24), [0])
    with pytest.raises(ValueError, match=r"image_size: images are of several sizes, e.g. 16x16 .* and 24x24"):
        ShardLoader(tmp_path, 2)


def test_normalisation_is_per_channel(shards: Path, kind: str) -> None:
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
    with ShardLoader(shards, 50, shuffle=False, loader=kind, mean=mean, std=std) as loader:
        ((images, _),) = list(loader)
    centre, spread = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    expected = (numbered(50).double() / 255 - centre) / spread
    torch.testing.assert_close(images.double(), expected, rtol=0, atol=1e-5)


def test_shuffling_follows_from_seed_and_epoch(shards: Path, kind: str) -> None:
    with ShardLoader(shards, 16, seed=5, loader=kind) as loader:
        first, second = flat(seen(loader)), flat(seen(loader))
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second != list(range(50))
    with ShardLoader(shards, 16, seed=5, loader="torch") as again:
        assert [flat(seen(again)), flat(seen(again))] == [first, second]
        again.set_epoch(0)
        assert flat(seen(again)) == first
    with ShardLoader(shards, 16, seed=6, loader="torch") as other:
        assert flat(seen(other)) != first


@pytest.mark.parametrize("taken", [0, 1, 3, 4, 6])
def test_a_state_names_the_very_next_sample(shards: Path, kind: str, taken: int) -> None:
    with ShardLoader(shards, 16, seed=1, loader=kind) as loader:
        everything = [batch for _ in range(3) for batch in seen(loader)]
    with ShardLoader(shards, 16, seed=1, loader=kind) as loader:
        states = [loader.state_dict()]
        for _ in range(2):
            for _ in loader:
                states.append(loader.state_dict())
    with ShardLoader(shards, 16, seed=1, loader=kind) as loader:
        loader.load_state_dict(states[taken])
        rest = [batch for _ in range(3 - taken // 4) for batch in seen(loader)]
    assert rest == everything[taken:]


def test_a_state_survives_json_and_loading_into_a_used_loader(shards: Path, kind: str) -> None:
    import json

    with ShardLoader(shards, 16, loader=kind) as loader:
        running = iter(loader)
        next(running)
        state = json.loads(json.dumps(loader.state_dict()))
        expected = seen(running)
        list(loader)
        loader.load_state_dict(state)
        assert seen(loader) == expected


def test_an_abandoned_epoch_leaves_no_trace_in_the_next(shards: Path, kind: str) -> None:
    with ShardLoader(shards, 8, seed=2, loader=kind) as loader:
        fresh = [seen(loader) for _ in range(4)]
    with ShardLoader(shards, 8, seed=2, loader=kind) as loader:
        for _ in loader:
            break
        assert seen(loader) == fresh[1]
        old = iter(loader)
        next(old)
        new = iter(loader)
        # One decoder serves one epoch at a time.
        assert next(old, None) is None
        assert seen(new) == fresh[3]


@pytest.mark.parametrize("last_batch", ["partial", "fill"])
def test_ranks_share_the_set(shards: Path, last_batch: str) -> None:
    loaders = [
        ShardLoader(shards, 6, rank=rank, world_size=3, last_batch=last_batch, loader="torch", seed=4)
        for rank in range(3)
    ]
    counts = Counter(number for loader in loaders for number in flat(seen(loader)))
    assert sorted(counts) == list(range(50))
    assert len({len(loader) for loader in loaders}) == 1
    assert max(counts.values()) == (1 if last_batch == "partial" else 2)


@settings(max_examples=300, deadline=None)
@given(
    samples=st.integers(1, 60),
    batch_size=st.integers(1, 13),
    world_size=st.integers(1, 7),
    shuffle=st.booleans(),
    last_batch=st.sampled_from(["partial", "fill"]),
    epoch=st.integers(0, 5),
)
def test_every_schedule(
    samples: int, batch_size: int, world_size: int, shuffle: bool, last_batch: Any, epoch: int
) -> None:
    if world_size > samples:
        with pytest.raises(ValueError, match="world_size: got"):
            Schedule(samples, batch_size, shuffle, 0, 0, world_size, last_batch)
        return
    per_rank = -(-samples // world_size)
    counts: Counter[int] = Counter()
    for rank in range(world_size):
        schedule = Schedule(samples, batch_size, shuffle, 0, rank, world_size, last_batch)
        batches = schedule.batches(epoch)
        assert len(batches) == len(schedule) == -(-per_rank // batch_size)
        sizes = [len(batch) for batch in batches]
        if last_batch == "fill":
            assert sizes == [batch_size] * len(batches)
        else:
            assert max(sizes) <= batch_size
            # An empty batch only where there is no other way.
            assert min(sizes) > 0 or batch_size == 1
        counts.update(number for batch in batches for number in batch.tolist())
    assert sorted(counts) == list(range(samples))
    if last_batch == "partial":
        assert set(counts.values()) == {1}
    else:
        # Repeated as evenly as can be.
        assert max(counts.values()) - min(counts.values()) <= 1


def test_an_empty_batch_has_the_right_shape(shards: Path, kind: str) -> None:
    with ShardLoader(shards, 1, rank=3, world_size=4, loader=kind, shuffle=False) as loader:
        batches = list(loader)
    assert len(batches) == len(loader) == 13
    assert sorted(len(labels) for _, labels in batches) == [0] + [1] * 12
    assert all(images.shape[1:] == (3, 8, 8) for images, _ in batches)


def test_more_ranks_than_samples(tmp_path: Path) -> None:
    write_numbered(tmp_path, 3)
    with pytest.raises(ValueError, match="world_size: got 4 ranks for 3 usable samples"):
        ShardLoader(tmp_path, 1, rank=0, world_size=4)


def test_augment_sees_plain_images_and_is_seeded_by_place(shards: Path, kind: str) -> None:
    def jitter(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        assert images.min() >= 0
        assert images.max() <= 1
        return images + torch.rand(images.shape, generator=generator)

    options: dict[str, Any] = dict(augment=jitter, loader=kind, mean=(0.5,) * 3, std=(0.5,) * 3)
    with ShardLoader(shards, 16, **options) as loader:
        epochs = [[images for images, _ in loader] for _ in range(2)]
    with ShardLoader(shards, 16, **options) as loader:
        next(iter(loader))
        state = loader.state_dict()
        loader.load_state_dict(state)
        resumed = [images for images, _ in loader]
    assert all(torch.equal(a, b) for a, b in zip(resumed, epochs[0][1:]))
    assert not torch.equal(epochs[0][0], epochs[1][0])
    assert epochs[0][0].min() < -0.5


def test_regimes_by_name(shards: Path) -> None:
    with ShardLoader(shards, 50, loader="torch", augment="none") as loader:
        assert sorted(flat(seen(loader))) == list(range(50))
    with ShardLoader(shards, 50, loader="torch", augment="high") as loader:
        ((images, _),) = list(loader)
    assert images.shape == (50, 3, 8, 8)
    assert len(images.unique()) > 100


def test_on_error_raise_names_shard_key_and_fault(tmp_path: Path, kind: str) -> None:
    files = good(4)
    files[2] = (files[2][0], b"garbage")
    tar(tmp_path / "a.tar", files)
    with pytest.raises(ShardError, match=r"a.tar, key '001': is neither JPEG nor PNG"):
        ShardLoader(tmp_path, 2, loader=kind)


def test_on_error_skip_quarantines_and_goes_on(tmp_path: Path, kind: str) -> None:
    files = good(6)
    files[2] = (files[2][0], b"garbage")
    files[9] = (files[9][0], label(-5))
    tar(tmp_path / "a.tar", files)
    with ShardLoader(tmp_path, 3, loader=kind, on_error="skip", shuffle=False) as loader:
        assert [labels.tolist() for _, labels in loader] == [[0, 2, 3], [5]]
        assert [fault.key for fault in loader.quarantined] == ["001", "004"]


def hidden_fault(folder: Path) -> Path:
    """Headers and end are sound, so preflight lets it pass; no decoder gets an image out of it."""
    data = bytearray(jpeg(seed=2))
    frame = data.index(b"\xff\xc0")
    # A quantisation table that nobody defined.
    data[frame + 12] = 3
    files = good(10)
    files[8] = (files[8][0], bytes(data))
    return tar(folder / "a.tar", files).parent


def test_a_record_that_breaks_the_decoder_is_named(tmp_path: Path, kind: str) -> None:
    with ShardLoader(hidden_fault(tmp_path), 3, shuffle=False, loader=kind) as loader:
        batches = iter(loader)
        assert next(batches)[1].tolist() == [0, 1, 2]
        with pytest.raises(ShardError, match=r"a.tar, key '004': .*on_error='skip'"):
            next(batches)


def test_a_record_that_breaks_the_decoder_costs_nothing_else(tmp_path: Path, kind: str) -> None:
    with ShardLoader(hidden_fault(tmp_path), 3, shuffle=False, on_error="skip", loader=kind) as loader:
        expected = [[0, 1, 2], [3, 5], [6, 7, 8], [9]]
        for _ in range(2):
            assert [labels.tolist() for _, labels in loader] == expected
        assert [fault.key for fault in loader.quarantined] == ["004"]
        next(iter(loader))
        state = loader.state_dict()
    with ShardLoader(tmp_path, 3, shuffle=False, on_error="skip", loader=kind) as loader:
        loader.load_state_dict(state)
        assert [fault.key for fault in loader.quarantined] == ["004"]
        assert [labels.tolist() for _, labels in loader] == expected[1:]


def test_a_shard_that_shrinks_while_it_is_read(tmp_path: Path, kind: str) -> None:
    tar(tmp_path / "a.tar", good(8))
    with ShardLoader(tmp_path, 1, shuffle=False, loader=kind) as loader:
        batches = iter(loader)
        next(batches)
        with open(tmp_path / "a.tar", "r+b") as stream:
            stream.truncate(4000)
        with pytest.raises(ShardError, match=r"a.tar, key '00\d': the shard was cut short"):
            list(batches)


def test_cmyk_grey_and_rotated_images_load_alike(tmp_path: Path) -> None:
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6
    files = []
    for i, data in enumerate([jpeg(), jpeg(mode="CMYK"), jpeg(mode="L"), jpeg(exif=exif)]):
        files += [(f"{i}.jpg", data), (f"{i}.i32", label(i))]
    tar(tmp_path / "a.tar", files)
    with (
        ShardLoader(tmp_path, 4, shuffle=False) as dali,
        ShardLoader(tmp_path, 4, shuffle=False, loader="torch") as plain,
    ):
        torch.testing.assert_close(next(iter(dali))[0], next(iter(plain))[0], rtol=0, atol=1e-5)


def test_a_folder_without_a_manifest_loads(tmp_path: Path, kind: str) -> None:
    tar(tmp_path / "b.tar", good(2))
    tar(tmp_path / "a.tar", good(3))
    with ShardLoader(tmp_path, 10, shuffle=False, loader=kind) as loader:
        assert loader.num_classes is None
        assert next(iter(loader))[1].tolist() == [0, 1, 2, 0, 1]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_loads(tmp_path: Path) -> None:
    write_numbered(tmp_path, 5)
    tmp_path.chmod(0o500)
    try:
        assert flat(seen(ShardLoader(tmp_path, 5, shuffle=False, loader="torch"))) == list(range(5))
        assert not (tmp_path / ".preflight").exists()
    finally:
        tmp_path.chmod(0o700)


def test_a_folder_that_takes_no_cache_loads(tmp_path: Path) -> None:
    write_numbered(tmp_path, 5)
    # As in a read-only folder, also for root: the cache's place is taken.
    (tmp_path / ".preflight").write_text("")
    assert flat(seen(ShardLoader(tmp_path, 5, shuffle=False, loader="torch"))) == list(range(5))


def test_torch_worker_processes_change_nothing(shards: Path) -> None:
    with ShardLoader(shards, 8, loader="torch") as loader:
        expected = [seen(loader) for _ in range(3)]
    with ShardLoader(shards, 8, loader="torch", num_workers=2) as loader:
        assert seen(loader) == expected[0]
        next(iter(loader))
        assert seen(loader) == expected[2]


def test_one_pipeline_serves_every_epoch(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import kdfast.data.dali as dali

    built = []
    real = dali._build
    monkeypatch.setattr(dali, "_build", lambda config: built.append(config) or real(config))
    with ShardLoader(shards, 16) as loader:
        for _ in range(3):
            list(loader)
        next(iter(loader))
        list(loader)
    assert len(built) == 1


@pytest.mark.parametrize("kind, package", [("dali", "nvidia.dali"), ("torch", "simplejpeg")])
def test_a_missing_package_is_named_and_not_replaced(
    shards: Path, monkeypatch: pytest.MonkeyPatch, kind: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=r'pip install "kdfast\[dali\]"'):
        ShardLoader(shards, 4, loader=kind)


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"batch_size": 8}, {"shuffle": False}, {"last_batch": "fill"}, {"world_size": 2}]
)
def test_refuses_a_state_of_another_order(shards: Path, change: dict[str, Any]) -> None:
    options: dict[str, Any] = dict(batch_size=16, loader="torch")
    state = ShardLoader(shards, **options).state_dict()
    other = ShardLoader(shards, **{**options, **change})
    with pytest.raises(CheckpointError, match=f"loader state: {next(iter(change))} is"):
        other.load_state_dict(state)


def test_refuses_a_state_of_other_data(shards: Path, tmp_path: Path) -> None:
    state = ShardLoader(shards, 16, loader="torch").state_dict()
    other = ShardLoader(write_numbered(tmp_path, 49), 16, loader="torch")
    with pytest.raises(CheckpointError, match="loader state: data is"):
        other.load_state_dict(state)
    loader = ShardLoader(shards, 16, loader="torch")
    with pytest.raises(CheckpointError, match="batch 99 is not a place"):
        loader.load_state_dict({**state, "batch": 99})


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"batch_size": 0}, ValueError, "batch_size: got 0"),
        ({"seed": -1}, ValueError, "seed: got -1"),
        ({"rank": 2, "world_size": 2}, ValueError, "rank: got rank 2 of world_size 2"),
        ({"on_error": "ignore"}, ValueError, "on_error: got 'ignore'"),
        ({"last_batch": "drop"}, ValueError, "last_batch: got 'drop'"),
        ({"loader": "ffcv"}, ValueError, "loader: got 'ffcv'"),
        ({"image_size": 0}, ValueError, "image_size: got 0"),
        ({"mean": (0.5,) * 3}, ValueError, "mean, std: give both or neither"),
        ({"mean": (0.5,) * 2, "std": (1.0,) * 3}, ValueError, "mean: got 2 values"),
        ({"mean": (0.5,) * 3, "std": (1.0, 1.0, 0.0)}, ValueError, "std: got .* must be positive"),
        ({"augment": 3}, TypeError, "augment: got int"),
        (
            {"augment": "flip"},
            ValueError,
            "augment: got 'flip'; accepted: 'none', 'standard', 'high', 'extreme'",
        ),
        ({"device": "meta"}, ValueError, "device: got 'meta'"),
    ],
)
def test_refuses_bad_options(
    shards: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ShardLoader(shards, **{"batch_size": 4, **options})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_refuses_cuda_where_there_is_none(shards: Path) -> None:
    with pytest.raises(ValueError, match="torch sees no CUDA device"):
        ShardLoader(shards, 4, device="cuda")


def test_dalis_own_reader_reads_our_shards(shards: Path) -> None:
    from nvidia.dali import Pipeline, fn, types

    with Pipeline(batch_size=50, num_threads=1, device_id=None) as pipeline:
        images, labels = fn.readers.webdataset(
            paths=[str(path) for path in sorted(shards.glob("*.tar"))],
            index_paths=[str(path) for path in sorted(shards.glob("*.idx"))],
            ext=["png", "i32"],
            dtypes=[types.UINT8, types.INT32],
            missing_component_behavior="error",
            dont_use_mmap=True,
        )
        pipeline.set_outputs(fn.decoders.image(images), labels)
    pipeline.build()
    images, labels = pipeline.run()
    assert np.array_equal(labels.as_array().ravel(), np.arange(50) % 10)
    assert np.array_equal(images.as_array(), numbered(50).permute(0, 2, 3, 1).numpy())


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["dali", "torch"])
def test_cuda_gives_what_the_cpu_gives(photos: Path, kind: str) -> None:
    options: dict[str, Any] = dict(seed=3, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    with (
        ShardLoader(photos, 5, **options) as cpu,
        ShardLoader(photos, 5, device="cuda", loader=kind, **options) as gpu,
    ):
        for (a, x), (b, y) in zip(cpu, gpu):
            assert (b.device.type, y.device.type) == ("cuda", "cuda")
            # The GPU's inverse DCT rounds differently: about a level.
            torch.testing.assert_close(a, b.cpu(), rtol=0, atol=4 / 255 / 0.2)
            assert torch.equal(x, y.cpu())

"""Any teacher, by one spec in every command: timm's, 🤗's, one's own; its classes are its own."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from kdfast.cli.app import app
from kdfast.data import ShardLoader, ShardWriter
from kdfast.data.datasets import load_dataset
from kdfast.data.labelled import Fit, rgb_tensor
from kdfast.errors import CheckpointError, ConfigError, DataError
from kdfast.experiments.common.networks import TeacherKeys, load_teacher
from kdfast.experiments.distill import run as distill
from kdfast.models import create_model
from kdfast.training.model_io import ModelConfig, load_model, load_model_config, save_model
from tests.conftest import INTERPRETING
from tests.support.shards import pictures

NETS = '''
import torch
from torch import nn

class Dict(nn.Module):
    """Returns what 🤗 models do."""

    def __init__(self, num_classes):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(4, num_classes)

    def forward(self, x):
        return {"logits": self.head(self.body(x))}

def make(num_classes=7):
    torch.manual_seed(5)
    return Dict(num_classes)

def with_facts():
    network = make(4)
    network.pretrained_cfg = {"mean": (0.1,) * 3, "std": (0.2,) * 3, "input_size": (3, 16, 16), "crop_pct": 0.5}
    return network

def nothing():
    return 3
'''


@pytest.fixture
def nets(tmp_path: Path) -> str:
    (tmp_path / "nets.py").write_text(NETS)
    return str(tmp_path / "nets.py")


class FakeTimm(ModuleType):
    """timm's rule: a classifier is kept only when nobody says how many classes there are, or says its own number."""

    def __init__(self) -> None:
        super().__init__("timm")

    def create_model(self, name: str, pretrained: bool = False, in_chans: int = 3, **more: Any) -> nn.Module:
        count = more.get("num_classes", 37)
        torch.manual_seed(1 if count == 37 and pretrained else torch.seed() % 1000)
        network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, count))
        facts = {"input_size": (3, 16, 16), "mean": (0.4,) * 3, "std": (0.3,) * 3, "crop_pct": 0.875}
        network.num_classes, network.pretrained_cfg = count, {**facts, "interpolation": "bicubic"}  # type: ignore[assignment]
        return network


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", FakeTimm())


def test_a_timm_teacher_keeps_its_classifier_whatever_the_data_say(timm: None, tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "shards", num_classes=10) as writer:
        writer.write(pictures(20, 16), torch.arange(20) % 10)
    one, described = load_teacher("timm:pets")
    other, _ = load_teacher("timm:pets")
    assert described.num_classes == 37
    assert torch.equal(one[2].weight, other[2].weight)  # type: ignore[index]
    assert (described.crop_pct, described.interpolation, described.mean) == (0.875, "bicubic", (0.4,) * 3)
    values = {
        "teacher": "timm:pets",
        "student": "gap2",
        "data": str(tmp_path / "shards"),
        "cutmix_alpha": None,
    }
    values |= {"epochs": 1, "batch_size": 10, "device": "cpu", "loader": "torch", "tensorboard": False}
    distill.run(*distill.parse(values), tmp_path / "out", progress=False)
    assert load_model_config(tmp_path / "out").num_classes == 37
    # Labels that count are the teacher's classes, or nothing goes.
    with pytest.raises(DataError, match="has 10 classes, accepted: the teacher's 37"):
        distill.run(*distill.parse({**values, "labels": "hard"}), tmp_path / "none", progress=False)


def folder(root: Path, classes: int, side: int = 16) -> Path:
    for number in range(classes):
        place = root / f"class{number:03}"
        place.mkdir(parents=True)
        Image.fromarray(np.full((side, side, 3), number, np.uint8)).save(place / "a.png")
    return root


def test_real_images_of_another_task_will_do_where_labels_do_not_count(tmp_path: Path) -> None:
    save_model(tmp_path / "t", create_model("gap2", 3), ModelConfig("gap2", 3, 16, classes=("a", "b", "c")))
    aircraft = folder(tmp_path / "aircraft", 9)
    values: dict[str, Any] = {"teacher": str(tmp_path / "t"), "student": "gap2", "data": str(aircraft)}
    values |= {"batch_size": 4, "device": "cpu", "label_column": "fine_label"}
    for more in (
        {"method": "dmkd"},
        {"method": "surrogate"},
        {"method": "dmkd", "labels": "both", "hard_labels": "teacher"},
    ):
        config, method = distill.parse({**values, **more})
        assert math.isfinite(
            distill.run(config, method, tmp_path / "o", dry_run=True, progress=False)["loss"]
        )
    config, method = distill.parse({**values, "method": "dmkd", "labels": "hard"})
    with pytest.raises(DataError, match="as images: "):
        distill.run(config, method, tmp_path / "o", dry_run=True, progress=False)


def test_the_first_images_of_a_set_serve_as_a_smaller_one(tmp_path: Path) -> None:
    """One synthesis serves every point of DM-KD's Fig. 5: a prefix of the large set is the small one."""
    images, labels = pictures(24, 16), torch.arange(24) % 6
    for name, count in (("large", 24), ("small", 12)):
        with ShardWriter(tmp_path / name, samples_per_shard=6, num_classes=6) as writer:
            writer.write(images[:count], labels[:count])
    common: dict[str, Any] = {"batch_size": 5, "loader": "torch", "seed": 3}
    with (
        ShardLoader(tmp_path / "large", images=12, **common) as part,
        ShardLoader(tmp_path / "small", **common) as small,
    ):
        assert (part.num_samples, len(part), part.labels.tolist()) == (12, len(small), list(range(6)))
        for (a, b), (c, d) in zip(part, small, strict=True):
            assert torch.equal(a, c)
            assert torch.equal(b, d)
        assert part.state_dict()["images"] == 12
    for wrong in (0, 25):
        with pytest.raises(ValueError, match=f"images: got {wrong}; accepted: 1 to the set's 24"):
            ShardLoader(tmp_path / "large", images=wrong, **common)
    save_model(tmp_path / "t", create_model("gap2", 6), ModelConfig("gap2", 6, 16))
    values = {
        "teacher": str(tmp_path / "t"),
        "student": "gap2",
        "data": str(tmp_path / "large"),
        "device": "cpu",
    }
    values |= {"loader": "torch", "epochs": 1, "batch_size": 4, "tensorboard": False, "data_images": 12}
    assert distill.run(*distill.parse(values), tmp_path / "out", progress=False)["steps"] == 3
    with pytest.raises(DataError, match="has 24 images, data_images asks for 25"):
        distill.run(*distill.parse({**values, "data_images": 25}), tmp_path / "none", progress=False)


def ringed(side: int, share: float = 0.0625) -> Image.Image:
    """A grey picture with a red border: whoever measures it with the border in sees it."""
    pixels = np.full((side, side, 3), 128, np.uint8)
    edge = int(share * side)
    mask = np.ones((side, side), bool)
    mask[edge:-edge, edge:-edge] = False
    pixels[mask] = (255, 0, 0)
    return Image.fromarray(pixels)


def test_what_lies_outside_the_crop_is_not_seen(tmp_path: Path) -> None:
    """Resize 256, crop 224: 16 pixels of 256 go on each side, which is the whole ring."""
    red = lambda tensor: ((tensor[0] > 200) & (tensor[1] < 60)).float().mean().item()  # noqa: E731
    assert red(rgb_tensor(ringed(512), 224)) > 0.2
    assert red(rgb_tensor(ringed(512), Fit(224, 0.875))) == 0
    assert rgb_tensor(ringed(512), Fit(224, 0.875)).shape == (3, 224, 224)
    assert rgb_tensor(Image.new("RGB", (500, 375)), Fit(224, 0.875, "bicubic")).shape == (3, 224, 224)
    for name in ("a", "b"):
        (tmp_path / "set" / name).mkdir(parents=True)
        ringed(512).save(tmp_path / "set" / name / "x.png")
    whole, cropped = (load_dataset(tmp_path / "set", image_size=224, crop_pct=c)[0][0] for c in (1.0, 0.875))
    assert red(whole) > 0.2
    assert red(cropped) == 0
    with pytest.raises(ValueError, match=r"crop_pct: got 1\.5; accepted"):
        load_dataset(tmp_path / "set", image_size=224, crop_pct=1.5)
    with pytest.raises(ValueError, match="interpolation: got 'cubic'; accepted: bilinear, bicubic"):
        load_dataset(tmp_path / "set", image_size=224, interpolation="cubic")


def test_the_crop_travels_with_the_network(tmp_path: Path) -> None:
    save_model(
        tmp_path / "t",
        create_model("gap2", 3),
        ModelConfig("gap2", 3, 16, crop_pct=0.875, interpolation="bicubic"),
    )
    assert (load_model_config(tmp_path / "t").crop_pct, load_model_config(tmp_path / "t").interpolation) == (
        0.875,
        "bicubic",
    )
    document = json.loads((tmp_path / "t" / "config.json").read_text())
    for key, wrong in (("crop_pct", 2), ("interpolation", "magic")):
        (tmp_path / "t" / "config.json").write_text(json.dumps({**document, key: wrong}))
        with pytest.raises(CheckpointError, match=key):
            load_model_config(tmp_path / "t")


def test_a_network_of_ones_own_by_file_and_factory(nets: str, tmp_path: Path) -> None:
    mine = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    network, described = load_teacher(f"{nets}:make", TeacherKeys(**mine), image_size=16)
    assert (described.num_classes, described.image_size, described.mean) == (7, 16, (0.5,) * 3)
    assert network(torch.zeros(2, 3, 16, 16)).shape == (2, 7)  # the dict's logits
    trained = {name: torch.ones_like(value) for name, value in network.state_dict().items()}
    save_file(trained, tmp_path / "w.safetensors")
    keys = TeacherKeys(**mine, weights=str(tmp_path / "w.safetensors"))
    loaded, _ = load_teacher(f"{nets}:make", keys, image_size=16)
    assert all(torch.equal(value, trained[name]) for name, value in loaded.state_dict().items())
    _, told = load_teacher(f"{nets}:with_facts")
    assert (told.num_classes, told.image_size, told.std, told.crop_pct) == (4, 16, (0.2,) * 3, 0.5)
    (tmp_path / "names.txt").write_text("a\nb\nc\nd\n")
    assert load_teacher(f"{nets}:with_facts", TeacherKeys(class_names=str(tmp_path / "names.txt")))[
        1
    ].classes == (*"abcd",)


def test_what_one_s_own_network_lacks_is_said(nets: str, tmp_path: Path) -> None:
    def refused(
        error: type[Exception], message: str, source: str, size: int | None = 16, **keys: Any
    ) -> None:
        with pytest.raises(error, match=message):
            load_teacher(source, TeacherKeys(**keys), image_size=size)

    mine = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    refused(ConfigError, "mean, std, image_size: missing", f"{nets}:make", None)
    refused(ConfigError, "has no 'mke'; it has .*make", f"{nets}:mke")
    refused(ConfigError, "got int from it, accepted: a torch.nn.Module", f"{nets}:nothing")
    refused(ConfigError, "is no file", f"{tmp_path}/none.py:make")
    refused(ConfigError, r"does not take images \[1, 3, 2, 2\]", f"{nets}:make", 2, **mine)
    torch.save({}, tmp_path / "w.pt")
    refused(CheckpointError, "a pickle can run code", f"{nets}:make", **mine, weights=str(tmp_path / "w.pt"))
    save_file({"x": torch.zeros(1)}, tmp_path / "w.safetensors")
    refused(CheckpointError, "does not fit", f"{nets}:make", **mine, weights=str(tmp_path / "w.safetensors"))
    refused(ConfigError, "weights: got w for teacher runs/t, accepted: none", "runs/t", weights="w")
    (tmp_path / "names.txt").write_text("a\nb\n")
    refused(
        ConfigError,
        "got 2 names in .*accepted: one for each of the network's 4",
        f"{nets}:with_facts",
        class_names=str(tmp_path / "names.txt"),
    )
    refused(ConfigError, "class_names: .*No such file", f"{nets}:with_facts", class_names="none")


def test_a_folder_s_config_runs_nobody_s_code(nets: str, tmp_path: Path) -> None:
    network, described = load_teacher(f"{nets}:with_facts")
    save_model(tmp_path / "run", network, described)
    with pytest.raises(
        CheckpointError, match=r"names code, .*which a folder is not trusted with; name it yourself"
    ):
        load_model(tmp_path / "run")
    again, told = load_teacher(
        f"{nets}:with_facts", TeacherKeys(weights=str(tmp_path / "run/model.safetensors"))
    )
    assert (told.num_classes, told.crop_pct) == (4, 0.5)
    assert torch.equal(again.head.weight, network.head.weight)


@pytest.fixture(scope="module")
def hugging(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny classifier of 🤗 Transformers in a folder, with names and a processor."""
    transformers = pytest.importorskip("transformers")
    place = tmp_path_factory.mktemp("hf")
    config = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], num_labels=10, layer_type="basic"
    )
    config.id2label = {n: f"digit {n}" for n in range(10)}
    config.label2id = {name: n for n, name in config.id2label.items()}
    torch.manual_seed(0)
    transformers.ResNetForImageClassification(config).save_pretrained(place)
    facts = {
        "image_processor_type": "ConvNextImageProcessor",
        "size": {"shortest_edge": 16},
        "crop_pct": 0.875,
    }
    facts |= {
        "image_mean": [0.4, 0.4, 0.4],
        "image_std": [0.2, 0.2, 0.2],
        "resample": 3,
        "do_normalize": True,
    }
    (place / "preprocessor_config.json").write_text(json.dumps(facts))
    return str(place)


def test_a_teacher_of_transformers_tells_what_feeds_it(hugging: str, tmp_path: Path) -> None:
    network, described = load_teacher(f"hf:{hugging}")
    assert network(torch.zeros(2, 3, 16, 16)).shape == (2, 10)
    assert (described.num_classes, described.image_size, described.crop_pct) == (10, 16, 0.875)
    assert (described.mean, described.interpolation) == ((0.4,) * 3, "bicubic")
    assert described.classes[3] == "digit 3"
    with pytest.raises(ConfigError, match="cannot be had from 🤗 Transformers"):
        load_teacher(f"hf:{tmp_path}")


@pytest.mark.skipif(INTERPRETING, reason="trains networks")
def test_every_command_takes_every_kind(hugging: str, nets: str, tmp_path: Path) -> None:
    """🤗's and one's own: distil, eval, select and data-report, end to end."""
    own = [f"{nets}:with_facts"]
    with ShardWriter(tmp_path / "shards", num_classes=4) as writer:
        writer.write(pictures(40, 16), torch.arange(40) % 4)
    data = str(tmp_path / "shards")
    quick = [
        "student=gap2",
        f"data={data}",
        "epochs=1",
        "batch_size=20",
        "device=cpu",
        "loader=torch",
        "tensorboard=false",
    ]
    for number, teacher in enumerate(([f"hf:{hugging}"], own)):
        (tmp_path / "r.yaml").write_text(f"method: dmkd\nteacher: {teacher[0]}\ncutmix_alpha: null\n")
        out = str(tmp_path / f"student{number}")
        ran = command("distill", "--recipe", str(tmp_path / "r.yaml"), "--out", out, "-q", *quick)
        assert ran.exit_code == 0, ran.stderr
        for words in (
            (
                "select",
                data,
                teacher[0],
                "--out",
                f"{out}-set",
                "--budget",
                "8",
                "loader=torch",
                "device=cpu",
            ),
            ("data-report", data, teacher[0], "--out", f"{out}-page", "loader=torch", "device=cpu"),
        ):
            ran = command(*words, "-q")
            assert ran.exit_code == 0, ran.stderr
    ran = command("eval", *own, "--data", data, "--loader", "torch", "-q", "--json")
    assert ran.exit_code == 0, ran.stderr
    assert "accuracy" in json.loads(ran.stdout)


def command(*words: str) -> Any:
    return CliRunner().invoke(app, list(words))


def test_a_student_may_be_one_s_own(nets: str, tmp_path: Path) -> None:
    save_model(tmp_path / "t", create_model("gap2", 3), ModelConfig("gap2", 3, 16))
    with ShardWriter(tmp_path / "shards", num_classes=3) as writer:
        writer.write(pictures(9, 16), torch.arange(9) % 3)
    values = {"teacher": str(tmp_path / "t"), "student": f"{nets}:make", "data": str(tmp_path / "shards")}
    values |= {"epochs": 1, "batch_size": 9, "device": "cpu", "loader": "torch", "tensorboard": False}
    distill.run(*distill.parse(values), tmp_path / "out", progress=False)
    keys = TeacherKeys(weights=str(tmp_path / "out/model.safetensors"))
    assert load_teacher(f"{nets}:make", keys)[1].num_classes == 3


REAL = """
import sys, numpy as np, torch, timm, torchvision
from pathlib import Path
from PIL import Image
from kdfast.data.labelled import Fit, rgb_tensor
from kdfast.experiments.common.networks import TeacherKeys, load_teacher
from kdfast.experiments.distill import run as distill
from kdfast.data import ShardWriter
from timm.data import create_transform, resolve_data_config
from torchvision import transforms as T

root = Path(sys.argv[1])
rng = np.random.default_rng(0)
for shape in ((375, 500), (500, 375), (512, 512), (331, 517)):
    image = Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8))
    wanted = T.Compose([T.Resize(256), T.CenterCrop(224), T.PILToTensor()])(image)
    assert torch.equal(rgb_tensor(image, Fit(224, 0.875)), wanted), shape
    for name in ("resnet18.tv_in1k", "vit_small_patch16_224.augreg_in1k", "convnext_tiny.fb_in1k"):
        config = resolve_data_config({}, model=timm.create_model(name))
        wanted = create_transform(**config)(image)
        fit = Fit(config["input_size"][-1], config["crop_pct"], config["interpolation"])
        mean, std = (torch.tensor(config[k]).view(3, 1, 1) for k in ("mean", "std"))
        ours = (rgb_tensor(image, fit).float() / 255 - mean) / std
        assert (ours - wanted).abs().max() < 1e-5, (shape, name)

real = timm.create_model
def offline(name, pretrained=False, **more):
    torch.manual_seed(1)
    return real(name, pretrained=False, **more)
timm.create_model = offline
network, described = load_teacher("timm:resnet18.tv_in1k")
assert (described.num_classes, described.image_size, described.crop_pct) == (1000, 224, 0.875), described
with ShardWriter(root / "shards", num_classes=10, image_format="png") as writer:
    writer.write(torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8), torch.arange(8))
values = {"method": "dmkd", "teacher": "timm:resnet18.tv_in1k", "student": "timm:mobilenetv3_small_050"}
values["data"] = str(root / "shards")
values |= {"epochs": 1, "batch_size": 4, "device": "cpu", "loader": "torch", "tensorboard": False, "image_size": 64}
out = distill.run(*distill.parse(values), root / "out", progress=False)
assert out["steps"] == 2
models = torchvision.models
student = models.get_model("shufflenet_v2_x0_5", weights=None)
print("fine")
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_timm_and_torchvision_themselves(tmp_path: Path) -> None:
    """In a Python that has both, beside a torch that they import with: ``KDFAST_MODELS_PYTHON``."""
    import os

    python = os.environ.get("KDFAST_MODELS_PYTHON", sys.executable)
    if subprocess.run(
        [python, "-c", "import timm, torchvision"], capture_output=True, check=False
    ).returncode:
        pytest.skip("needs a Python with timm and torchvision: set KDFAST_MODELS_PYTHON")
    # kernels/ and recipes/ inside the package, as an installed one has them.
    root, stage = Path(__file__).parents[2], tmp_path / "site" / "kdfast"
    stage.mkdir(parents=True)
    for child in (*(root / "kdfast").iterdir(), root / "kernels", root / "recipes"):
        (stage / child.name).symlink_to(child)
    ran = subprocess.run(
        [python, "-c", REAL, str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(stage.parent)},
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert "fine" in ran.stdout

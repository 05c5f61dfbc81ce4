"""Fixed seeds, damaged inputs: every parser succeeds or raises a kdfast error, within two seconds and a gibibyte."""

from __future__ import annotations

import contextlib
import json
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from kdfast.benchmarks.compare import load as load_results
from kdfast.data import ShardLoader, check_shards, read_manifest
from kdfast.data.codec import decode, measure
from kdfast.data.surrogate.glsl import translate
from kdfast.data.surrogate.programs import load_programs, save_programs
from kdfast.data.surrogate.shaders import random_programs
from kdfast.documents import parse_json
from kdfast.errors import KDFastError
from kdfast.experiments.common.recipe import load_recipe
from kdfast.experiments.distill.config import DistillConfig
from kdfast.models import create_model
from kdfast.training.checkpoint import load_checkpoint, save_checkpoint
from kdfast.training.metrics import read_metrics
from kdfast.training.model_io import ModelConfig, load_model, save_model
from tests.data.test_codec_damage import SEEDS
from tests.support.hostile import mutations
from tests.support.shards import good, tar, write_numbered

SLOWEST = 2.0
RECIPE = b"""method: dmkd
teacher: runs/teacher
student: resnet8
data: out/set
lr: 1e-4
milestones: [10, 20]
augment: [crop, flip]
seed: 0x10
when: 2020-01-01 10:20:30
text: "a: b"
"""
LOG = b'{"kind": "train", "step": 1, "loss": 0.5}\n{"kind": "eval", "step": 1, "accuracy": 0.5}\n' * 3
RESULTS = (
    b'{"format": 1, "name": "cpu", "errors": [], "cases": [{"key": "k", "suite": "s", "providers": ['
    b'{"name": "kdfast", "config": "", "seconds": {"wall": [1.0, 2.0]}}]}]}'
)
GLSL = [
    b"void main(){ float a = 1.0, b = a; gl_FragColor = vec4(a, b, 0.0, 1.0); }",
    b"#define S(a,b) smoothstep(a,b,x)\nvoid mainImage(out vec4 o, in vec2 u){ o=vec4(u/iResolution.xy,0,1); }",
    b"float i,e;for(;i++<9.;e=.1){vec3 p=vec3((FC.xy*2.-r)/r.y,1);p.xy*=rotate2D(t);o.rgb+=p;}",
]


def file(name: str, content: bytes, read: Callable[[Path], object]) -> Callable[[Path, bytes], object]:
    def use(folder: Path, data: bytes) -> object:
        (folder / name).write_bytes(data)
        return read(folder)

    return use


def prepare(case: str, folder: Path) -> tuple[list[bytes], Callable[[bytes], object], type[Exception]]:
    """Sound inputs, what reads one, and what it may raise."""
    if case == "tar":
        sound = tar(folder / "a.tar", good(2)).read_bytes()
        return [sound], lambda data: ((folder / "a.tar").write_bytes(data), check_shards(folder)), KDFastError
    if case == "manifest":
        sound = (write_numbered(folder, 12) / "manifest.json").read_bytes()
        path = folder / "manifest.json"
        return (
            [sound],
            lambda data: (path.write_bytes(data), read_manifest(folder), check_shards(folder)),
            KDFastError,
        )
    if case == "cache":
        write_numbered(folder, 12)
        expected = check_shards(folder)
        path = next((folder / ".preflight").iterdir())

        def same(data: bytes) -> None:
            path.write_bytes(data)
            assert check_shards(folder).label.tolist() == expected.label.tolist()

        return [path.read_bytes()], same, KDFastError
    if case == "recipe":
        path = folder / "recipe.yaml"
        return [RECIPE], lambda data: (path.write_bytes(data), load_recipe(path)), KDFastError
    if case == "programs":
        path = folder / "programs.json"
        save_programs(random_programs(3, seed=0), path)
        return [path.read_bytes()], lambda data: (path.write_bytes(data), load_programs(path)), KDFastError
    if case == "glsl":
        return GLSL, lambda data: translate(data.decode(errors="replace")), KDFastError
    if case in ("checkpoint", "states"):
        states = {"model": {"a": torch.ones(2)}, "place": {"step": 1, "rng": (1, [2, b"x"])}}
        where = save_checkpoint(folder, states, step=1)
        path = where / ("checkpoint.json" if case == "checkpoint" else "states.json")
        listing = where / "checkpoint.json"

        def load(data: bytes) -> None:
            path.write_bytes(data)
            if case == "states":  # with a right checksum, or nothing is looked at
                import hashlib

                document = json.loads(listing.read_text())
                document["files"]["states.json"] = {
                    "bytes": len(data),
                    "sha256": hashlib.sha256(data).hexdigest(),
                }
                listing.write_text(json.dumps(document))
            load_checkpoint(where)

        return [path.read_bytes()], load, KDFastError
    if case in ("config", "weights"):
        save_model(folder, create_model("resnet8", 2), ModelConfig("resnet8", 2, 16))
        path = folder / ("config.json" if case == "config" else "model.safetensors")
        return [path.read_bytes()], lambda data: (path.write_bytes(data), load_model(folder)), KDFastError
    if case in ("log", "results"):
        path = folder / ("metrics.jsonl" if case == "log" else "results.json")
        return (
            [LOG if case == "log" else RESULTS],
            lambda data: (
                path.write_bytes(data),
                read_metrics(path) if case == "log" else load_results(path),
            ),
            KDFastError,
        )
    if case == "loader":
        loader = ShardLoader(write_numbered(folder, 12), 4, loader="torch")

        def restore(data: bytes) -> None:
            loader.load_state_dict(parse_json(data.decode(errors="replace"), what="state", error=KDFastError))

        return [json.dumps(loader.state_dict()).encode()], restore, KDFastError
    return SEEDS, lambda data: (measure(data), decode(data)), ValueError


CASES = [
    "tar",
    "manifest",
    "cache",
    "recipe",
    "programs",
    "glsl",
    "checkpoint",
    "states",
    "config",
    "weights",
    "image",
    "log",
    "results",
    "loader",
]


@contextlib.contextmanager
def a_gibibyte_more() -> Iterator[None]:
    """Whoever allocates more than that gets a MemoryError, which is none of kdfast's errors."""
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (held + (1 << 30), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def fuzz(case: str, folder: Path, count: int) -> tuple[int, int]:
    """Inputs that were taken, and those that were refused by name."""
    seeds, read, error = prepare(case, folder)
    taken = refused = 0
    for number, data in enumerate(mutations(seeds, count, seed=CASES.index(case))):
        started = time.process_time()  # not the clock: others may have the processors
        try:
            with a_gibibyte_more():
                read(data)
            taken += 1
        except error as problem:
            refused += 1
            words = len(str(problem))
            if not 0 < words < 4000:
                raise AssertionError(f"{case}, input {number}: a message of {words} letters") from problem
        except Exception as problem:
            raise AssertionError(f"{case}, input {number} ({data[:200]!r}): {problem!r}") from problem
        assert time.process_time() - started < SLOWEST, f"{case}, input {number} took too long"
    return taken, refused


@pytest.mark.parametrize("case", CASES)
def test_damage_is_read_or_refused_by_name(case: str, tmp_path: Path) -> None:
    taken, refused = fuzz(case, tmp_path, 60)
    assert taken + refused == 60


@pytest.mark.slow
@pytest.mark.timeout(6000)
@pytest.mark.parametrize("case", CASES)
def test_twenty_thousand_of_each(case: str, tmp_path: Path) -> None:
    taken, refused = fuzz(case, tmp_path, 20_000)
    print(f"{case}: {taken} taken, {refused} refused by name")
    assert taken + refused == 20_000


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x]\nb: *a\n",
        "augment: &a8 [&a7 [&a6 [x, x], *a6, *a6], *a7, *a7]\n",
        "[" * 3000,
        "lr: 1\nlr: 2\n",
        "a: !!int ''\n",
        "a: !!bool x\n",
        "a: !!timestamp x\n",
        "a: 2020-99-99\n",
        "a: " + "9" * 5000 + "\n",
        "a: !!python/object/apply:os.system [ls]\n",
        "a: b: c\n",
        "x" * 200_000,
    ],
    ids=lambda text: text[:20],
)
def test_yaml_that_is_a_trap_is_named_at_once(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    started = time.monotonic()
    with pytest.raises(KDFastError, match=r"recipe .*r\.yaml"):
        load_recipe(tmp_path / "r.yaml")
    assert time.monotonic() - started < SLOWEST


@pytest.mark.parametrize("count", [24, 5000])
def test_glsl_is_translated_in_linear_time(count: int) -> None:
    started = time.monotonic()
    translate("void main(){ float " + "a+," * count + "{")
    translate("#define X float " + "a," * count + "\nvoid main(){}")
    assert time.monotonic() - started < 1


@pytest.mark.parametrize(
    "value", ["lr: .inf", "lr: .nan", "weight_decay: .inf", "seed: 4294967296", "epochs: 10000000000"]
)
def test_numbers_that_no_run_can_use_are_refused(value: str, tmp_path: Path) -> None:
    from kdfast.experiments.common.recipe import build_config

    (tmp_path / "r.yaml").write_text(f"teacher: a\nstudent: resnet8\ndata: x\n{value}\n")
    with pytest.raises(KDFastError, match=value.split(":")[0]):
        build_config(DistillConfig, load_recipe(tmp_path / "r.yaml"), source="r.yaml")

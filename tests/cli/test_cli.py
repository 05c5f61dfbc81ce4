"""The command: what it prints, what it leaves behind, and which code it exits with."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from kdfast.cli.app import app
from kdfast.data import ShardWriter, load_dataset, read_manifest
from kdfast.training import files, load_model, load_model_config, read_metrics

RECIPE = Path(__file__).parents[2] / "recipes" / "dmkd" / "digits.yaml"
TINY = ["epochs=2", "batch_size=256", "tensorboard=false", "device=cpu"]


def call(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def last_line(result: Result) -> str:
    return result.stderr.strip().splitlines()[-1]


def refused(code: int, message: str, *words: object) -> None:
    result = call(*words)
    assert message in result.stderr, result.output
    assert last_line(result).startswith("kdfast: ")
    assert "Traceback" not in result.output
    assert result.exit_code == code


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shards"
    digits = load_dataset("digits", "train", image_size=8)
    with ShardWriter(folder, num_classes=10, image_format="png") as writer:
        writer.write(digits.images[:512], digits.labels[:512])
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("runs") / "teacher"
    values = [*TINY, "image_size=8", "lr=0.1", "batch_size=64"]
    result = call("teach", "--data", "digits", "--model", "resnet8", "--out", out, "-q", "--json", *values)
    assert result.exit_code == 0, result.output
    # Chance is 0.1; 0.90 … 0.97 over 11 seeds and 4 roundings (avx512, avx2, no vectors, without oneDNN), 17 runs.
    assert json.loads(result.stdout)["accuracy"] > 0.5
    return out


def distill(out: Path, teacher: Path, shards: Path, *more: object) -> tuple[object, ...]:
    given = [f"teacher={teacher}", f"data={shards}", *TINY, *(word for word in more if "=" in str(word))]
    flags = [word for word in more if "=" not in str(word)]
    return ("distill", "--recipe", RECIPE, "--out", out, "-q", "--json", *flags, *given)


def test_a_taught_network_is_left_whole(teacher: Path) -> None:
    assert {path.name for path in teacher.iterdir()} == {
        ".run.lock",
        "checkpoints",
        "config.json",
        "metrics.json",
        "metrics.jsonl",
        "model.safetensors",
        "provenance.json",
        "best.safetensors",
        "recipe.yaml",
    }
    config = load_model_config(teacher)
    assert (config.model, config.num_classes, config.image_size) == ("resnet8", 10, 8)
    assert config.classes == tuple("0123456789")
    assert 0 < config.mean[0] < 1
    evaluated = call("eval", teacher, "--data", "digits", "-q", "--json")
    metrics = json.loads((teacher / "metrics.json").read_text())
    assert json.loads(evaluated.stdout) == {
        "accuracy": metrics["accuracy"],
        "top5_accuracy": metrics["top5_accuracy"],
        "images": 360,
    }
    assert [line["epoch"] for line in read_metrics(teacher / "metrics.jsonl") if line["kind"] == "eval"] == [
        1,
        2,
    ]


def test_eval_reads_shards_and_prints_for_people(teacher: Path, shards: Path) -> None:
    result = call("eval", teacher, "--data", shards, "--loader", "torch", "-q")
    assert result.exit_code == 0, result.output
    assert "accuracy" in result.stdout
    assert re.search(r"^images +512$", result.stdout, re.MULTILINE)
    assert "settings" not in result.stdout  # nested: for programs


@pytest.mark.parametrize("loader", ["dali", "torch"])
def test_distill_trains_a_student(tmp_path: Path, teacher: Path, shards: Path, loader: str) -> None:
    result = call(*distill(tmp_path / "s", teacher, shards, "--loader", loader))
    assert result.exit_code == 0, result.output
    metrics = json.loads(result.stdout)
    assert metrics == json.loads((tmp_path / "s" / "metrics.json").read_text())
    assert (metrics["steps"], metrics["images"]) == (4, 1024)
    assert load_model_config(tmp_path / "s").mean == load_model_config(teacher).mean
    fresh, trained = load_model(teacher), load_model(tmp_path / "s")
    assert not torch.equal(next(fresh.parameters()), next(trained.parameters()))


def test_the_same_seed_gives_the_same_student(tmp_path: Path, teacher: Path, shards: Path) -> None:
    runs = [call(*distill(tmp_path / name, teacher, shards, "loader=torch")) for name in "ab"]
    first, second = (json.loads(run.stdout) for run in runs)
    first.pop("seconds"), second.pop("seconds")
    assert first == second
    a, b = (load_model(tmp_path / name).state_dict() for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_dry_run_takes_a_step_and_writes_nothing(tmp_path: Path, teacher: Path, shards: Path) -> None:
    result = call(*distill(tmp_path / "s", teacher, shards, "--dry-run", "loader=torch"))
    assert json.loads(result.stdout)["loss"] > 0
    assert not (tmp_path / "s").exists()
    result = call(
        "teach", "--data", "digits", "--out", tmp_path / "t", "--dry-run", "--json", *TINY, "image_size=8"
    )
    assert json.loads(result.stdout)["loss"] > 0
    assert not (tmp_path / "t").exists()


def test_seeds_report_mean_and_deviation(tmp_path: Path, teacher: Path, shards: Path) -> None:
    out = tmp_path / "s"
    result = call(
        *distill(out, teacher, shards, "--seeds", 2, "epochs=1", "loader=torch", "test_data=digits")
    )
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    values = [json.loads((out / f"seed-{n}" / "metrics.json").read_text())["accuracy"] for n in (0, 1)]
    assert summary["accuracy"] == values
    assert summary["accuracy_mean"] == pytest.approx(sum(values) / 2)
    assert summary["accuracy_std"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)


@pytest.mark.usefixtures("heard")
def test_ctrl_c_checkpoints_exits_130_and_resumes_to_the_same(
    tmp_path: Path, teacher: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kdfast.methods import dmkd

    real, calls = dmkd.kd_kl_div, iter(range(1, 100))

    def interrupted(*args: object, **kwargs: object) -> torch.Tensor:
        if next(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args, **kwargs)  # type: ignore[arg-type]

    whole = call(*distill(tmp_path / "whole", teacher, shards, "loader=torch"))
    with monkeypatch.context() as patched:
        patched.setattr(dmkd, "kd_kl_div", interrupted)
        stopped = call(*distill(tmp_path / "parts", teacher, shards, "loader=torch"))
    assert stopped.exit_code == 130
    assert "step-00000003 is written, go on with --resume" in last_line(stopped)
    refused(2, "holds a run already", *distill(tmp_path / "parts", teacher, shards, "loader=torch"))
    parts = call(*distill(tmp_path / "parts", teacher, shards, "--resume", "loader=torch"))
    expected, got = json.loads(whole.stdout), json.loads(parts.stdout)
    expected.pop("seconds"), got.pop("seconds")
    assert got == expected
    refused(
        1,
        "belongs to a run with other settings (lr: 0.1 before, 0.5 now)",
        *distill(tmp_path / "parts", teacher, shards, "--resume", "loader=torch", "lr=0.5"),
    )


def test_bad_data_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    out = ["--out", tmp_path / "o", "-q", *TINY]
    refused(1, "nowhere", "teach", "--data", tmp_path / "nowhere", *out)
    refused(1, str(tmp_path / "empty"), "teach", "--data", tmp_path / "empty", *out)
    refused(1, "digits has 10 classes, expected 7", "teach", "--data", "digits", *out, "num_classes=7")
    assert not (tmp_path / "o").exists()


def test_bad_shards_and_classes_are_named(tmp_path: Path, teacher: Path, shards: Path) -> None:
    out = tmp_path / "o"
    refused(1, "holds no manifest.json", *distill(out, teacher, tmp_path))
    few = tmp_path / "few"
    with ShardWriter(few, num_classes=3, image_format="png") as writer:
        writer.write(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 2, 0]))
    refused(1, "has 3 classes, accepted: the teacher's 10", *distill(out, teacher, few, "labels=hard"))
    refused(1, "has 3 classes, accepted: 10", "eval", teacher, "--data", few, "-q")
    # Soft labels come from the teacher: any images will do.
    assert call(*distill(out, teacher, few, "--dry-run", "loader=torch", "batch_size=4")).exit_code == 0
    assert read_manifest(shards).num_classes == 10


def test_a_bad_checkpoint_is_named(tmp_path: Path, teacher: Path, shards: Path) -> None:
    refused(1, "does not exist", *distill(tmp_path / "o", tmp_path / "none", shards))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((teacher / "config.json").read_text())
    (broken / "model.safetensors").write_bytes(b"\0" * 100)
    refused(1, "broken/model.safetensors: is not a readable", "eval", broken, "--data", "digits", "-q")


def test_bad_recipes_are_usage_errors(tmp_path: Path, teacher: Path, shards: Path) -> None:
    out = tmp_path / "o"
    refused(2, "cannot be read", "distill", "--recipe", tmp_path / "none.yaml", "--out", out)
    refused(2, "did you mean 'temperature'?", *distill(out, teacher, shards, "temperatur=3"))
    refused(2, "epochs: got 'x'", *distill(out, teacher, shards, "epochs=x"))
    refused(2, "unknown model 'resnet9'", *distill(out, teacher, shards, "student=resnet9"))
    refused(2, "data: missing", "teach", "--out", out)
    (tmp_path / "file").write_text("")
    refused(2, "which is a file", *distill(tmp_path / "file", teacher, shards))
    assert not out.exists()


def test_wrong_words_are_usage_errors() -> None:
    for words in (["distil"], ["teach"], ["eval"], ["distill", "--seeds", "0"], ["teach", "--nonsense"]):
        assert call(*words).exit_code == 2, words


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "sync_file", full)
    refused(
        1, "the disk is full", "teach", "--data", "digits", "--out", tmp_path / "o", *TINY, "image_size=8"
    )


def test_without_dali_the_command_that_installs_it_is_named(
    tmp_path: Path, teacher: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [*(n for n in sys.modules if n.split(".")[:2] == ["nvidia", "dali"]), "nvidia.dali"]:
        monkeypatch.setitem(sys.modules, name, None)
    refused(1, 'pip install "kdfast[dali]"', *distill(tmp_path / "o", teacher, shards))


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = call("--debug", "eval", tmp_path, "--data", "digits")
    assert "Traceback" in result.stderr
    assert result.exit_code == 1
    assert "Traceback" not in call("eval", tmp_path, "--data", "digits").stderr


def test_doctor_examines_this_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    from kdfast.experiments import doctor

    result = call("doctor", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["versions"]["torch"] == torch.__version__
    assert report["ops"]["kdfast::kd_kl"]["cpu"] == "reference"
    assert report["extras"]["train"]["accelerate"]
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "accelerate" else real(name))
    text = call("doctor").stdout
    assert "train: accelerate missing" in text
    assert re.search(r'pip install "kdfast\[[\w,-]*train[\w,-]*\]"', text)
    assert text.count("pip install") == 1
    assert "The core works." in text


@pytest.mark.parametrize(
    ("installed", "cuda", "wanted"),
    [
        ((), "13.0", "dali"),
        ((), "12.8", "dali-cu12"),
        ((), None, "dali"),
        (("nvidia-dali-cuda120",), "13.0", "dali-cu12"),
        (("nvidia-dali-cuda130", "pillow"), "12.8", "dali"),
        (("nvidia-dali-cuda130", "simplejpeg", "pillow"), "12.8", ""),
        (("nvidia-dali-cuda120", "simplejpeg", "pillow"), "13.0", ""),
    ],
)
def test_doctor_never_names_two_builds_of_dali(
    monkeypatch: pytest.MonkeyPatch, installed: tuple[str, ...], cuda: str | None, wanted: str
) -> None:
    from kdfast.experiments import doctor

    packages = {"nvidia-dali-cuda130", "nvidia-dali-cuda120", "simplejpeg", "pillow"}
    monkeypatch.setattr(doctor, "_version", lambda name: None if name in packages - set(installed) else "1.0")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    command = doctor.run().command
    named = [name for name in re.findall(r"[\w-]+", command) if name.startswith("dali")]
    assert named == ([wanted] if wanted else [])


def test_doctor_fails_where_the_core_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    from kdfast import functional

    monkeypatch.setattr(functional, "kd_kl_div", lambda *_: torch.tensor(1.0))
    result = call("doctor")
    assert result.exit_code == 1
    assert "kd_kl_div on" in result.stdout
    assert "The core is broken." in result.stdout


@pytest.mark.parametrize("command", ["", "doctor", "teach", "distill", "eval", "synth", "demo", "report"])
def test_help_says_what_it_does(command: str) -> None:
    result = call(*command.split(), "--help")
    assert result.exit_code == 0
    assert "Usage" in result.stdout


def run(*words: object, **kwargs: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **kwargs)  # type: ignore[call-overload]


def test_the_process_exits_with_the_code_and_takes_debug_anywhere(tmp_path: Path) -> None:
    done = run("-m", "kdfast.cli", "distill", "--recipe", tmp_path / "no.yaml", "--out", tmp_path, "--debug")
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("kdfast: recipe")


def test_without_typer_it_says_which_extra_brings_it() -> None:
    hide = "import sys; sys.modules['typer'] = None; from kdfast.cli import main; main(sys.argv[1:])"
    looked = run("-c", hide, "doctor", "--json")
    assert looked.returncode == 0, looked.stderr
    assert json.loads(looked.stdout)["healthy"]
    done = run("-c", hide, "teach")
    assert done.returncode == 1
    assert done.stderr == (
        "kdfast: the command line needs typer, which is not installed. "
        'Install it with: pip install "kdfast[train]"\n'
    )


@pytest.mark.usefixtures("heard")
@pytest.mark.slow
def test_ctrl_c_from_a_terminal(tmp_path: Path) -> None:
    words = [
        "teach",
        "--data",
        "digits",
        "--out",
        tmp_path / "o",
        "epochs=10000",
        "image_size=8",
        "eval_every=9999",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "kdfast.cli", *map(str, words)], stderr=subprocess.PIPE, text=True
    )
    while not list((tmp_path / "o" / "checkpoints").glob("step-*")) and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "is written, go on with --resume" in errors

"""The commands as Python functions: ``kdfast.NAME(...)`` does in a script what ``kdfast NAME`` does in a shell.

Options are arguments, and so are keys (``kdfast keys NAME``, and the page of keys); ``recipe`` reads a file's first.
Each returns what the command prints, a dict. Errors are exceptions, the same ones that the command says in a line.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

__all__ = [
    "data_report",
    "demo",
    "distill",
    "evaluate",
    "export",
    "label",
    "report",
    "select",
    "synth",
    "teach",
]

T = TypeVar("T")


def teach(
    *,
    out: str | Path,
    recipe: str | Path | None = None,
    resume: bool = False,
    dry_run: bool = False,
    progress: bool = True,
    **keys: Any,
) -> dict[str, Any]:
    """Train a teacher on real, labelled images; ``kdfast teach``.

    Args:
        out: Result directory.
        recipe: YAML whose values ``keys`` go before.
        resume: Go on from the latest checkpoint in ``out``.
        dry_run: Build everything, take one real step, write nothing.
        progress: Say what happens on standard error.
        **keys: ``data``, ``model``, ``epochs``, …

    Returns:
        What ``metrics.json`` holds.

    Raises:
        ConfigError: A key is unknown or invalid, or ``out`` holds another run.
        DataError: The data cannot be used.
    """
    from kdfast.experiments.teach.config import TeachConfig
    from kdfast.experiments.teach.run import run

    config = _config(TeachConfig, recipe, keys, "teach")
    return run(config, out, resume=resume, dry_run=dry_run, progress=progress)


def distill(
    *,
    out: str | Path,
    recipe: str | Path | None = None,
    resume: bool = False,
    dry_run: bool = False,
    seeds: int = 1,
    progress: bool = True,
    **keys: Any,
) -> dict[str, Any]:
    """Distil a student from a teacher; ``kdfast distill``.

    Args:
        out: Result directory.
        recipe: YAML whose values ``keys`` go before.
        resume: Go on from the latest checkpoint in ``out``.
        dry_run: Build everything, take one real step, write nothing.
        seeds: Runs, each with a seed of its own; from 2 on the result has means and deviations.
        progress: Say what happens on standard error.
        **keys: ``method``, ``teacher``, ``student``, ``data``, ``epochs``, …, and the method's own.

    Returns:
        What ``metrics.json`` holds.

    Raises:
        ConfigError: A key is unknown or invalid, or ``out`` holds another run.
        DataError: The data cannot be used.
        CheckpointError: The teacher cannot be read.
    """
    from kdfast.experiments.distill.run import parse, run, run_seeds

    if seeds < 1:
        raise ValueError(f"seeds: got {seeds}, accepted: at least 1")
    values, source = _values(recipe, keys, "distill")
    config, method = parse(values, source=source)
    if seeds > 1 and not dry_run:
        return run_seeds(config, method, out, seeds=seeds, resume=resume, progress=progress)
    return run(config, method, out, resume=resume, dry_run=dry_run, progress=progress)


def synth(*, out: str | Path, recipe: str | Path | None = None, **keys: Any) -> dict[str, Any]:
    """Make labelled synthetic images and write them as shards; ``kdfast synth``.

    Args:
        out: Directory of the shards.
        recipe: YAML whose values ``keys`` go before.
        **keys: ``source``, ``weights``, ``images``, ``resume``, ``progress``, …

    Returns:
        What ``metrics.json`` holds.

    Raises:
        ConfigError: A key is unknown or invalid.
        ShardError: ``out`` holds another set.
    """
    from kdfast.experiments.synth.config import SynthConfig
    from kdfast.experiments.synth.run import run

    return run(_config(SynthConfig, recipe, {"out": str(out), **keys}, "synth"))


def select(*, data: str | Path, teacher: str | Path, out: str | Path, **keys: Any) -> dict[str, Any]:
    """Pick images that cover a teacher's classes evenly, and write them as new shards; ``kdfast select``.

    Args:
        data: Shards, or real labelled images.
        teacher: Directory of a trained network.
        out: Directory of the new shards.
        **keys: ``budget``, ``long_tail``, …

    Returns:
        What ``metrics.json`` holds.

    Raises:
        ConfigError: A key is unknown or invalid.
        DataError: The images cannot be used.
    """
    from kdfast.experiments.select.config import SelectConfig
    from kdfast.experiments.select.run import run

    return run(_config(SelectConfig, None, _looked(data, teacher, out, keys), "select"))


def data_report(*, data: str | Path, teacher: str | Path, out: str | Path, **keys: Any) -> dict[str, Any]:
    """Say what makes a set good or bad for a teacher, as a page; ``kdfast data-report``.

    Args:
        data: Shards, or real labelled images.
        teacher: Directory of a trained network.
        out: Directory of the page.
        **keys: ``regime``, ``test_data``, …

    Returns:
        The page's main numbers, its verdict, and where it is.

    Raises:
        ConfigError: A key is unknown or invalid.
        DataError: The images cannot be used.
    """
    from kdfast.experiments.data_report.config import DataReportConfig
    from kdfast.experiments.data_report.run import run

    return run(_config(DataReportConfig, None, _looked(data, teacher, out, keys), "data-report"))


def label(
    *, data: str | Path, teacher: str | Path, out: str | Path | None = None, **keys: Any
) -> dict[str, Any]:
    """Store a teacher's outputs for a set of images, for ``distill(labels="stored")``; ``kdfast label``.

    Args:
        data: Shards, or real labelled images.
        teacher: Directory of a trained network, or another spec.
        out: Directory of the labels; None is that of the shards.
        **keys: ``views``, ``augment``, ``top_k``, …

    Returns:
        ``images``, ``views``, ``bytes``, ``seconds``, ``images_per_second``, ``out``.

    Raises:
        ConfigError: A key is unknown or invalid, or ``out`` holds labels already.
        DataError: The images cannot be used, or the teacher's outputs are not finite.
    """
    from kdfast.experiments.label.config import LabelConfig
    from kdfast.experiments.label.run import run

    values = {"data": str(data), "teacher": str(teacher), "out": None if out is None else str(out), **keys}
    return run(_config(LabelConfig, None, values, "label"))


def evaluate(
    checkpoint: str | Path, data: str | Path, *, progress: bool = True, **keys: Any
) -> dict[str, Any]:
    """Measure a trained network; ``kdfast eval``.

    Args:
        checkpoint: Directory of a finished run, or a ``.safetensors`` file in it.
        data: Real labelled images, images with masks, or shards.
        progress: Show a progress bar.
        **keys: ``split``, ``batch_size``, ``out``, …

    Returns:
        ``accuracy``, ``top5_accuracy`` and ``images``, or ``miou``, ``pixel_accuracy`` and ``images``.

    Raises:
        CheckpointError: The network cannot be read.
        DataError: The data cannot be used, or has other classes.
    """
    from kdfast.experiments.evaluate.config import EvalConfig
    from kdfast.experiments.evaluate.run import run

    values = {"checkpoint": str(checkpoint), "data": str(data), **keys}
    return run(_config(EvalConfig, None, values, "evaluate"), progress=progress)


def export(
    run: str | Path, *, to: str, weights: str = "last", out: str | Path | None = None
) -> dict[str, Any]:
    """Write a trained network as a file that runs without kdfast; ``kdfast export``.

    Args:
        run: Directory of a finished run.
        to: ``"safetensors"``, ``"torchscript"``, ``"torch.export"`` or ``"onnx"``; ``"shards"``: the images that an
            SSD-KD run inverted, as a labelled set for other students.
        weights: ``"last"``, or ``"best"``, the epoch that measured best.
        out: Directory for the files; None takes ``export`` in the run's own, of shards ``shards``.

    Returns:
        ``file``, ``preprocess``, ``bytes``, and ``difference`` of the file's logits from the network's; of shards
        ``folder``, ``images`` and ``classes``.

    Raises:
        ConfigError: A value is invalid.
        CheckpointError: The network cannot be read.
    """
    from kdfast.experiments.export.config import ExportConfig
    from kdfast.experiments.export.run import run as write

    where = None if out is None else str(out)
    values = {"run": str(run), "to": to, "weights": weights, "out": where}
    return write(_config(ExportConfig, None, values, "export"))


def demo(*, out: str | Path = "runs/demo", **keys: Any) -> dict[str, Any]:
    """Walk the whole path on real digits in minutes; ``kdfast demo``.

    Args:
        out: Directory of the results.
        **keys: ``seed``, ``resume``, ``progress``, …

    Returns:
        The accuracies, and where the page is.

    Raises:
        ConfigError: A key is unknown or invalid, or ``out`` holds something else.
        MissingExtraError: A package that the demo needs is not installed.
    """
    from kdfast.experiments.demo.config import DemoConfig
    from kdfast.experiments.demo.run import run

    return run(_config(DemoConfig, None, {"out": str(out), **keys}, "demo"))


def report(runs: Sequence[str | Path]) -> list[Path]:
    """Draw plots, sample grids and a page from the metrics of runs; ``kdfast report``.

    Args:
        runs: Directories of runs.

    Returns:
        The page and its figures.

    Raises:
        DataError: A run has no metrics.
    """
    from kdfast.experiments.report import run

    return list(run(runs))


def _looked(data: str | Path, teacher: str | Path, out: str | Path, keys: dict[str, Any]) -> dict[str, Any]:
    return {"data": str(data), "teacher": str(teacher), "out": str(out), **keys}


def _values(recipe: str | Path | None, keys: dict[str, Any], command: str) -> tuple[dict[str, Any], str]:
    """The recipe's values under the keys, paths as text, and what an error calls them."""
    from kdfast.experiments.common.recipe import load_recipe

    given = {name: str(value) if isinstance(value, Path) else value for name, value in keys.items()}
    return {**({} if recipe is None else load_recipe(recipe)), **given}, str(recipe or command)


def _config(schema: type[T], recipe: str | Path | None, keys: dict[str, Any], command: str) -> T:
    from kdfast.experiments.common.recipe import checked_config

    values, source = _values(recipe, keys, command)
    return checked_config(schema, values, source=source)

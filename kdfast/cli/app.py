"""The commands. Imports of the work itself stay inside them, so that ``kdfast --help`` is quick."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from kdfast.cli.guard import FAILED, Options, guarded, say

app = typer.Typer(
    name="kdfast",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Knowledge distillation on synthetic data, at the speed of the hardware.",
)

Out = Annotated[
    Path, typer.Option("--out", help="Directory for the results.", metavar="DIR", show_default=False)
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the latest checkpoint in --out.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Build everything, take one real step, write nothing.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Values that go before the recipe's.", show_default=False),
]


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    """Options before any command."""
    Options.debug = debug
    if version:
        import kdfast

        typer.echo(f"kdfast {kdfast.__version__}")
        raise typer.Exit


# `--version` alone is no missing command.
app.info.invoke_without_command = True


@app.command()
@guarded
def doctor(as_json: AsJson = False) -> None:
    """Say what is installed, which backend runs each op, what is missing and what installs it."""
    from kdfast.experiments import doctor as examine

    report = examine.run()
    typer.echo(json.dumps(report.as_dict(), indent=1) if as_json else report.as_text())
    if not report.healthy:
        raise typer.Exit(FAILED)


@app.command()
@guarded
def teach(
    out: Out,
    data: Annotated[
        str | None,
        typer.Option(
            help="digits, a folder with a subfolder for each class, or hf:NAME.", metavar="NAME|DIR"
        ),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="YAML with values for this run.", metavar="FILE")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Network, e.g. resnet20, wrn_40_2.")] = None,
    resume: Resume = False,
    dry_run: DryRun = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
    overrides: Overrides = None,
) -> None:
    """Train a teacher on real, labelled images."""
    from kdfast.experiments.common.recipe import build_config, check_keys
    from kdfast.experiments.teach import run as work

    values = _values(recipe, overrides, data=data, model=model)
    source = str(recipe or "teach")
    check_keys(values, work.TeachConfig, source=source)
    config = build_config(work.TeachConfig, values, source=source)
    _show(work.run(config, out, resume=resume, dry_run=dry_run, progress=not quiet), as_json)


@app.command()
@guarded
def distill(
    recipe: Annotated[
        Path, typer.Option(help="YAML: the method and its values.", metavar="FILE", show_default=False)
    ],
    out: Out,
    resume: Resume = False,
    dry_run: DryRun = False,
    seeds: Annotated[int, typer.Option(min=1, help="Runs, each with its own seed; reports mean ± std.")] = 1,
    loader: Annotated[str | None, typer.Option(help="dali, or torch for the plain loader.")] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
    overrides: Overrides = None,
) -> None:
    """Distil a student from a teacher, as a recipe says."""
    from kdfast.experiments.distill import run as work

    config, method = work.parse(_values(recipe, overrides, loader=loader), source=str(recipe))
    if seeds > 1 and not dry_run:
        result = work.run_seeds(config, method, out, seeds=seeds, resume=resume, progress=not quiet)
    else:
        result = work.run(config, method, out, resume=resume, dry_run=dry_run, progress=not quiet)
    _show(result, as_json)


@app.command("eval")
@guarded
def evaluate(
    checkpoint: Annotated[
        str, typer.Argument(help="Directory of a finished run.", metavar="CKPT", show_default=False)
    ],
    data: Annotated[
        str,
        typer.Option(
            help="digits, a folder (of classes, or images/ and masks/), hf:NAME, or shards.",
            metavar="NAME|DIR",
            show_default=False,
        ),
    ],
    split: Annotated[str, typer.Option(help="train, test or all.")] = "test",
    batch_size: Annotated[int, typer.Option(min=1, help="Images a batch.")] = 256,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    loader: Annotated[str, typer.Option(help="For shards: dali or torch.")] = "dali",
    out: Annotated[
        Path | None, typer.Option(help="Keep the result here, for a report.", metavar="DIR")
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Measure a trained network: top-1 and top-5 accuracy, or mIoU on images with masks."""
    from kdfast.experiments.common.recipe import build_config
    from kdfast.experiments.evaluate import run as work

    values = {
        "checkpoint": checkpoint,
        "data": data,
        "split": split,
        "batch_size": batch_size,
        "device": device,
        "loader": loader,
        "out": None if out is None else str(out),
    }
    _show(work.run(build_config(work.EvalConfig, values, source="eval"), progress=not quiet), as_json)


@app.command()
@guarded
def synth(
    out: Out,
    source: Annotated[
        str | None, typer.Option(help="What makes the images: diffusion, shaders, leaves, glsl or noise.")
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(help="For diffusion: folder with a model as diffusers saves it.", metavar="DIR"),
    ] = None,
    folder: Annotated[
        str | None, typer.Option(help="For glsl: folder with fragment shaders.", metavar="DIR")
    ] = None,
    images: Annotated[int | None, typer.Option(min=1, help="How many.", show_default=False)] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="YAML with values for this run.", metavar="FILE")
    ] = None,
    resume: Resume = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
    overrides: Overrides = None,
) -> None:
    """Make labelled synthetic images and write them as shards."""
    from kdfast.experiments.common.recipe import build_config, check_keys
    from kdfast.experiments.synth import run as work

    options = {"source": source, "weights": weights, "folder": folder, "images": images, "out": str(out)}
    values = _values(recipe, overrides, **options, resume=resume, progress=not quiet)
    check_keys(values, work.SynthConfig, source=str(recipe or "synth"))
    _show(work.run(build_config(work.SynthConfig, values, source=str(recipe or "synth"))), as_json)


@app.command()
@guarded
def demo(
    out: Out = Path("runs/demo"),
    resume: Resume = False,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same numbers.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    loader: Annotated[str, typer.Option(help="dali, or torch for the plain loader.")] = "dali",
    quiet: Quiet = False,
    as_json: AsJson = False,
    overrides: Overrides = None,
) -> None:
    """Walk the whole path on real digits in minutes: teacher, synthetic images, students, a page of results."""
    from kdfast.experiments.common.recipe import build_config, check_keys
    from kdfast.experiments.demo import run as work

    values = _values(
        None,
        overrides,
        out=str(out),
        resume=resume,
        seed=seed,
        device=device,
        loader=loader,
        progress=not quiet,
    )
    check_keys(values, work.DemoConfig, source="demo")
    _show(work.run(build_config(work.DemoConfig, values, source="demo")), as_json)


@app.command()
@guarded
def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Directories of runs.", metavar="RUN...", show_default=False)
    ],
) -> None:
    """Draw plots, sample grids and a page from the metrics of runs."""
    from kdfast.experiments import report as reporting

    for page in reporting.run(runs):
        say(f"wrote {page}")


@app.command()
@guarded
def bench(
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Directory for the results.", metavar="DIR", show_default=False),
    ] = None,
    suite: Annotated[
        list[str] | None,
        typer.Option(help="One suite, such as losses or data; may be repeated.", show_default="all"),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="Fewer and smaller cases.")] = False,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(
            help="Measure nothing: say what moved between two results.json.",
            metavar="BEFORE AFTER",
            show_default=False,
        ),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Time kdfast beside eager PyTorch, torch.compile and peer libraries on this machine."""
    from kdfast import benchmarks
    from kdfast.errors import ConfigError

    if compare is not None and out is None:
        _compare(*compare)
        return
    if out is None or compare is not None:
        raise ConfigError("bench: give either --out DIR, to measure, or --compare BEFORE AFTER")
    settings = benchmarks.make_settings(device, quick=quick)
    show = (lambda line: None) if quiet else say
    result = benchmarks.run(suite or benchmarks.SUITES, settings, say=show, out=out)
    for path in benchmarks.write(result, out):
        say(f"wrote {path}")
    if not benchmarks.succeeded(result):
        raise typer.Exit(FAILED)


def _compare(before: Path, after: Path) -> None:
    from kdfast.benchmarks import compare

    found = compare.moves(compare.load(before), compare.load(after))
    typer.echo(compare.markdown(found), nl=False)
    if any(move.beyond_noise and move.change > 0 for move in found):
        raise typer.Exit(FAILED)


def _values(recipe: Path | None, overrides: list[str] | None, **options: Any) -> dict[str, Any]:
    """Recipe, then options that were given, then KEY=VALUE words: the later wins."""
    from kdfast.experiments.common.recipe import load_recipe, parse_overrides

    values = load_recipe(recipe) if recipe is not None else {}
    values |= {name: value for name, value in options.items() if value is not None}
    return values | parse_overrides(overrides or [])


def _show(result: Mapping[str, Any], as_json: bool) -> None:
    if os.environ.get("RANK", "0") != "0":  # under torchrun all ranks have the same result
        return
    if as_json:
        typer.echo(json.dumps(result))
        return
    # What is nested is for programs: --json and metrics.json have it.
    lines = {name: value for name, value in result.items() if not isinstance(value, Mapping)}
    width = max((len(name) for name in lines), default=0)
    for name, value in lines.items():
        typer.echo(f"{name:<{width}}  {_number(value)}")


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(_number(entry) for entry in value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_number(entry)}" for key, entry in value.items())
    return str(value)


# Commands with a file of their own; they use what stands above.
from kdfast.cli.data_report import data_report  # noqa: E402
from kdfast.cli.select import select  # noqa: E402

app.command()(select)
app.command()(data_report)

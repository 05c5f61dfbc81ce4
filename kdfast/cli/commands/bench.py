"""``kdfast bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kdfast.cli.guard import FAILED, guarded, say
from kdfast.cli.options import Quiet


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
            help="Measure nothing: say what moved between two results.json, and fail where kdfast got worse.",
            metavar="BEFORE AFTER",
            show_default=False,
        ),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Time kdfast beside eager PyTorch, torch.compile and peer libraries on this machine."""
    from kdfast import benchmarks
    from kdfast.errors import ConfigError
    from kdfast.experiments.common.results import writing

    if compare is not None and out is None:
        _compare(*compare)
        return
    if out is None or compare is not None:
        raise ConfigError("bench: give either --out DIR, to measure, or --compare BEFORE AFTER")
    settings = benchmarks.make_settings(device, quick=quick)
    show = (lambda line: None) if quiet else say
    with writing(out):
        result = benchmarks.run(suite or benchmarks.SUITES, settings, say=show, out=out)
        for path in benchmarks.write(result, out):
            say(f"wrote {path}")
    if not benchmarks.succeeded(result):
        raise typer.Exit(FAILED)


def _compare(before: Path, after: Path) -> None:
    from kdfast.benchmarks import compare

    first, second = compare.load(before), compare.load(after)
    typer.echo(compare.markdown(compare.moves(first, second)), nl=False)
    if failures := compare.failures(first, second):
        for line in failures:
            say(line)
        raise typer.Exit(FAILED)

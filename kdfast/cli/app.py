"""``kdfast`` itself: its options, and the commands in the order that ``--help`` lists them."""

from __future__ import annotations

from typing import Annotated

import typer

from kdfast.cli.commands.bench import bench
from kdfast.cli.commands.data_report import data_report
from kdfast.cli.commands.demo import demo
from kdfast.cli.commands.distill import distill
from kdfast.cli.commands.doctor import doctor
from kdfast.cli.commands.evaluate import evaluate
from kdfast.cli.commands.export import export
from kdfast.cli.commands.keys import keys
from kdfast.cli.commands.label import label
from kdfast.cli.commands.recipes import recipes
from kdfast.cli.commands.report import report
from kdfast.cli.commands.reproduce import reproduce
from kdfast.cli.commands.select import select
from kdfast.cli.commands.synth import synth
from kdfast.cli.commands.teach import teach
from kdfast.cli.commands.teach_generator import teach_generator
from kdfast.cli.guard import Options
from kdfast.cli.keyed import KeyedCommand

app = typer.Typer(
    name="kdfast",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Knowledge distillation on synthetic data, at the speed of the hardware.",
)


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    """Options before any command."""
    Options.debug = debug
    if version:
        from kdfast.version import __version__

        typer.echo(f"kdfast {__version__}")
        raise typer.Exit


# `--version` alone is no missing command.
app.info.invoke_without_command = True


app.command()(doctor)
app.command(cls=KeyedCommand)(teach)
app.command(cls=KeyedCommand)(distill)
app.command("eval")(evaluate)
app.command(cls=KeyedCommand)(synth)
app.command(cls=KeyedCommand)(teach_generator)
app.command(cls=KeyedCommand)(demo)
app.command()(export)
app.command()(recipes)
app.command()(reproduce)
app.command()(keys)
app.command()(report)
app.command()(bench)
app.command(cls=KeyedCommand)(select)
app.command(cls=KeyedCommand)(data_report)
app.command(cls=KeyedCommand)(label)

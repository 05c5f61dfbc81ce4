"""``kdfast data-report``."""

from __future__ import annotations

from typing import Annotated

import typer

from kdfast.cli.guard import guarded
from kdfast.cli.options import AsJson, Data, Out, Overrides, Quiet, TeacherRun
from kdfast.cli.values import config_of, show


@guarded
def data_report(
    data: Data,
    teacher: TeacherRun,
    out: Out,
    student: Annotated[
        list[str] | None,
        typer.Option(
            help="A student of two pooled features to draw beside such a teacher; may be repeated.",
            metavar="RUN",
            show_default=False,
        ),
    ] = None,
    test_data: Annotated[
        str | None,
        typer.Option(help="What students are drawn with: digits, a folder, hf:NAME.", metavar="NAME|DIR"),
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
    overrides: Overrides = None,
) -> None:
    """Say what makes a set good or bad for a teacher, before anyone trains: a page with pictures and a verdict."""
    from kdfast.experiments.data_report.config import DataReportConfig
    from kdfast.experiments.data_report.run import run

    config = config_of(
        DataReportConfig,
        None,
        overrides,
        command="data-report",
        data=data,
        teacher=teacher,
        out=str(out),
        students=student or None,
        test_data=test_data,
        progress=not quiet,
    )
    show(run(config), as_json)

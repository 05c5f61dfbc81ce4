"""``kdfast data-report``."""

from __future__ import annotations

from typing import Annotated

import typer

from kdfast.cli.app import AsJson, Out, Overrides, Quiet, _show, _values
from kdfast.cli.guard import guarded
from kdfast.cli.select import Data, TeacherRun


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
    from kdfast.experiments.common.recipe import build_config, check_keys
    from kdfast.experiments.data_report import run as work

    values = _values(
        None,
        overrides,
        data=data,
        teacher=teacher,
        out=str(out),
        students=student or None,
        test_data=test_data,
        progress=not quiet,
    )
    check_keys(values, work.DataReportConfig, source="data-report")
    _show(work.run(build_config(work.DataReportConfig, values, source="data-report")), as_json)

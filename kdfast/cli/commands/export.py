"""``kdfast export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kdfast.cli.guard import guarded
from kdfast.cli.options import AsJson
from kdfast.cli.values import config_of, show


@guarded
def export(
    run: Annotated[
        str,
        typer.Argument(
            help="Directory of a finished run, or of a set of shards.", metavar="RUN", show_default=False
        ),
    ],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            help="safetensors, torchscript, torch.export, onnx; shards (of ssdkd); of a set folder or webdataset.",
            metavar="FORMAT",
            show_default=False,
        ),
    ],
    weights: Annotated[str, typer.Option(help="last, or best: the epoch that measured best.")] = "last",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Directory for the files; by default RUN/export, RUN/shards.", metavar="DIR"
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a trained network as a file that runs without kdfast, or a set of shards as files that others read.

    With `--to shards`, write the images that an ssdkd run inverted, labelled, for other students: any recipe takes the
    folder as `data`.
    """
    from kdfast.experiments.export.config import ExportConfig
    from kdfast.experiments.export.run import run as write

    where = None if out is None else str(out)
    config = config_of(ExportConfig, None, None, command="export", run=run, to=to, weights=weights, out=where)
    show(write(config), as_json)

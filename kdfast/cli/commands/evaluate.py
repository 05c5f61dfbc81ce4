"""``kdfast eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kdfast.cli.guard import guarded
from kdfast.cli.options import AsJson, Device, Overrides, Quiet
from kdfast.cli.values import config_of, show


@guarded
def evaluate(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="A finished run's folder, timm:NAME, torchvision:NAME, hf:NAME, or FILE.py:FACTORY with weights=FILE.",
            metavar="CKPT",
            show_default=False,
        ),
    ],
    data: Annotated[
        str,
        typer.Option(
            help="digits, a folder (of classes, or images/ and masks/), hf:NAME, or shards.",
            metavar="NAME|DIR",
            show_default=False,
        ),
    ],
    split: Annotated[
        str | None,
        typer.Option(
            help="train, val, test or all; by default the test split, or all of a folder without splits.",
            show_default=False,
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images a batch.")] = 256,
    device: Device = "auto",
    loader: Annotated[str, typer.Option(help="For shards: dali or torch.")] = "dali",
    out: Annotated[
        Path | None, typer.Option(help="Keep the result here, for a report.", metavar="DIR")
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
    overrides: Overrides = None,
) -> None:
    """Measure a trained network: top-1 and top-5 accuracy, or mIoU on images with masks."""
    from kdfast.experiments.evaluate.config import EvalConfig
    from kdfast.experiments.evaluate.run import run

    config = config_of(
        EvalConfig,
        None,
        overrides,
        command="eval",
        checkpoint=checkpoint,
        data=data,
        split=None if split is None else split.lower(),
        batch_size=batch_size,
        device=device,
        loader=loader,
        out=None if out is None else str(out),
    )
    show(run(config, progress=not quiet), as_json)

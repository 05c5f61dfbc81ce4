"""``kdfast demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kdfast.cli.guard import guarded
from kdfast.cli.options import AsJson, Device, Out, Overrides, Quiet, Resume
from kdfast.cli.values import config_of, show


@guarded
def demo(
    out: Out = Path("runs/demo"),
    resume: Resume = False,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same numbers.")] = 0,
    device: Device = "auto",
    loader: Annotated[str, typer.Option(help="dali, or torch for the plain loader.")] = "dali",
    quiet: Quiet = False,
    as_json: AsJson = False,
    overrides: Overrides = None,
) -> None:
    """Walk the whole path on real digits in minutes: teacher, synthetic images, students, a page of results."""
    from kdfast.experiments.demo.config import DemoConfig
    from kdfast.experiments.demo.run import run

    config = config_of(
        DemoConfig,
        None,
        overrides,
        command="demo",
        out=str(out),
        resume=resume,
        seed=seed,
        device=device,
        loader=loader,
        progress=not quiet,
    )
    show(run(config), as_json)

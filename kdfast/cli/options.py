"""The options and arguments that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
RecipeFile = Annotated[
    Path | None,
    typer.Option("--recipe", help="YAML with values for this run, or a recipe's name.", metavar="FILE|NAME"),
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Data = Annotated[
    str,
    typer.Argument(
        help="A directory of shards, digits, a folder, or hf:NAME.", metavar="DATA", show_default=False
    ),
]
LabelledData = Annotated[
    str | None,
    typer.Option(
        "--data", help="digits, a folder with a subfolder for each class, or hf:NAME.", metavar="NAME|DIR"
    ),
]
TeacherRun = Annotated[
    str,
    typer.Argument(
        help="A finished run's folder, timm:NAME, torchvision:NAME, hf:NAME, or FILE.py:FACTORY with weights=FILE.",
        metavar="TEACHER",
        show_default=False,
    ),
]

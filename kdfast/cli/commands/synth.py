"""``kdfast synth``."""

from __future__ import annotations

from typing import Annotated

import typer

from kdfast.cli.guard import guarded
from kdfast.cli.options import AsJson, Out, Overrides, Quiet, RecipeFile, Resume
from kdfast.cli.values import config_of, show


@guarded
def synth(
    out: Out,
    recipe: RecipeFile = None,
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
    resume: Resume = False,
    extend: Annotated[
        bool,
        typer.Option("--extend", help="Grow the finished set in --out to --images; what is there stays."),
    ] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
    overrides: Overrides = None,
) -> None:
    """Make labelled synthetic images and write them as shards."""
    from kdfast.experiments.synth.config import SynthConfig
    from kdfast.experiments.synth.run import run

    options = {"source": source, "weights": weights, "folder": folder, "images": images, "out": str(out)}
    # Flags that were not given leave the recipe its say.
    options |= {"resume": resume or None, "extend": extend or None, "progress": not quiet}
    show(run(config_of(SynthConfig, recipe, overrides, command="synth", **options)), as_json)

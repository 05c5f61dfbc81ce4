"""``kdfast teach-generator``."""

from __future__ import annotations

from kdfast.cli.guard import guarded
from kdfast.cli.options import AsJson, LabelledData, Out, Overrides, Quiet, RecipeFile, Resume
from kdfast.cli.values import config_of, show


@guarded
def teach_generator(
    out: Out,
    data: LabelledData = None,
    recipe: RecipeFile = None,
    resume: Resume = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
    overrides: Overrides = None,
) -> None:
    """Train a small diffusion transformer on labelled images, for `kdfast synth --source diffusion --weights`."""
    from kdfast.experiments.diffusion_model.config import DiffusionConfig
    from kdfast.experiments.diffusion_model.run import run

    config = config_of(DiffusionConfig, recipe, overrides, command="teach-generator", data=data)
    show(run(config, out, resume=resume, progress=not quiet), as_json)

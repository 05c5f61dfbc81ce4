"""Whether stages are what the student does, and how a failed conversion is undone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kdfast.methods.kdiffusion.config import Stage
from kdfast.models import FeatureTaps
from kdfast.models.modes import evaluated

__all__ = ["check_stages", "undone_on_failure"]


@torch.no_grad()
def check_stages(student: nn.Module, stages: Sequence[Stage], images: Tensor) -> None:
    """One pass in evaluation mode, that tells whether every norm runs on its layer's output.

    A norm of the right width somewhere else would be taken out from there, and the exported student be another network.

    Raises:
        ValueError: A name that does not exist, a layer that does not run exactly once, or a norm that runs on something
            else; the one that does run on the output is named.
    """
    with FeatureTaps(student, {name for s in stages for name in (s.op, s.norm) if name is not None}):
        pass  # refuses unknown names
    outputs: dict[str, list[Any]] = {stage.op: [] for stage in stages}
    inputs: dict[str, list[Any]] = {}
    with ExitStack() as hooks:
        for op in outputs:
            keep = outputs[op].append
            handle = student.get_submodule(op).register_forward_hook(lambda m, i, out, keep=keep: keep(out))
            hooks.callback(handle.remove)
        for name, module in student.named_modules():
            if isinstance(module, _BatchNorm):
                keep = inputs.setdefault(name, []).append
                handle = module.register_forward_pre_hook(lambda m, i, keep=keep: keep(i[0]))
                hooks.callback(handle.remove)
        hooks.enter_context(evaluated(student))
        student(images)
    for stage in stages:
        if len(outputs[stage.op]) != 1:
            raise ValueError(
                f"op: {stage.op!r} runs {len(outputs[stage.op])} times in a pass; branches stand for a layer that runs "
                "once"
            )
        if stage.norm is None or not isinstance(student.get_submodule(stage.norm), _BatchNorm):
            continue  # another kind of norm is refused with the branches
        (output,) = outputs[stage.op]
        following = [name for name, seen in inputs.items() if any(x is output for x in seen)]
        if stage.norm not in following:
            hint = f"{following[0]!r} does" if following else "no batch norm does (leave norm out)"
            raise ValueError(f"norm: {stage.norm!r} does not run on the output of {stage.op!r}; {hint}")


@contextmanager
def undone_on_failure(student: nn.Module, stages: Sequence[Stage]) -> Iterator[ExitStack]:
    """Let a failure within the block leave the student as it was, and close what was entered."""
    modes = {module: module.training for module in student.modules()}
    names = {name for stage in stages for name in (stage.op, stage.norm) if name is not None}
    layers = {name: module for name, module in student.named_modules() if name in names}
    with ExitStack() as stack:
        try:
            yield stack
        except BaseException:
            for name, layer in layers.items():
                student.set_submodule(name, layer)
            for module, training in modes.items():
                module.training = training
            raise
        stack.pop_all()  # all went well: what was entered stays

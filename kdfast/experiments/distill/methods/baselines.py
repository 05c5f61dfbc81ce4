"""``method: at | dist | dkd | fitnet | kd | rkd``: what the papers' tables compare with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from kdfast.errors import ConfigError
from kdfast.experiments.distill.plan import Plan, Setting
from kdfast.methods import baselines


@dataclass(frozen=True)
class BaselineMethod:
    """One of them, as :class:`~kdfast.experiments.distill.plan.Method` wants it.

    Attributes:
        METHOD: Its class.
        NEEDS_DATA: They all do.
    """

    METHOD: type[baselines.Baseline[Any]]
    NEEDS_DATA: bool = True

    @property
    def CONFIG(self) -> type:
        """Its recipe keys."""
        return self.METHOD.CONFIG

    def build(self, setting: Setting) -> Plan:
        """The student and what the method has of its own, under one step.

        Raises:
            ConfigError: A layer or a combination of fields that the networks do not allow.
        """
        size = setting.described.image_size
        images = torch.zeros(2, 3, size, size, device=setting.accelerator.device)
        try:
            model = self.METHOD(setting.student, setting.teacher, setting.method, images=images)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        return Plan(
            model,
            lambda wrapped, batch: wrapped(*batch),
            student=lambda trained: trained.get_submodule("student"),
        )


BASELINES = {
    "at": BaselineMethod(baselines.AT),
    "dist": BaselineMethod(baselines.DIST),
    "dkd": BaselineMethod(baselines.DKD),
    "fitnet": BaselineMethod(baselines.FitNet),
    "kd": BaselineMethod(baselines.KD),
    "rkd": BaselineMethod(baselines.RKD),
}

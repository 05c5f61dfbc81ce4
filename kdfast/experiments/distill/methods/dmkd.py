"""``method: dmkd``: the student learns the teacher's outputs on images that were made beforehand."""

from __future__ import annotations

from kdfast.errors import DataError
from kdfast.experiments.common.synthetic_set import shard_classes
from kdfast.experiments.distill.plan import Plan, Setting, settings_of
from kdfast.methods.dmkd import DMKD, DMKDConfig

CONFIG = DMKDConfig
METHOD = DMKD
NEEDS_DATA = True


def uses_labels(config: DMKDConfig) -> bool:
    """Only those that were stored with the images, and only as hard labels."""
    return config.labels != "soft" and config.hard_labels == "stored"


def build(setting: Setting) -> Plan:
    """Check that stored labels, where they count, are the teacher's classes.

    Raises:
        DataError: They are not.
    """
    config: DMKDConfig = setting.method
    data = setting.config.data
    if uses_labels(config):
        found = shard_classes(data)
        if found is not None and found != setting.num_classes:
            raise DataError(
                f"data {data}: has {found} classes, accepted: the teacher's {setting.num_classes}"
            )
    method = DMKD(teacher=setting.teacher, config=config)
    settings = settings_of(setting)
    return Plan(
        setting.student,
        lambda model, batch: method.step(batch, model),
        facts=lambda: {"settings": settings},
    )

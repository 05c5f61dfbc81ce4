"""``method: surrogate``: the student learns the teacher's outputs on images of anything, augmented hard."""

from __future__ import annotations

from kdfast.errors import ConfigError, DataError
from kdfast.experiments.common.synthetic_set import shard_classes
from kdfast.experiments.distill.plan import Plan, Setting, settings_of
from kdfast.methods.surrogate import SurrogateKD, SurrogateKDConfig

CONFIG = SurrogateKDConfig
METHOD = SurrogateKD
NEEDS_DATA = True


def uses_labels(config: SurrogateKDConfig) -> bool:
    """Only as what the attack pushes images to."""
    return config.attack and config.attack_targets == "stored"


def build(setting: Setting) -> Plan:
    """The step on images in [0, 1]: it augments, attacks and normalises them itself.

    Raises:
        ConfigError: The task is not classification, or images are augmented twice.
        DataError: Stored labels count and are not the teacher's classes.
    """
    config: SurrogateKDConfig = setting.method
    common = setting.config
    if common.task != "classification":
        raise ConfigError(f"task: got {common.task!r}, accepted for method surrogate: classification")
    if common.augment and config.regime != "none":
        raise ConfigError(
            f"augment: got {', '.join(common.augment)} beside regime={config.regime}, accepted: one of them"
        )
    if uses_labels(config):
        found = shard_classes(common.data)
        if found is not None and found != setting.num_classes:
            raise DataError(
                f"data {common.data}: has {found} classes, accepted: the teacher's {setting.num_classes}, which "
                "attack_targets=stored takes them for (kdfast select writes the teacher's classes)"
            )
    if config.attack and config.attack_targets == "random" and setting.num_classes < 2:
        raise ConfigError("attack: got true for a teacher of one class, accepted: at least two classes")
    method = SurrogateKD(
        teacher=setting.teacher, config=config, mean=setting.described.mean, std=setting.described.std
    )
    settings = settings_of(setting)
    return Plan(
        setting.student,
        lambda model, batch: method.step_with_parts(batch, model),
        facts=lambda: {"settings": settings},
        normalised=False,
    )

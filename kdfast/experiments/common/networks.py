"""The networks that a recipe names: fresh ones, and trained ones with what feeds them."""

from __future__ import annotations

from torch import nn

from kdfast.errors import CheckpointError, ConfigError
from kdfast.experiments.common.synthetic_set import shard_classes
from kdfast.models import create_model
from kdfast.training.model_io import ModelConfig, load_model, load_model_config


def build_network(config: ModelConfig) -> nn.Module:
    """The network with fresh weights; an unknown name or option is a recipe's fault.

    Raises:
        ConfigError: Naming the nearest known models.
    """
    try:
        return config.build()
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error)) from error


def load_teacher(source: str, data: str | None = None) -> tuple[nn.Module, ModelConfig]:
    """A trained network and what feeds it.

    Args:
        source: Directory of a finished run, ``timm:NAME`` or ``torchvision:NAME``.
        data: For the latter two, shards that say how many classes there are; 1000 without.

    Raises:
        CheckpointError: It cannot be read.
        ConfigError: timm or torchvision has no such network.
    """
    if not source.startswith(("timm:", "torchvision:")):
        return load_model(source), load_model_config(source)
    num_classes = shard_classes(data) or 1000
    try:
        network = create_model(source, num_classes, pretrained=True)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"teacher {source}: its weights cannot be had: {error}") from error
    facts = getattr(network, "pretrained_cfg", {})
    return network.eval(), ModelConfig(
        source,
        num_classes,
        int(facts.get("input_size", (3, 224, 224))[-1]),
        tuple(facts.get("mean", (0.485, 0.456, 0.406))),
        tuple(facts.get("std", (0.229, 0.224, 0.225))),
    )

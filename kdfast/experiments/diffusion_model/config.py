"""How large a diffusion model, trained on what for how long."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import annotated_types as at

from kdfast.errors import ConfigError
from kdfast.experiments.common.bounds import Count, Positive, Seed


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """What to train, on what.

    Attributes:
        data: ``digits``, a folder, or ``hf:NAME``.
        image_size: Side of the images in pixels, a multiple of ``patch_size``.
        channels: 1 for grey images, which are repeated to three channels when they are written; or 3.
        patch_size: Side of a token in pixels.
        heads: Attention heads.
        head_dim: Width of a head; the network is ``heads · head_dim`` wide.
        layers: Transformer blocks.
        epochs: Stretches of ``steps_per_epoch`` steps, each ending in an evaluation and a checkpoint.
        steps_per_epoch: Optimiser steps in one.
        batch_size: Images a step.
        lr: Highest learning rate of AdamW, reached after 100 steps, then a cosine.
        ema_decay: Of the moving average of the weights, which is what is saved.
        label_dropout: Share of labels replaced by the null class, so that guidance has something to guide away from.
        snr_limit: The loss at step t is weighted by min(SNR(t), this).
        timesteps: Steps of the noising process.
        seed: Of weights, order and noise.
        device: ``auto`` takes the GPU if there is one.
    """

    data: str = "digits"
    image_size: Count = 16
    channels: Literal[1, 3] = 1
    patch_size: Count = 4
    heads: Count = 4
    head_dim: Count = 24
    layers: Count = 4
    epochs: Count = 10
    steps_per_epoch: Count = 100
    batch_size: Count = 64
    lr: Positive = 2e-3
    ema_decay: Annotated[float, at.Gt(0), at.Lt(1)] = 0.995
    label_dropout: Annotated[float, at.Gt(0), at.Lt(1)] = 0.1
    snr_limit: Positive = 5.0
    timesteps: Count = 1000
    seed: Seed = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ConfigError(
                f"image_size: got {self.image_size}, accepted: a multiple of patch_size={self.patch_size}"
            )

"""kdfast's parts in the shapes that other libraries call: one changed line, and nothing of theirs is imported.

=====================================  ==========================================================
instead of                              use
=====================================  ==========================================================
``torch.nn.KLDivLoss`` in KD code       :class:`KLDivLoss`, on the same (log-)probabilities
``GKDTrainer.generalized_jsd_loss``     :func:`generalized_jsd_loss`, the same arguments and value
``GKDTrainer`` (TRL)                    :class:`GKDMixin` before it: that loss, on any number of ranks
``Trainer.compute_loss`` (🤗)           :class:`TrainerLoss`, the same arguments
a teacher in a ``LightningModule``      :class:`Distiller`, a module that holds both networks
torchrl's ``PrioritizedSampler``        :func:`torchrl_sampler`, with kdfast's exact integer tree
=====================================  ==========================================================
"""

from __future__ import annotations

from kdfast.adapters.losses import Distiller, GKDMixin, KLDivLoss, TrainerLoss, generalized_jsd_loss
from kdfast.adapters.sampler import PrioritySampler, torchrl_sampler

__all__ = [
    "Distiller",
    "GKDMixin",
    "KLDivLoss",
    "PrioritySampler",
    "TrainerLoss",
    "generalized_jsd_loss",
    "torchrl_sampler",
]

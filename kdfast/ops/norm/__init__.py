"""Batch norm fused with what follows it (eager.py, registered.py), and the loss of its statistics."""

from kdfast.ops.norm import statistics_loss
from kdfast.ops.norm.eager import bn_act, bn_mse

__all__ = ["bn_act", "bn_mse", "statistics_loss"]

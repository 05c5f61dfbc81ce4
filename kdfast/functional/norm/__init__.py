"""Batch norm fused with what follows it, and the loss of its statistics."""

from kdfast.functional.norm.fused import bn_ddim_step, bn_mse, bn_relu
from kdfast.functional.norm.statistics_loss import BNStatistics, bn_statistics_loss

__all__ = ["BNStatistics", "bn_ddim_step", "bn_mse", "bn_relu", "bn_statistics_loss"]

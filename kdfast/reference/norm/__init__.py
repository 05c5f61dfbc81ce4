"""Batch norm fused with what follows it (fused.py), and the loss of its statistics (statistics_loss.py)."""

from kdfast.reference.norm.fused import BatchNorm, bn_act, bn_backward, bn_mse, normalise, track

__all__ = ["BatchNorm", "bn_act", "bn_backward", "bn_mse", "normalise", "track"]

"""The networks of the papers, by name, and taps for their inner activations."""

from __future__ import annotations

from kdfast.models.registry import create_model, list_models
from kdfast.models.taps import FeatureTaps

__all__ = ["FeatureTaps", "create_model", "list_models"]

"""The branch recursion and the γ-mix (mix.py), the diffusion loss with keyed noise (noise.py)."""

from kdfast.ops.feature.mix import noise_mix, reparam_middle
from kdfast.ops.feature.noise import add_noise_embed, noise_mse

__all__ = ["add_noise_embed", "noise_mix", "noise_mse", "reparam_middle"]

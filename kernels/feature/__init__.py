"""Feature distillation: the recursion over re-parameterised branches, and the mix of a feature with noise.

Branch recursion (Kdiffusion, Yao et al., Eqs. 8–11), branches S_1 … S_m, π a permutation, x0 the target:

    T_k = u_k·X_{k-1} + v_k·x0          X_k = T_k (chain), or T_k + w_k·z_k with z_k normal (sampled)
    P_k = u_k·P_{k-1} + v_k·S_π(k)      P_0 = X_0
    loss = Σ_k mean((T_k - P_k)²),      mean S = (1/m) Σ_j S_j

    Neither T nor X is needed: r_k = P_k - T_k obeys
    r_k = u_k·(r_{k-1} - w_{k-1}·z_{k-1}) + v_k·(S_π(k) - x0),   r_0 = w_0 = 0
    backward: A_k = 2·r_k/N + u_{k+1}·A_{k+1},   dS_π(k) = v_k·A_k + (1/m)·d(mean S)
    (A_k = 2·r_k/N when no gradient is to flow into P_{k-1})

    Bytes moved, X = bytes of one branch: (m+2)X for loss and mean; 2(m+1)X + X for the mean when the gradients
    are made with them, and then nothing in a backward whose upstream gradient is 1. Without, the backward
    recomputes: (2m+2)X, with d(mean S) read; 34X in all at m = 10.

γ-mix (DiffKD, Huang et al. 2023, Sec. 3.3), γ one number a sample, ε Philox normals keyed by (seed, element):

    z = γ·x + (1-γ)·ε               backward: gx = γ·gz,   dγ = Σ gz·(x - ε), ε drawn again

    Bytes moved: 2X forward, 3X backward (2X when γ or x needs no gradient); the noise moves nothing.

Launch plan: as denoise.py's (walks over any strides), with the elements a thread chosen so that m residuals
stay in registers. π indexes pointers: no gather. Losses and dγ are summed in a fixed order. Bodies:
bodies.py.
"""

from . import noise
from .launch import MAX_BRANCHES, noise_mix, noise_mix_backward, reparam_middle

__all__ = ["MAX_BRANCHES", "noise", "noise_mix", "noise_mix_backward", "reparam_middle"]

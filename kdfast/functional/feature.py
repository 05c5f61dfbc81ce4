"""Feature distillation: the middle loss over re-parameterised branches, features mixed with noise, errors in it."""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast.functional._checks import (
    check_bool,
    check_dense,
    check_floating,
    check_tensor,
    elsewhere,
    on_host,
)
from kdfast.ops.feature import mix as ops
from kdfast.ops.feature import noise as noise_ops
from kdfast.profiling import annotate

__all__ = ["add_noise_embed", "noise_mix", "noise_mse", "reparam_middle_loss"]


@annotate("reparam_middle_loss")
def reparam_middle_loss(
    branches: Tensor,
    target: Tensor,
    u: Tensor,
    v: Tensor,
    permutation: Tensor,
    *,
    noise_scale: Tensor | None = None,
    seed: int | Tensor = 0,
    carry_gradient: bool = True,
    mean_needs_grad: bool = True,
) -> tuple[Tensor, Tensor]:
    r"""Kdiffusion's middle loss, and the mean of the branches, in one pass over them.

    .. math:: T_k = u_k X_{k-1} + v_k x_0,\quad P_k = u_k P_{k-1} + v_k S_{\pi(k)},\quad P_0 = X_0,\quad
              L = \sum_{k=1}^{m} \mathrm{mean}\big((T_k - P_k)^2\big)

    (Yao et al., "Progressively Knowledge Distillation via Re-parameterizing Diffusion Reverse Process",
    Eqs. 8–11.) X_k = T_k, or with ``noise_scale`` X_k = T_k + w_k·z_k. X_0 cancels, so it is no argument. With
    m = 1, u = 0, v = 1 the loss is the mean squared error.

    Args:
        branches: S ``[m, …]``, any strides (so a stacked convolution's output needs no copy); float32,
            bfloat16, float16 or float64. Up to 64 branches are fused.
        target: x0, of one branch's shape and on its device; its dtype may differ. Gets no gradient.
        u: ``[m]``, floating-point, on the same device. Gets no gradient.
        v: Likewise.
        permutation: π, int64 ``[m]``, of 0 … m − 1: step k takes branch π(k). On a GPU its values are not
            checked (that would wait for the device): an index that is no branch makes the loss NaN.
        noise_scale: w ``[m]`` for a sampled X; w_m is not used. Gets no gradient.
        seed: Philox key of z; normals are keyed by (seed, k, element). An int from 0 to 2⁶³ − 1, or an int64
            tensor of one element on the device, so that a captured graph sees its current value.
        carry_gradient: Whether gradients flow through P_{k−1} into earlier branches.
        mean_needs_grad: False returns the mean without gradient; the loss's gradients are then written in the
            forward launch, and a backward whose upstream gradient is 1 moves nothing.

    Returns:
        The loss, a 0-d float32 tensor (float64 when an input is), and (1/m) Σ S, of the target's shape in the
        branches' dtype.

    Raises:
        TypeError: Branches or target that are not floating-point, a permutation that is not int64.
        ValueError: Shapes, devices or values out of what is said above.
    """
    for name, value in (("branches", branches), ("target", target), ("u", u), ("v", v)):
        check_floating(name, value)
    if branches.dim() < 1 or branches.shape[0] < 1:
        raise ValueError(
            f"branches: got shape {tuple(branches.shape)}; [m, …] with m of at least 1 is needed"
        )
    if branches.shape[1:] != target.shape:
        raise ValueError(
            f"target: got shape {tuple(target.shape)}; a branch has {tuple(branches.shape[1:])}, and they must match"
        )
    if target.numel() == 0:
        raise ValueError(f"target: got shape {tuple(target.shape)}; the mean of no elements is not defined")
    if noise_scale is not None:
        check_floating("noise_scale", noise_scale)
    check_tensor("permutation", permutation)  # the others are dense, being looked at above
    device, heads = branches.device, branches.shape[:1]
    given = [("target", target), ("u", u), ("v", v), ("permutation", permutation)]
    if noise_scale is not None:
        given.append(("noise_scale", noise_scale))
    for name, value in given:
        if value.device != device:
            raise elsewhere(name, value, "branches", branches.device)
        if name != "target" and value.shape != heads:
            raise ValueError(
                f"{name}: got shape {tuple(value.shape)}; [{branches.shape[0]}] is needed, one value a branch"
            )
        if value.requires_grad:
            raise ValueError(f"{name}: requires grad; kdfast gives it no gradient, pass {name}.detach()")
    if permutation.dtype != torch.int64:
        raise TypeError(f"permutation: got dtype {permutation.dtype}; int64 is needed")
    if on_host(permutation):
        values = permutation.tolist()
        if sorted(values) != list(range(len(values))):
            raise ValueError(f"permutation: got {values}; each of 0 … {len(values) - 1} once is needed")
    check_bool("carry_gradient", carry_gradient)
    check_bool("mean_needs_grad", mean_needs_grad)
    call = ops.Recursion(u, v, permutation, noise_scale, _seed(seed, branches), carry_gradient)
    return ops.reparam_middle(branches, target, call, mean_needs_grad=mean_needs_grad)


@annotate("noise_mix")
def noise_mix(x: Tensor, gamma: Tensor, *, seed: int | Tensor) -> Tensor:
    r"""Mix a feature with fresh normal noise, by one factor a sample.

    .. math:: z_i = \gamma_i\,x_i + (1 - \gamma_i)\,\varepsilon_i

    (DiffKD's noise adapter, Huang et al. 2023, Sec. 3.3.) γ = 1 adds no noise: z is then x exactly. The noise is
    Philox normals keyed by (seed, element), made in the kernel and again in its backward, never stored; it is
    the same for any layout and on any backend (up to rounding).

    Args:
        x: ``[B, …]``, any strides; float32, bfloat16, float16 or float64.
        gamma: γ, B values as ``[B]`` or ``[B, 1, …]``; floating-point, on x's device. Usually in (0, 1), not
            checked.
        seed: An int from 0 to 2⁶³ − 1, or an int64 tensor of one element on x's device, so that a captured
            graph sees its current value.

    Returns:
        z, of x's shape and dtype. Both x and γ get exact gradients (γ's is summed in float32).

    Raises:
        TypeError: x or gamma that are not floating-point, a seed that is no integer.
        ValueError: A shape, device or seed out of what is said above.
    """
    check_floating("x", x)
    check_floating("gamma", gamma)
    if x.dim() < 1:
        raise ValueError("x: got a 0-d tensor; [B, …] is needed")
    if gamma.shape[:1] != x.shape[:1] or any(size != 1 for size in gamma.shape[1:]):
        raise ValueError(
            f"gamma: got shape {tuple(gamma.shape)}; [{x.shape[0]}] (or [{x.shape[0]}, 1, …]) is needed, one a sample"
        )
    if gamma.device != x.device:
        raise elsewhere("gamma", gamma, "x", x.device)
    return ops.noise_mix(x, gamma if gamma.dim() == 1 else gamma.reshape(-1), _seed(seed, x))


@annotate("noise_mse")
def noise_mse(prediction: Tensor, *, seed: int | Tensor) -> Tensor:
    r"""The simple diffusion loss: mean squared error of predicted noise, the noise drawn again rather than kept.

    .. math:: L = \mathrm{mean}\big((\hat\varepsilon - \varepsilon)^2\big)

    (DDPM, Ho et al. 2020, Eq. 14; DiffKD, Huang et al. 2023.) With the seed and the shape of :func:`add_noise_embed`
    or :func:`noise_mix`, ε is the noise that they added, for any layout. The gradient is made in the forward launch.

    Args:
        prediction: ε̂ ``[B, …]``, any strides; float32, bfloat16, float16 or float64.
        seed: An int from 0 to 2⁶³ − 1, or an int64 tensor of one element on its device, so that a captured graph
            sees its current value.

    Returns:
        The loss, a 0-d float32 tensor (float64 for float64).

    Raises:
        TypeError: A prediction that is not floating-point, a seed that is no integer.
        ValueError: A prediction without elements, a seed out of what is said above.
    """
    check_floating("prediction", prediction)
    if prediction.numel() == 0:
        raise ValueError(
            f"prediction: got shape {tuple(prediction.shape)}; the mean of no elements is not defined"
        )
    return noise_ops.noise_mse(prediction, _seed(seed, prediction))


@annotate("add_noise_embed")
def add_noise_embed(
    latent: Tensor,
    timesteps: Tensor,
    alphas_cumprod: Tensor,
    embedding: Tensor | None = None,
    *,
    seed: int | Tensor,
) -> Tensor:
    r"""Noise a latent to its timestep, and add the time embedding, in one pass.

    .. math:: x_t = \sqrt{\bar\alpha_t}\,x + \sqrt{1 - \bar\alpha_t}\,\varepsilon + E[t]

    (DDPM, Ho et al. 2020, Eq. 4, with DiffKD's learned embedding of the timestep.) ε are Philox normals keyed by
    (seed, element), never stored: :func:`noise_mse` draws the same.

    Args:
        latent: ``[B, C, …]`` or ``[B, C]``; float32, bfloat16, float16 or float64. Gets no gradient. Contiguous and
            channels_last are read as they lie, other layouts are copied first.
        timesteps: int64 ``[B]`` on its device, 0 to T − 1. On a GPU the values are not checked (that would wait for
            the device): a timestep outside makes its sample NaN.
        alphas_cumprod: ᾱ ``[T]``, float32 or float64: in half precision the first is 1, and training gives NaN.
        embedding: E ``[rows, C]`` with at least T rows of use, as ``nn.Embedding.weight``; None adds none. Gets a
            gradient, summed in float32 in the batch's order: the same bits each time.
        seed: An int from 0 to 2⁶³ − 1, or an int64 tensor of one element on its device.

    Returns:
        x_t (plus E[t]), of the latent's shape and dtype.

    Raises:
        TypeError: Tensors of another kind than said above.
        ValueError: Shapes, devices or values that do not fit; a latent that requires grad.
    """
    check_floating("latent", latent)
    if latent.dim() < 2:
        raise ValueError(f"latent: got shape {tuple(latent.shape)}; [B, C, …] is needed")
    if latent.requires_grad:
        raise ValueError("latent: requires grad; kdfast gives it no gradient, pass latent.detach()")
    if isinstance(alphas_cumprod, Tensor):
        check_dense("alphas_cumprod", alphas_cumprod)
    if not isinstance(alphas_cumprod, Tensor) or alphas_cumprod.dtype not in (torch.float32, torch.float64):
        kind = getattr(alphas_cumprod, "dtype", type(alphas_cumprod).__name__)
        raise TypeError(f"alphas_cumprod: got {kind}; a float32 or float64 tensor is needed")
    if alphas_cumprod.dim() != 1 or alphas_cumprod.numel() == 0 or alphas_cumprod.requires_grad:
        raise ValueError(
            f"alphas_cumprod: got shape {tuple(alphas_cumprod.shape)}, requires_grad={alphas_cumprod.requires_grad}; "
            "[T] without gradient is needed"
        )
    if isinstance(timesteps, Tensor):
        check_dense("timesteps", timesteps)
    if not isinstance(timesteps, Tensor) or timesteps.dtype != torch.int64:
        kind = getattr(timesteps, "dtype", type(timesteps).__name__)
        raise TypeError(f"timesteps: got {kind}; an int64 tensor is needed")
    if timesteps.shape != latent.shape[:1]:
        raise ValueError(f"timesteps: got shape {tuple(timesteps.shape)}; [{latent.shape[0]}] is needed")
    given = {"timesteps": timesteps, "alphas_cumprod": alphas_cumprod}
    limit = alphas_cumprod.shape[0]
    if embedding is not None:
        check_floating("embedding", embedding)
        if embedding.dim() != 2 or embedding.shape[1] != latent.shape[1]:
            raise ValueError(
                f"embedding: got shape {tuple(embedding.shape)}; [rows, {latent.shape[1]}] is needed"
            )
        given["embedding"], limit = embedding, min(limit, embedding.shape[0])
    for name, value in given.items():
        if value.device != latent.device:
            raise ValueError(f"{name}: is on {value.device}; latent is on {latent.device}")
    if on_host(timesteps):
        wrong = (timesteps < 0) | (timesteps >= limit)
        if bool(wrong.any()):
            raise ValueError(f"timesteps: got {int(timesteps[wrong][0])}; accepted: 0 to {limit - 1}")
    return noise_ops.add_noise_embed(latent, timesteps, alphas_cumprod, embedding, _seed(seed, latent))


def _seed(seed: int | Tensor, like: Tensor) -> int | Tensor:
    if isinstance(seed, Tensor):
        check_dense("seed", seed)
        if seed.dtype != torch.int64:
            raise TypeError(f"seed: got dtype {seed.dtype}; an int, or an int64 tensor, is needed")
        if seed.numel() != 1:
            raise ValueError(f"seed: got shape {tuple(seed.shape)}; one element is needed")
        if seed.device != like.device:
            raise ValueError(f"seed: is on {seed.device}; the features are on {like.device}")
        return seed
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"seed: got {type(seed).__name__}; an int, or an int64 tensor, is needed")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed: got {seed}; accepted: 0 to 2⁶³ − 1")
    return seed

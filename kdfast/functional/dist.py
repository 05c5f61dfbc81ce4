"""DIST: distillation by correlations."""

from __future__ import annotations

import torch

from kdfast.functional._checks import check_factor, check_pair, check_temperature
from kdfast.ops import dist as ops
from kdfast.ops.common.row_loss import Row
from kdfast.profiling import annotate

__all__ = ["dist_loss"]


@annotate("dist_loss")
def dist_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float | torch.Tensor = 1.0,
    dim: int = -1,
) -> torch.Tensor:
    r"""DIST: one minus the correlation of teacher and student, within each sample and within each class.

    .. math:: T^2 \left[\beta\,\frac{1}{B}\sum_b (1 - \rho(q_{b,:}, p_{b,:}))
              + \gamma\,\frac{1}{V}\sum_c (1 - \rho(q_{:,c}, p_{:,c}))\right]

    with q = softmax(student/T), p = softmax(teacher/T) and Pearson's ρ, whose denominator is |a||b| + 1e-8 (Huang
    et al. 2022, "Knowledge distillation from a stronger teacher", Eqs. 6 to 9; T² and ε as in its authors' code).

    The second term runs over the samples of this call: under data parallelism, those of one process.

    Args:
        student: Logits, at least 2-d, any strides; float32, bfloat16, float16 or float64. Every index but the
            class is a sample.
        teacher: Logits of the same shape on the same device; its dtype may differ.
        beta: β ≥ 0, weight of the inter-class term (within a sample).
        gamma: γ ≥ 0, weight of the intra-class term (within a class).
        temperature: T > 0; a float, or a 0-d tensor (read on the device). Gets no gradient.
        dim: The class dimension.

    Returns:
        A 0-d tensor; float32, float64 when either input is. Both logits get exact gradients. A sample or class
        whose values are all equal has no correlation: ρ = 0.

    Raises:
        TypeError: Logits that are not floating point.
        ValueError: Shapes, devices, ``dim``, ``temperature``, ``beta`` or ``gamma`` out of what is said above;
            no samples at all.
    """
    beta, gamma = check_factor("beta", beta), check_factor("gamma", gamma)
    axis, rows = check_pair(student, teacher, dim, "sum")
    if not rows:
        raise ValueError(
            "student: got 1-d logits; DIST compares samples, so at least 2 dimensions are needed"
        )
    if student.numel() == 0:
        raise ValueError(
            f"student: got shape {tuple(student.shape)}; DIST needs at least one sample and one class"
        )
    temperature = check_temperature(temperature, student)
    row = Row((beta, gamma), student.dim() - 1, temperature, None, None, 1.0, True)
    if axis != row.dim:  # a view is an operator, forward and backward
        student, teacher = student.movedim(axis, -1), teacher.movedim(axis, -1)
    return ops.dist.run(student, teacher, row)

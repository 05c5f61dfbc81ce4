"""DIST: match correlations instead of values (Huang et al. 2022, arXiv:2205.10536, Eqs. 6-9).

With q = softmax(s/T), p = softmax(t/T), both [B, V], and Pearson's ρ(a, b) = ⟨a, b⟩/(|a||b| + ε) of centred
vectors, ε = 1e-8:

    loss   = T²·(β·mean over rows (1 - ρ(q_row, p_row)) + γ·mean over columns (1 - ρ(q_col, p_col)))
    ∂ρ/∂a  = b/D - v·a,  D = |a||b| + ε,  v = ρ·|b|/(D·|a|);   ∂/∂s = q·(slope - Σ q·slope)/T

A row's mean is 1/V. A column's moments are those of its values above the mean of its first rows, each thread its own sums
until the last row; programs that share a column's rows are merged by Chan's formula, in a fixed order.

Bytes moved, N = elements of one logit tensor: 2N for the rows, 2N for the columns (a column is complete only
when every row's softmax is), 3N for the student's gradient or 4N for both: 4N, 7N, 8N. Where a program reads its
rows twice, the second time is from the cache. A row's six values and a column's five are kept for the backward, which
so reads 2N where the forward has not written what it asks for, and nothing where it has.

Launch plan: rows of up to 8192 classes stay in registers, a warp a row or a program a row, and are read once; else tiles
of about 2048 elements. A column's rows are split over programs until some 512 of them are busy: dist_plan in plan.py.
Bodies: bodies.py.
"""

from ..common.scale import Scale
from .launch import Values, run

__all__ = ["Scale", "Values", "run"]

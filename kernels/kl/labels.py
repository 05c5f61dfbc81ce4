"""What rides on the KL pass: cross-entropy with hard labels, and the statistics that replay needs.

With z the student's logits at temperature 1, two labels a row (mixup, Zhang et al. 2018) with factors f₁, f₂, which
hold weight, λ, divisor and 0 for ignored rows (of one label, the weight and how many rows count will do, or of few
rows the weight alone), and smoothing ε (Szegedy et al. 2016, Eq. 7):

    CE       = f·(LSE(z) - ε·mean(z)) - (1-ε)·(f₁·z_y₁ + f₂·z_y₂)        f = f₁ + f₂
    ∂CE/∂z   = f·(softmax(z) - ε/V) - (1-ε)·(f₁·[c = y₁] + f₂·[c = y₂])

Bytes: 16 (one label) or 28 a row, nothing of size N. Layouts as in kl/rows.py; a row's values are scalars or vectors.
"""

import triton
import triton.language as tl

from ..common.rows import row_factor


@triton.jit
def _labels_counted(label_ptr, num_rows, IGNORE: tl.constexpr, LANES: tl.constexpr):
    """How many labels are not ``IGNORE``, in one look: every program of a small launch finds it for itself."""
    lanes = tl.arange(0, LANES)
    labels = tl.load(label_ptr + lanes, mask=lanes < num_rows, other=IGNORE)
    return tl.sum((labels != IGNORE).to(tl.int32), 0).to(tl.float32)


@triton.jit
def label_of(
    label_ptr, factor_ptr, label_weight, s_row, s_class, rows, counts, row_scale, num_rows, V: tl.constexpr,
    IGNORE: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    """(label, factor, the label's logit) of each row; NaN for a label that is no class."""
    label = tl.load(label_ptr + rows, mask=counts, other=0)
    if IGNORE is None:
        factor = tl.load(factor_ptr + rows, mask=counts, other=0.0).to(tl.float32)
    else:
        if COUNTED > 0:  # where nothing counts, the loss is 0
            if COUNTED == 1:
                count = tl.load(factor_ptr).to(tl.float32)
            else:
                count = _labels_counted(label_ptr, num_rows, IGNORE, COUNTED)
            label_weight = label_weight / tl.maximum(count, 1.0)
        factor = tl.where(counts & (label != IGNORE), label_weight, 0.0)
    factor *= row_scale
    used = counts & (factor != 0.0)
    known = used & (label >= 0) & (label < V)
    logit = tl.load(s_row + label * s_class, mask=known, other=0.0).to(tl.float32)
    logit = tl.where(used & (known == 0), float("nan"), logit)
    return label, tl.where(used, factor, 0.0), logit


@triton.jit
def labels_of(
    label_ptr, factor_ptr, second_label_ptr, second_factor_ptr, label_weight, s_row, s_class, rows, valid, counts,
    weight_ptr, upstream_ptr, num_rows, V: tl.constexpr, LABELS: tl.constexpr, WEIGHT: tl.constexpr,
    UPSTREAM: tl.constexpr, IGNORE: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    """:func:`label_of` of each row's labels; without a second one, its factor is 0."""
    plain = 1.0
    if UPSTREAM == 1:
        plain = tl.load(upstream_ptr).to(tl.float32)
    weight, _ = row_factor(rows, valid, weight_ptr, None, upstream_ptr, plain, WEIGHT, False, UPSTREAM)
    label, first, logit = label_of(
        label_ptr, factor_ptr, label_weight, s_row, s_class, rows, counts, weight, num_rows, V, IGNORE, COUNTED,
    )  # fmt: skip
    second_label, second, second_logit = label, first * 0.0, logit
    if LABELS == 2:
        second_label, second, second_logit = label_of(
            second_label_ptr, second_factor_ptr, label_weight, s_row, s_class, rows, counts, weight, num_rows, V,
            IGNORE, COUNTED,
        )  # fmt: skip
    return label, first, logit, second_label, second, second_logit


@triton.jit
def label_loss(lse, mean, first, first_logit, second, second_logit, smoothing):
    """CE of each row; a row without factors is 0 whatever its logits hold."""
    both = first + second
    at_label = tl.where(first != 0.0, first * first_logit, 0.0) + tl.where(
        second != 0.0, second * second_logit, 0.0
    )
    smooth = tl.where(smoothing > 0.0, smoothing * mean, 0.0)
    return tl.where(both != 0.0, both * (lse - smooth) - (1.0 - smoothing) * at_label, 0.0)


@triton.jit
def label_gradient(probability, classes, label, second_label, first, second, smoothing, V: tl.constexpr):
    """∂CE/∂z of a tile; the row's values are already broadcast over it."""
    hard = tl.where(classes == label, first, 0.0) + tl.where(classes == second_label, second, 0.0)
    both = first + second
    # Where no label counts, the probability may be NaN.
    return tl.where(both != 0.0, both * (probability - smoothing / V), 0.0) - (1.0 - smoothing) * hard

"""Bodies of the row losses of two logit tensors: JSD and DKD. Equations and launch plans stand in losses_more.py.

Each loss gives, class by class, its term and w = (probability × derivative with respect to it); softmax's
derivative then needs one sum a row: ∂/∂s = (w_s - q·Σw_s)/T and ∂/∂t = (w_t - p·Σw_t)/T. A constant error of
log p - log q (what the two log-sum-exps leave behind) drops out of both.
"""

import triton
import triton.language as tl

from ._kl_common import near_terms, reduce_last, row_factor, scalar, store_gradient
from ._kl_rows import _over_classes, _per_row


@triton.jit
def _clamped_gap(s, t, k, log_ratio, KIND: tl.constexpr):
    """log2 p - log2 q, finite where a class is absent and p = 0 multiplies it; for JSD, where q = 0 does, too."""
    gap = tl.maximum((t - s) * k - log_ratio, -1e15)
    if KIND == 0:
        gap = tl.minimum(gap, 1e15)
    return gap


@triton.jit
def _without(logits, is_target, KIND: tl.constexpr):
    """The logits as float32, for DKD without the target class: masked here, since the load's mask sets its width."""
    out = logits.to(tl.float32)
    if KIND == 1:
        out = tl.where(is_target, float("-inf"), out)
    return out


@triton.jit
def _series(x):
    """(expm1(x) - x)/x² for |x| < 1/2."""
    return 0.5 + x * (1.0 / 6 + x * (1.0 / 24 + x * (1.0 / 120 + x * (1.0 / 720 + x * (1.0 / 5040)))))


@triton.jit
def _jsd_terms(gap, p, q, present, beta, NEAR: tl.constexpr):
    """(term, w_s, w_t) of the generalised Jensen-Shannon divergence, M = β·p + (1-β)·q."""
    teacher_leads = gap > 0.0
    e = tl.exp2(-tl.abs(gap))
    top = tl.log2(tl.where(teacher_leads, beta + (1.0 - beta) * e, 1.0 - beta + beta * e))
    q_over_m = -(top + tl.maximum(gap, 0.0)) * 0.6931471805599453
    p_over_m = (tl.minimum(gap, 0.0) - top) * 0.6931471805599453
    if NEAR:
        delta = tl.where(present, gap * 0.6931471805599453, 0.0)
        near = (tl.abs(delta) < 0.5) & present
        delta = tl.where(near, delta, 0.0)
        y = beta * (delta + delta * delta * _series(delta))
        z = y / (2.0 + y)
        v = z * z
        log1p = (
            2.0 * z * (1.0 + v * (1.0 / 3 + v * (1.0 / 5 + v * (1.0 / 7 + v * (1.0 / 9 + v * (1.0 / 11))))))
        )
        q_over_m = tl.where(near, -log1p, q_over_m)
        p_over_m = tl.where(near, delta - log1p, p_over_m)
    w_s = (1.0 - beta) * q * q_over_m
    w_t = beta * p * p_over_m
    term = w_s + w_t
    if NEAR:
        # Its parts cancel; the sum of β·p·(u + expm1(-u)) and the student's does not, and is the same.
        exact = beta * p * p_over_m * p_over_m * _series(-p_over_m)
        exact += (1.0 - beta) * q * q_over_m * q_over_m * _series(-q_over_m)
        term = tl.where(near, exact, term)
    return term, w_s, w_t


@triton.jit
def _terms(gap, p, q, present, beta, KIND: tl.constexpr, NEAR: tl.constexpr):
    """(term, w_s, w_t) of the divergence between the softmaxes: JSD (KIND 0), or KL (KIND 1, for DKD)."""
    if KIND == 0:
        term, w_s, w_t = _jsd_terms(gap, p, q, present, beta, NEAR)
    elif NEAR:
        term, w_s, delta = near_terms(gap, p, q, present)
        w_t = p * delta
    else:
        w_t = p * gap * 0.6931471805599453
        term, w_s = w_t, q - p
    return term, w_s, w_t


@triton.jit
def _log_sigmoid(x):
    return tl.minimum(x, 0.0) - 0.6931471805599453 * tl.log2(1.0 + tl.exp2(-tl.abs(x) * 1.4426950408889634))


@triton.jit
def _binary(s_odds, t_odds):
    """KL of target class against all others, and its derivatives with respect to the two log-odds."""
    s_odds = tl.maximum(s_odds, -1e30)
    t_odds = tl.maximum(t_odds, -1e30)
    s_in, t_in = _log_sigmoid(s_odds), _log_sigmoid(t_odds)
    s_out, t_out = _log_sigmoid(-s_odds), _log_sigmoid(-t_odds)
    b_s, b_t = tl.exp2(s_in * 1.4426950408889634), tl.exp2(t_in * 1.4426950408889634)
    c_s, c_t = tl.exp2(s_out * 1.4426950408889634), tl.exp2(t_out * 1.4426950408889634)
    always = b_t >= 0.0
    term_in, _, _ = near_terms((t_in - s_in) * 1.4426950408889634, b_t, b_s, always)
    term_out, _, _ = near_terms((t_out - s_out) * 1.4426950408889634, c_t, c_s, always)
    by_student = tl.where(b_s > 0.5, c_t - c_s, b_s - b_t)  # the smaller pair keeps its digits
    return term_in + term_out, by_student, b_t * c_t * (t_odds - s_odds)


@triton.jit
def _odds(logits, at, k, top, total):
    """Log-odds of the target class against the others, whose log2-sum-exp is ``top + log2(total)``."""
    return (tl.load(logits + at).to(tl.float32) * k - top - tl.log2(total)) * 0.6931471805599453


@triton.jit
def _gradient(
    w, total, prob, scale, divergence_weight, odds_slope, is_target, LAYOUT: tl.constexpr, KIND: tl.constexpr
):
    """∂loss/∂logit of a tile: the softmax's derivative, and for DKD the target class's share."""
    grad = w - prob * _per_row(total, LAYOUT)
    if KIND == 1:
        grad = divergence_weight * grad - prob * _per_row(odds_slope, LAYOUT)
        grad = tl.where(is_target, _per_row(odds_slope, LAYOUT), grad)
    return grad * _per_row(scale, LAYOUT)


@triton.jit
def pair_tile_kernel(
    s_ptr, t_ptr, gs_ptr, gt_ptr, rows_ptr, loss_ptr, partial_ptr, counter_ptr,
    weight_ptr, mask_ptr, upstream_ptr, target_ptr, temperature, temperature_ptr, divisor, divisor_ptr, alpha, beta,
    num_rows, inner,
    s_outer, s_inner, s_class, t_outer, t_inner, t_class, gs_outer, gs_inner, gs_class, gt_outer, gt_inner, gt_class,
    V: tl.constexpr, UNIT: tl.constexpr, KIND: tl.constexpr, LAYOUT: tl.constexpr, CHUNKS: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, INNER_ONE: tl.constexpr, T_PTR: tl.constexpr, DIVISOR_PTR: tl.constexpr,
    WEIGHT: tl.constexpr, MASK: tl.constexpr, UPSTREAM: tl.constexpr, EARLY_EXIT: tl.constexpr,
    GRAD_S: tl.constexpr, GRAD_T: tl.constexpr, STORE_ROWS: tl.constexpr, REDUCE: tl.constexpr,
):  # fmt: skip
    """Rows whose class dimension fits in registers: one read of each logit, one write of each gradient."""
    T = scalar(temperature, temperature_ptr, T_PTR)
    factor = T * T / scalar(divisor, divisor_ptr, DIVISOR_PTR)
    if UPSTREAM == 1:
        upstream = tl.load(upstream_ptr).to(tl.float32)
        if EARLY_EXIT:
            if upstream == 1.0:  # the forward launch wrote exactly this gradient
                return
        factor *= upstream
    inv_t = 1.0 / T
    k = inv_t * 1.4426950408889634

    # Which rows, and where they begin.
    pid = tl.program_id(0)
    if LAYOUT == 3:
        rows = pid
        outer, within = rows // inner, rows % inner
        valid = rows < num_rows
        classes = tl.arange(0, CHUNKS)
    elif LAYOUT == 2:
        tiles = tl.cdiv(inner, ROWS)
        outer = pid // tiles
        within = (pid % tiles) * ROWS + tl.arange(0, ROWS)
        rows = outer * inner + within
        valid = within < inner
        classes = tl.cast(tl.arange(0, CHUNKS)[:, None], tl.int64)
    else:
        rows = pid * ROWS + tl.arange(0, ROWS)
        if INNER_ONE:
            outer, within = rows, rows * 0
        else:
            outer, within = rows // inner, rows % inner
        valid = rows < num_rows
        if LAYOUT == 0:
            classes = tl.arange(0, CHUNKS)[:, None, None] * WIDTH + tl.arange(0, WIDTH)[None, None, :]
        else:
            classes = tl.arange(0, CHUNKS)[None, :, None] * WIDTH + tl.arange(0, WIDTH)[None, None, :]
    scale, counts = row_factor(
        rows, valid, weight_ptr, mask_ptr, upstream_ptr, factor, WEIGHT, MASK, UPSTREAM
    )
    # Outer strides come in units that divide them all: the compiler sees the alignment, and loads stay wide.
    outer = tl.cast(outer, tl.int64) * UNIT
    within = tl.cast(within, tl.int64)
    s_row, t_row = outer * s_outer + within * s_inner, outer * t_outer + within * t_inner
    s_at = _per_row(s_row, LAYOUT) + classes * s_class
    t_at = _per_row(t_row, LAYOUT) + classes * t_class
    live = _per_row(valid, LAYOUT)
    if V < CHUNKS * WIDTH:
        live = live & (classes < V)
    is_target = live
    if KIND == 1:
        target = tl.load(target_ptr + rows, mask=valid, other=0)
        is_target = classes == _per_row(target, LAYOUT)

    s = _without(tl.load(s_ptr + s_at, mask=live, other=float("-inf")), is_target, KIND)
    t = _without(tl.load(t_ptr + t_at, mask=live, other=float("-inf")), is_target, KIND)
    s_top = _over_classes(s, LAYOUT, True) * k
    t_top = _over_classes(t, LAYOUT, True) * k
    q = tl.exp2(s * k - _per_row(s_top, LAYOUT))
    p = tl.exp2(t * k - _per_row(t_top, LAYOUT))
    s_sum, t_sum = _over_classes(q, LAYOUT, False), _over_classes(p, LAYOUT, False)
    s_inv, t_inv = 1.0 / s_sum, 1.0 / t_sum
    log_ratio = (t_top - s_top) + tl.log2(t_sum * s_inv)
    q *= _per_row(s_inv, LAYOUT)
    p *= _per_row(t_inv, LAYOUT)
    gap = _clamped_gap(s, t, k, _per_row(log_ratio, LAYOUT), KIND)
    term, w_s, w_t = _terms(gap, p, q, live, beta, KIND, False)
    divergence = _over_classes(term, LAYOUT, False)

    binary = divergence * 0.0
    s_slope, t_slope = binary, binary
    if KIND == 1:
        binary, s_slope, t_slope = _binary(
            _odds(s_ptr, tl.where(valid, s_row + target * s_class, 0), k, s_top, s_sum),
            _odds(t_ptr, tl.where(valid, t_row + target * t_class, 0), k, t_top, t_sum),
        )
        binary, s_slope, t_slope = alpha * binary, alpha * s_slope, alpha * t_slope

    g = tl.where(counts, scale * inv_t, 0.0)
    keep = _per_row(counts, LAYOUT)  # a row that does not count gets 0, even where its logits are NaN
    gs_at = _per_row(outer * gs_outer + within * gs_inner, LAYOUT) + classes * gs_class
    gt_at = _per_row(outer * gt_outer + within * gt_inner, LAYOUT) + classes * gt_class
    closest = tl.where(counts, divergence, 1.0)
    if LAYOUT != 3:
        closest = tl.min(closest, axis=0)
    if closest < 1e-3:
        # Some row's student and teacher nearly agree, and its digits have cancelled: read the tile again, so
        # that the common branch keeps no registers for this one.
        s = _without(tl.load(s_ptr + s_at, mask=live, other=float("-inf")), is_target, KIND)
        t = _without(tl.load(t_ptr + t_at, mask=live, other=float("-inf")), is_target, KIND)
        q = tl.exp2(s * k - _per_row(s_top, LAYOUT)) * _per_row(s_inv, LAYOUT)
        p = tl.exp2(t * k - _per_row(t_top, LAYOUT)) * _per_row(t_inv, LAYOUT)
        gap = _clamped_gap(s, t, k, _per_row(log_ratio, LAYOUT), KIND)
        present = (t > float("-inf")) & (s > float("-inf"))
        term, w_s, w_t = _terms(gap, p, q, present, beta, KIND, True)
        divergence = _over_classes(term, LAYOUT, False)
        if GRAD_S:
            total = _over_classes(w_s, LAYOUT, False)
            grad = _gradient(w_s, total, q, g, beta, s_slope, is_target, LAYOUT, KIND)
            store_gradient(gs_ptr + gs_at, grad, keep, live, MASK)
        if GRAD_T:
            total = _over_classes(w_t, LAYOUT, False)
            grad = _gradient(w_t, total, p, g, beta, t_slope, is_target, LAYOUT, KIND)
            store_gradient(gt_ptr + gt_at, grad, keep, live, MASK)
    else:
        if GRAD_S:
            total = _over_classes(w_s, LAYOUT, False)
            grad = _gradient(w_s, total, q, g, beta, s_slope, is_target, LAYOUT, KIND)
            store_gradient(gs_ptr + gs_at, grad, keep, live, MASK)
        if GRAD_T:
            total = _over_classes(w_t, LAYOUT, False)
            grad = _gradient(w_t, total, p, g, beta, t_slope, is_target, LAYOUT, KIND)
            store_gradient(gt_ptr + gt_at, grad, keep, live, MASK)
    if KIND == 1:
        divergence = binary + beta * divergence
    loss = tl.where(counts, scale * divergence, 0.0)
    if STORE_ROWS:
        tl.store(rows_ptr + rows, loss, mask=valid)
    if REDUCE:
        if LAYOUT == 3:
            reduce_last(loss, loss_ptr, partial_ptr, counter_ptr, 1024)
        else:
            reduce_last(tl.sum(loss, axis=0), loss_ptr, partial_ptr, counter_ptr, 1024)


@triton.jit
def _walk(
    s_row, t_row, gs_row, gt_row, s_class, t_class, gs_class, gt_class, target, g, counts,
    k, s_top, t_top, s_inv, t_inv, log_ratio, beta, s_total, t_total, s_slope, t_slope,
    V: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr, NEAR: tl.constexpr,
    STORE_S: tl.constexpr, STORE_T: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Read a row once more: store its gradients, or return its sums (divergence, Σw_s, Σw_t)."""
    sums = tl.zeros([BLOCK], tl.float32)
    s_sums = tl.zeros([BLOCK], tl.float32)
    t_sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        classes = (start + tl.arange(0, BLOCK)).to(tl.int64)
        live = classes < V
        s = _without(
            tl.load(s_row + classes * s_class, mask=live, other=float("-inf")), classes == target, KIND
        )
        t = _without(
            tl.load(t_row + classes * t_class, mask=live, other=float("-inf")), classes == target, KIND
        )
        q = tl.exp2(s * k - s_top) * s_inv
        p = tl.exp2(t * k - t_top) * t_inv
        gap = _clamped_gap(s, t, k, log_ratio, KIND)
        present = (t > float("-inf")) & (s > float("-inf"))
        term, w_s, w_t = _terms(gap, p, q, present, beta, KIND, NEAR)
        if STORE_S or STORE_T:
            is_target = classes == target
            if STORE_S:
                grad = _gradient(w_s, s_total, q, g, beta, s_slope, is_target, 3, KIND)
                store_gradient(gs_row + classes * gs_class, grad, counts, live, MASK)
            if STORE_T:
                grad = _gradient(w_t, t_total, p, g, beta, t_slope, is_target, 3, KIND)
                store_gradient(gt_row + classes * gt_class, grad, counts, live, MASK)
        else:
            sums += term
            s_sums += w_s
            t_sums += w_t
    return tl.sum(sums, axis=0), tl.sum(s_sums, axis=0), tl.sum(t_sums, axis=0)


@triton.jit
def pair_loop_kernel(
    s_ptr, t_ptr, gs_ptr, gt_ptr, rows_ptr, loss_ptr, partial_ptr, counter_ptr,
    weight_ptr, mask_ptr, upstream_ptr, target_ptr, temperature, temperature_ptr, divisor, divisor_ptr, alpha, beta,
    num_rows, inner,
    s_outer, s_inner, s_class, t_outer, t_inner, t_class, gs_outer, gs_inner, gs_class, gt_outer, gt_inner, gt_class,
    V: tl.constexpr, UNIT: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr,
    T_PTR: tl.constexpr, DIVISOR_PTR: tl.constexpr, WEIGHT: tl.constexpr, MASK: tl.constexpr,
    UPSTREAM: tl.constexpr, EARLY_EXIT: tl.constexpr, GRAD_S: tl.constexpr, GRAD_T: tl.constexpr,
    STORE_ROWS: tl.constexpr, REDUCE: tl.constexpr,
):  # fmt: skip
    """Rows that do not fit on the chip: log-sum-exps, then the row's sums, then its gradients."""
    T = scalar(temperature, temperature_ptr, T_PTR)
    factor = T * T / scalar(divisor, divisor_ptr, DIVISOR_PTR)
    if UPSTREAM == 1:
        upstream = tl.load(upstream_ptr).to(tl.float32)
        if EARLY_EXIT:
            if upstream == 1.0:
                return
        factor *= upstream
    inv_t = 1.0 / T
    k = inv_t * 1.4426950408889634
    row = tl.program_id(0)
    outer, within = tl.cast(row // inner, tl.int64) * UNIT, tl.cast(row % inner, tl.int64)
    scale, counts = row_factor(
        row, row < num_rows, weight_ptr, mask_ptr, upstream_ptr, factor, WEIGHT, MASK, UPSTREAM
    )
    s_row = s_ptr + outer * s_outer + within * s_inner
    t_row = t_ptr + outer * t_outer + within * t_inner
    target = row * 0
    if KIND == 1:
        target = tl.load(target_ptr + row)

    # Online log-sum-exp a lane (Milakov & Gimelshein 2018). A lane's peak starts far below any logit, and
    # finite: -inf - -inf would be NaN.
    s_peak = tl.full([BLOCK], -1e38, tl.float32)
    t_peak = tl.full([BLOCK], -1e38, tl.float32)
    s_acc = tl.zeros([BLOCK], tl.float32)
    t_acc = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        classes = (start + tl.arange(0, BLOCK)).to(tl.int64)
        live = classes < V
        s = _without(
            tl.load(s_row + classes * s_class, mask=live, other=float("-inf")), classes == target, KIND
        )
        t = _without(
            tl.load(t_row + classes * t_class, mask=live, other=float("-inf")), classes == target, KIND
        )
        s_new, t_new = tl.maximum(s_peak, s), tl.maximum(t_peak, t)
        s_acc = s_acc * tl.exp2((s_peak - s_new) * k) + tl.exp2((s - s_new) * k)
        t_acc = t_acc * tl.exp2((t_peak - t_new) * k) + tl.exp2((t - t_new) * k)
        s_peak, t_peak = s_new, t_new
    s_max, t_max = tl.max(s_peak, axis=0), tl.max(t_peak, axis=0)
    s_top, t_top = s_max * k, t_max * k
    s_sum = tl.sum(s_acc * tl.exp2((s_peak - s_max) * k), axis=0)
    t_sum = tl.sum(t_acc * tl.exp2((t_peak - t_max) * k), axis=0)
    s_inv, t_inv = 1.0 / s_sum, 1.0 / t_sum
    log_ratio = (t_top - s_top) + tl.log2(t_sum * s_inv)

    binary = s_top * 0.0
    s_slope, t_slope = binary, binary
    if KIND == 1:
        binary, s_slope, t_slope = _binary(
            _odds(s_row, target.to(tl.int64) * s_class, k, s_top, s_sum),
            _odds(t_row, target.to(tl.int64) * t_class, k, t_top, t_sum),
        )
        binary, s_slope, t_slope = alpha * binary, alpha * s_slope, alpha * t_slope
    g = tl.where(counts, scale * inv_t, 0.0)
    gs_row, gt_row = gs_ptr, gt_ptr
    if GRAD_S:
        gs_row += outer * gs_outer + within * gs_inner
    if GRAD_T:
        gt_row += outer * gt_outer + within * gt_inner
    divergence, s_total, t_total = _walk(
        s_row, t_row, gs_row, gt_row, s_class, t_class, gs_class, gt_class, target, g, counts,
        k, s_top, t_top, s_inv, t_inv, log_ratio, beta, 0.0, 0.0, 0.0, 0.0,
        V, BLOCK, KIND, False, False, False, MASK,
    )  # fmt: skip
    if divergence < 1e-3:
        divergence, s_total, t_total = _walk(
            s_row, t_row, gs_row, gt_row, s_class, t_class, gs_class, gt_class, target, g, counts,
            k, s_top, t_top, s_inv, t_inv, log_ratio, beta, 0.0, 0.0, 0.0, 0.0,
            V, BLOCK, KIND, True, False, False, MASK,
        )  # fmt: skip
        if GRAD_S or GRAD_T:
            _walk(
                s_row, t_row, gs_row, gt_row, s_class, t_class, gs_class, gt_class, target, g, counts,
                k, s_top, t_top, s_inv, t_inv, log_ratio, beta, s_total, t_total, s_slope, t_slope,
                V, BLOCK, KIND, True, GRAD_S, GRAD_T, MASK,
            )  # fmt: skip
    elif GRAD_S or GRAD_T:
        _walk(
            s_row, t_row, gs_row, gt_row, s_class, t_class, gs_class, gt_class, target, g, counts,
            k, s_top, t_top, s_inv, t_inv, log_ratio, beta, s_total, t_total, s_slope, t_slope,
            V, BLOCK, KIND, False, GRAD_S, GRAD_T, MASK,
        )  # fmt: skip
    if KIND == 1:
        divergence = binary + beta * divergence
    loss = tl.where(counts, scale * divergence, 0.0)
    if STORE_ROWS:
        tl.store(rows_ptr + row, loss)
    if REDUCE:
        reduce_last(loss, loss_ptr, partial_ptr, counter_ptr, 1024)

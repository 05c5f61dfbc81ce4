// The Jensen-Shannon divergence of rows of logits with its gradients, in float32: the CPU path of
// kdfast/reference/pair/closed.py, which has the equations. A row stays in a core's cache throughout.
#pragma once

#include "row_losses.hpp"

namespace kdfast {

// log x to 1 ulp, of x ≥ 0; anything below the smallest normal number counts as that; NaN for NaN.
KDFAST_INLINE void log_lanes(Lanes& x) {
  constexpr int32_t kHalfRoot = 0x3f3504f3;  // the bits of √½
  at_least(Lanes{} + 1.17549435e-38f, x);
  IntLanes bits;
  set_bits(x, bits);
  bits -= kHalfRoot;
  Lanes exponent, f;
  convert(bits >> 23, exponent);
  bits = (bits & 0x7fffff) + kHalfRoot;  // x / 2^exponent, between √½ and √2
  set_bits(bits, f);
  f -= 1.0f;
  Lanes p = 7.0376836e-2f * f - 1.1514610e-1f;
  p = p * f + 1.1676998e-1f;
  p = p * f - 1.2420140e-1f;
  p = p * f + 1.4249323e-1f;
  p = p * f - 1.6668058e-1f;
  p = p * f + 2.0000715e-1f;
  p = p * f - 2.4999994e-1f;
  p = p * f + 3.3333331e-1f;
  const Lanes square = f * f;
  // log 2 in two parts, the large one of few bits: its multiples are exact.
  p = p * f * square - 2.1219444e-4f * exponent - 0.5f * square + f + 0.693359375f * exponent;
  keep_nan(x, p);
  x = p;
}

// β and what is left of 1.
struct Shares {
  float teacher, student;
};

// β·KL(p ‖ M) + (1-β)·KL(q ‖ M), M = β·p + (1-β)·q, and T times its gradients.
KDFAST_INLINE float jsd_row(const float* s, const float* t, int64_t classes, float inverse, Shares beta,
                            Scratch& scratch, float* grad_s, float* grad_t) {
  const int64_t padded = scratch.padded;
  float *const q_row = scratch.part(2), *const p_row = scratch.part(3);
  // log(q/M) and log(p/M) take the place of the copies of the logits: each is read before it is written.
  float *const b_row = scratch.part(0), *const a_row = scratch.part(1);
  const auto [x_row, peak_s, z_s] = powers_of(s, classes, padded, inverse, b_row, q_row);
  const auto [y_row, peak_t, z_t] = powers_of(t, classes, padded, inverse, a_row, p_row);
  const float inverse_s = static_cast<float>(1.0 / z_s), inverse_t = static_cast<float>(1.0 / z_t);
  const float log_s = static_cast<float>(std::log(z_s)), log_t = static_cast<float>(std::log(z_t));
  Lanes sum_s{}, sum_t{};
  for (int64_t at = 0; at < padded; at += kRowLanes) {
    Lanes x, y, q, p;
    load_lanes(x_row + at, x);
    load_lanes(y_row + at, y);
    load_lanes(q_row + at, q);
    load_lanes(p_row + at, p);
    q *= inverse_s;
    p *= inverse_t;
    Lanes mixture = beta.teacher * p + beta.student * q;
    log_lanes(mixture);
    const Lanes b = ((x - peak_s) * inverse - log_s) - mixture;
    const Lanes a = ((y - peak_t) * inverse - log_t) - mixture;
    sum_s += q * b;
    sum_t += p * a;
    save_lanes(q, q_row + at);
    save_lanes(p, p_row + at);
    save_lanes(b, b_row + at);
    save_lanes(a, a_row + at);
  }
  const float loss_s = static_cast<float>(lane_sum(sum_s)), loss_t = static_cast<float>(lane_sum(sum_t));
  const auto side = [&](const float* own, const float* ratio, float share, float loss, float* grad) {
    for (int64_t at = 0; grad && at < padded; at += kRowLanes) {
      Lanes value, log;
      load_lanes(own + at, value);
      load_lanes(ratio + at, log);
      store_lanes(share * value * (log - loss), classes - at, grad + at);
    }
  };
  side(q_row, b_row, beta.student, loss_s, grad_s);
  side(p_row, a_row, beta.teacher, loss_t, grad_t);
  return beta.teacher * loss_t + beta.student * loss_s;
}

KDFAST_EVERY_WIDTH
inline void jsd_some(int64_t begin, int64_t end, int64_t classes, Rows s, Rows t, Care care, double beta,
                     float* loss, Gradient grad_s, Gradient grad_t, Scratch& scratch) {
  const Shares shares{static_cast<float>(beta), static_cast<float>(1 - beta)};
  const float inverse = static_cast<float>(care.inverse);
  for (int64_t row = begin; row < end; ++row) {
    float *const to_s = grad_s.at(row), *const to_t = grad_t.at(row);
    loss[row] = jsd_row(s.at(row), t.at(row), classes, inverse, shares, scratch, to_s, to_t);
    if (is_near(loss[row], care.below))
      loss[row] = near_jsd_row(s.at(row), t.at(row), classes, care.inverse, beta, scratch.near, to_s, to_t);
  }
}

// As kl_rows.
inline bool jsd_rows(int64_t rows, int64_t classes, Rows s, Rows t, Care care, double beta, float* loss,
                     Gradient grad_s, Gradient grad_t, int64_t threads) {
  shared_out(rows, classes, threads, [&](int64_t begin, int64_t end) {
    Scratch scratch(classes);
    jsd_some(begin, end, classes, s, t, care, beta, loss, grad_s, grad_t, scratch);
  });
  return left_over(rows, loss);
}

}  // namespace kdfast

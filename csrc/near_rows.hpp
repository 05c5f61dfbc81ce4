// Rows whose student and teacher nearly agree, in float64: where a divergence in float32 has lost its digits
// to cancellation. At a high temperature those of a student that has learned are such.
//
// 8 doubles side by side, as lanes.hpp has floats: every instruction set gives the same bits.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "lanes.hpp"

namespace kdfast {

constexpr int64_t kNearLanes = kLanesOf<Doubles>;

// p[0] + p[1]·x + …
template <size_t kTerms>
KDFAST_INLINE Doubles polynomial(const double (&p)[kTerms], const Doubles& x) {
  Doubles sum = Doubles{} + p[kTerms - 1];
  for (size_t term = kTerms - 1; term-- > 0;) sum = sum * x + p[term];
  return sum;
}

// 1/n!.
constexpr double kTaylor[] = {
    1.0,        1.0,         1.0 / 2,      1.0 / 6,       1.0 / 24,       1.0 / 120,       1.0 / 720,
    1.0 / 5040, 1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800};
// 2/((2n + 1)·…): of log m = 2·(f + f³/3 + f⁵/5 + …), f = (m - 1)/(m + 1).
constexpr double kOdd[] = {2.0,      2.0 / 3,  2.0 / 5,  2.0 / 7,  2.0 / 9, 2.0 / 11,
                           2.0 / 13, 2.0 / 15, 2.0 / 17, 2.0 / 19, 2.0 / 21};
// log 2 in two parts, the large one of few bits: its multiples are exact.
constexpr double kLog2High = 6.93147180369123816490e-01, kLog2Low = 1.90821492927058770002e-10;

// e^x, to 2 ulp; as of -700 below it. x is 700 at most.
KDFAST_INLINE Doubles near_exp(const Doubles& power) {
  Doubles x = power;
  at_least(Doubles{} - 700.0, x);
  const double magic = 6755399441055744.0;  // 1.5 · 2^52: added and taken away again, it rounds to an integer
  const Doubles whole = x * 1.4426950408889634 + magic, n = whole - magic;
  Doubles out = polynomial(kTaylor, (x - n * kLog2High) - n * kLog2Low);
  Longs bits, scaled;
  set_bits(whole, bits);
  set_bits(out, scaled);
  set_bits(scaled + (bits << 52), out);
  return out;
}

// log x, to 2 ulp, of x that is normal and above 0.
KDFAST_INLINE Doubles near_log(const Doubles& x) {
  constexpr uint64_t kHalfRoot = 0x3fe6a09e667f3bcd;  // the bits of √½
  Longs bits;
  set_bits(x, bits);
  bits += 0x3ff0000000000000 - kHalfRoot;
  Doubles exponent, m;
  set_bits((bits >> 52) + 0x4330000000000000, exponent);  // as a number: 2^52 and the biased exponent
  exponent -= 4503599627370496.0 + 1023.0;
  set_bits((bits & 0x000fffffffffffff) + kHalfRoot, m);  // x / 2^exponent, between √½ and √2
  const Doubles f = (m - 1.0) / (m + 1.0);
  return exponent * kLog2High + (polynomial(kOdd, f * f) * f + exponent * kLog2Low);
}

// e^u - 1 - u for |u| < ½, to 2 ulp.
KDFAST_INLINE Doubles near_rest(const Doubles& u) {
  constexpr double rest[] = {kTaylor[2],  kTaylor[3],  kTaylor[4],          kTaylor[5],           kTaylor[6],
                             kTaylor[7],  kTaylor[8],  kTaylor[9],          kTaylor[10],          kTaylor[11],
                             kTaylor[12], kTaylor[13], 1.0 / 87178291200.0, 1.0 / 1307674368000.0};
  return u * u * polynomial(rest, u);
}

// One of two, by whether |u| < ½.
template <typename Part>
KDFAST_INLINE void choose(const Part& u, const Part& near, const Part& far, Part& out) {
  out = u < 0.5 ? (u > -0.5 ? near : far) : far;
}
template <typename Half>
KDFAST_INLINE void choose(const Pair<Half>& u, const Pair<Half>& near, const Pair<Half>& far,
                          Pair<Half>& out) {
  choose(u.lo, near.lo, far.lo, out.lo);
  choose(u.hi, near.hi, far.hi, out.hi);
}

KDFAST_INLINE Doubles loaded(const double* from) {
  Doubles out;
  load_lanes(from, out);
  return out;
}

// One row: memory, and what is known of it. Beyond the last class p and q are 0.
struct NearRow {
  int64_t padded = 0;
  std::vector<double> memory;
  double *q, *p, *delta, *free;  // softmax(s/T), softmax(t/T), log p - log q, room for a row

  KDFAST_INLINE void fill(const float* s, const float* t, int64_t classes, double inverse) {
    padded = (classes + kNearLanes - 1) / kNearLanes * kNearLanes;
    memory.resize(4 * static_cast<size_t>(padded));
    q = memory.data(), p = q + padded, delta = p + padded, free = delta + padded;
    for (int64_t c = 0; c < classes; ++c) q[c] = static_cast<double>(s[c]);
    for (int64_t c = 0; c < classes; ++c) p[c] = static_cast<double>(t[c]);
    for (int64_t c = classes; c < padded; ++c) q[c] = q[0], p[c] = p[0];
    const double most_s = largest<Doubles>(q, padded), most_t = largest<Doubles>(p, padded);
    Doubles sum_s{}, sum_t{};
    for (int64_t at = 0; at < padded; at += kNearLanes) {
      const Doubles x = loaded(q + at), y = loaded(p + at);
      // Logits are subtracted before anything is scaled or rounded: exact when they are close.
      save_lanes(((y - x) - (most_t - most_s)) * inverse, delta + at);
      save_lanes(near_exp((x - most_s) * inverse), q + at);
      save_lanes(near_exp((y - most_t) * inverse), p + at);
      if (at + kNearLanes > classes)
        for (int64_t c = classes; c < padded; ++c) q[c] = p[c] = 0;
      sum_s += loaded(q + at);
      sum_t += loaded(p + at);
    }
    const double z_s = lane_sum(sum_s), z_t = lane_sum(sum_t), shift = std::log(z_t / z_s);
    for (int64_t at = 0; at < padded; at += kNearLanes) {
      save_lanes(loaded(q + at) * (1.0 / z_s), q + at);
      save_lanes(loaded(p + at) * (1.0 / z_t), p + at);
      save_lanes(loaded(delta + at) - shift, delta + at);
    }
  }
};

// KL(p ‖ q) and T times its gradients.
KDFAST_EVERY_WIDTH
inline float near_kl_row(const float* s, const float* t, int64_t classes, double inverse, NearRow& row,
                         float* grad_s, float* grad_t) {
  row.fill(s, t, classes, inverse);
  double* const differences = row.free;  // q - p
  Doubles sum{}, sum_of_differences{};
  for (int64_t at = 0; at < row.padded; at += kNearLanes) {
    const Doubles q = loaded(row.q + at), p = loaded(row.p + at), delta = loaded(row.delta + at);
    const Doubles u = delta * -1.0, rest = near_rest(u), far = q - p;
    Doubles difference, term;
    choose(u, p * (u + rest), far, difference);
    choose(u, p * rest, p * delta + far, term);
    sum += term;
    sum_of_differences += difference;
    save_lanes(difference, differences + at);
  }
  // The rounding of the two log-sum-exps shifts every δ of a row alike: that is taken off.
  const double loss = lane_sum(sum), centre = lane_sum(sum_of_differences);
  const double *const q = row.q, *const p = row.p, *const delta = row.delta;
  for (int64_t c = 0; grad_s && c < classes; ++c)
    grad_s[c] = static_cast<float>(differences[c] - centre * q[c]);
  for (int64_t c = 0; grad_t && c < classes; ++c)
    grad_t[c] = static_cast<float>(p[c] * (delta[c] + centre - loss));
  return static_cast<float>(loss);
}

// β·KL(p ‖ M) + (1-β)·KL(q ‖ M), M = β·p + (1-β)·q, and T times its gradients.
KDFAST_EVERY_WIDTH
inline float near_jsd_row(const float* s, const float* t, int64_t classes, double inverse, double beta,
                          NearRow& row, float* grad_s, float* grad_t) {
  row.fill(s, t, classes, inverse);
  double* const ratio = row.free;  // log(p/M)
  Doubles sum_s{}, sum_t{};
  for (int64_t at = 0; at < row.padded; at += kNearLanes) {
    const Doubles delta = loaded(row.delta + at);
    Doubles bounded = delta;
    at_least(Doubles{} - 700.0, bounded);
    const Doubles a = near_log(near_exp(bounded * -1.0) * (1 - beta) + beta) * -1.0;
    sum_s += loaded(row.q + at) * (a - delta);
    sum_t += loaded(row.p + at) * a;
    save_lanes(a, ratio + at);
  }
  const double loss_s = lane_sum(sum_s), loss_t = lane_sum(sum_t);
  const double *const q = row.q, *const p = row.p, *const delta = row.delta;
  for (int64_t c = 0; grad_s && c < classes; ++c)
    grad_s[c] = static_cast<float>((1 - beta) * q[c] * ((ratio[c] - delta[c]) - loss_s));
  for (int64_t c = 0; grad_t && c < classes; ++c)
    grad_t[c] = static_cast<float>(beta * p[c] * (ratio[c] - loss_t));
  return static_cast<float>(beta * loss_t + (1 - beta) * loss_s);
}

// Whether a row's loss in float32 is to be found again in float64; -inf and NaN are left to others.
KDFAST_INLINE bool is_near(float loss, float below) { return loss < below && loss > -HUGE_VALF; }

// Whether a row is left to be computed by others: one with NaN in it, or with a class that is absent.
inline bool left_over(int64_t rows, const float* loss) {
  return !std::all_of(loss, loss + rows, [](float value) { return value > -HUGE_VALF; });
}

}  // namespace kdfast

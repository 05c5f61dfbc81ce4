// Losses of rows of logits with their gradients, in float32, for the CPU path of kdfast/reference.
//
// Everything that a row needs is computed while the row is in a core's cache: the largest logits,
// exponentials and their sums, then terms and gradients. Vectors are GCC's and Clang's own (16 lanes whatever
// the machine has), so that every instruction set adds in the same order and gives the same bits.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "lanes.hpp"
#include "near_rows.hpp"
#include "shares.hpp"

namespace kdfast {

// 2^y for y ≤ 0, to 1.5 ulp; 2^-126 below that, NaN for NaN.
KDFAST_INLINE void exp2_lanes(Lanes& y) {
  const Lanes magic =
      Lanes{} + 12582912.0f;  // 1.5 · 2^23: added and taken away again, it rounds to an integer
  at_least(Lanes{} - 126.0f, y);
  const Lanes whole = y + magic;
  const Lanes f = y - (whole - magic);
  Lanes p = 1.5403530e-4f * f + 1.3333558e-3f;
  p = p * f + 9.6181291e-3f;
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.0f;
  WordLanes bits, scale;  // unsigned: of NaN they are anything, and wrap
  set_bits(whole, bits);
  set_bits(p, scale);
  set_bits(scale + (bits << 23), p);
  keep_nan(y, p);
  y = p;
}

// A row of whole vectors: its own memory, or a copy whose last vector is filled up with what changes no
// maximum.
KDFAST_INLINE const float* padded_row(const float* row, int64_t classes, int64_t padded, float* copy) {
  if (classes == padded) return row;
  for (int64_t lane = 0; lane < kRowLanes; ++lane) copy[padded - kRowLanes + lane] = row[0];
  std::memcpy(copy, row, static_cast<size_t>(classes) * sizeof(float));
  return copy;
}

// The filling again, once the peak is known: probabilities of 2^-126, which change no sum.
KDFAST_INLINE void refill(const float* row, int64_t classes, int64_t padded, float value) {
  if (classes == padded) return;
  float* const copy = const_cast<float*>(row);
  for (int64_t at = classes; at < padded; ++at) copy[at] = value;
}

// exp((x - peak)/T) of a row, and their sum; `scale` is log2(e)/T.
KDFAST_INLINE double exponentials(const float* row, int64_t padded, float peak, float scale, float* out) {
  Lanes sum{};
  for (int64_t at = 0; at < padded; at += kRowLanes) {
    Lanes x;
    load_lanes(row + at, x);
    x = (x - peak) * scale;
    exp2_lanes(x);
    sum += x;
    save_lanes(x, out + at);
  }
  return lane_sum(sum);
}

// A row of whole vectors, its largest element, and the sum of what powers_of has written.
struct Powers {
  const float* row;
  float peak;
  double sum;
};

// softmax(row/T) before it is divided by its sum; `inverse` is 1/T, `copy` is for a row of no whole vectors.
KDFAST_INLINE Powers powers_of(const float* row, int64_t classes, int64_t padded, float inverse, float* copy,
                               float* out) {
  const float scale = inverse * 1.44269504f;
  row = padded_row(row, classes, padded, copy);
  const float peak = largest<Lanes>(row, padded);
  refill(row, classes, padded, peak - 256.0f / scale);
  return {row, peak, exponentials(row, padded, peak, scale, out)};
}

// Rows in memory: a row's elements lie side by side.
struct Rows {
  const float* data;
  int64_t stride;
  const float* at(int64_t row) const { return data + row * stride; }
};

// What may be written of a row: null where nobody wants it.
struct Gradient {
  float* data;
  int64_t classes;
  float* at(int64_t row) const { return data ? data + row * classes : nullptr; }
};

// Room for a row of whole vectors, twice the logits and twice their exponentials.
struct Scratch {
  explicit Scratch(int64_t classes)
      : padded((classes + kRowLanes - 1) / kRowLanes * kRowLanes), memory(4 * static_cast<size_t>(padded)) {}
  float* part(int index) { return memory.data() + index * padded; }
  int64_t padded;
  std::vector<float> memory;
  NearRow near;
};

// What a divergence is of: 1/T, and the loss below which a row is taken again in float64.
struct Care {
  double inverse;
  float below;
};

// KL(softmax(t/T) ‖ softmax(s/T)) and T times its gradients.
KDFAST_INLINE float kl_row(const float* s, const float* t, int64_t classes, float inverse, Scratch& scratch,
                           float* grad_s, float* grad_t) {
  const int64_t padded = scratch.padded;
  float *const e_s = scratch.part(2), *const e_t = scratch.part(3);
  const auto [x_row, peak_s, z_s] = powers_of(s, classes, padded, inverse, scratch.part(0), e_s);
  const auto [y_row, peak_t, z_t] = powers_of(t, classes, padded, inverse, scratch.part(1), e_t);
  const float inverse_s = static_cast<float>(1.0 / z_s), inverse_t = static_cast<float>(1.0 / z_t);
  const float shift = static_cast<float>(std::log(z_t / z_s));
  // δ = log p - log q, of logits that are subtracted before anything is rounded: exact where they are close.
  // Σ (q - p) is 0 but for the rounding of the sums, which it takes away.
  Lanes sum{};
  for (int64_t at = 0; at < padded; at += kRowLanes) {
    Lanes x, y, q, p;
    load_lanes(x_row + at, x);
    load_lanes(y_row + at, y);
    load_lanes(e_s + at, q);
    load_lanes(e_t + at, p);
    q *= inverse_s;
    p *= inverse_t;
    const Lanes delta = ((y - peak_t) - (x - peak_s)) * inverse - shift;
    const Lanes difference = q - p;
    sum += p * delta + difference;
    if (grad_s) store_lanes(difference, classes - at, grad_s + at);
    if (grad_t) {
      save_lanes(p, e_t + at);
      save_lanes(delta, e_s + at);
    }
  }
  const float loss = static_cast<float>(lane_sum(sum));
  if (grad_t)
    for (int64_t at = 0; at < padded; at += kRowLanes) {
      Lanes delta, p;
      load_lanes(e_s + at, delta);
      load_lanes(e_t + at, p);
      store_lanes(p * (delta - loss), classes - at, grad_t + at);
    }
  return loss;
}

KDFAST_EVERY_WIDTH
inline void kl_some(int64_t begin, int64_t end, int64_t classes, Rows s, Rows t, Care care, float* loss,
                    Gradient grad_s, Gradient grad_t, Scratch& scratch) {
  const float inverse = static_cast<float>(care.inverse);
  for (int64_t row = begin; row < end; ++row) {
    float *const to_s = grad_s.at(row), *const to_t = grad_t.at(row);
    loss[row] = kl_row(s.at(row), t.at(row), classes, inverse, scratch, to_s, to_t);
    if (is_near(loss[row], care.below))
      loss[row] = near_kl_row(s.at(row), t.at(row), classes, care.inverse, scratch.near, to_s, to_t);
  }
}

// The smallest loss, or NaN where one is NaN.
inline float least_of(int64_t rows, const float* loss) {
  float least = HUGE_VALF;
  for (int64_t row = 0; row < rows; ++row) least = loss[row] >= least || least != least ? least : loss[row];
  return least;
}

// Returns whether a row is left to be computed otherwise. Rows are shared out evenly; what a row gets does
// not depend on how many threads there are.
inline bool kl_rows(int64_t rows, int64_t classes, Rows s, Rows t, Care care, float* loss, Gradient grad_s,
                    Gradient grad_t, int64_t threads) {
  shared_out(rows, classes, threads, [&](int64_t begin, int64_t end) {
    Scratch scratch(classes);
    kl_some(begin, end, classes, s, t, care, loss, grad_s, grad_t, scratch);
  });
  return left_over(rows, loss);
}

}  // namespace kdfast

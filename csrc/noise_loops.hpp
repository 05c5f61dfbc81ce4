// Noise added to rows, or compared with what predicts it, while it is drawn; in float32.
#pragma once

#include "lanes.hpp"
#include "shares.hpp"

namespace kdfast {

// Dense [rows, inner]; scale and sigma hold a number a row.
struct NoisedRows {
  int64_t rows, inner;
  const float *x, *scale, *sigma;
  float* out;
};

constexpr int64_t kDrawn = 4 * kNormalLanes;

// out = scale·x + sigma·ε, of blocks of normals.
KDFAST_EVERY_WIDTH
inline void noised_some(int64_t begin, int64_t end, uint64_t key, uint32_t step, const NoisedRows& call) {
  float normals[kDrawn];
  const int64_t count = call.rows * call.inner;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * kDrawn, last = std::min(count, first + kDrawn);
    normal_block(key, step, static_cast<uint64_t>(first) / 4, normals);
    for (int64_t from = first; from < last;) {
      const int64_t row = from / call.inner, to = std::min(last, (row + 1) * call.inner);
      const float scale = call.scale[row], sigma = call.sigma[row];
      const float *const x = call.x + from, *const drawn = normals + (from - first);
      float* const out = call.out + from;
      for (int64_t at = 0; at < to - from; ++at) out[at] = scale * x[at] + sigma * drawn[at];
      from = to;
    }
  }
}

inline void noised_rows(uint64_t key, uint32_t step, const NoisedRows& call, int64_t threads) {
  const int64_t blocks = (call.rows * call.inner + kDrawn - 1) / kDrawn;
  shared_out(blocks, 4 * kDrawn, threads,  // a normal is worth four sums
             [&](int64_t begin, int64_t end) { noised_some(begin, end, key, step, call); });
}

// Σ (x - ε)² of parts of x, dense, and factor·(x - ε); null where nobody wants it.
struct NoiseError {
  static constexpr int64_t kPart = 64 * kDrawn;

  int64_t count;
  const float* x;
  float factor, *grad;
  double* sums;  // of each part
};

KDFAST_EVERY_WIDTH
inline void noise_error_some(int64_t begin, int64_t end, uint64_t key, uint32_t step,
                             const NoiseError& call) {
  static_assert(kDrawn <= WideSum::kTogether * kRowLanes);
  float normals[kDrawn];
  for (int64_t part = begin; part < end; ++part) {
    WideSum sum;
    const int64_t stop = std::min(call.count, (part + 1) * NoiseError::kPart);
    for (int64_t first = part * NoiseError::kPart; first < stop; first += kDrawn) {
      normal_block(key, step, static_cast<uint64_t>(first) / 4, normals);
      const int64_t count = std::min(kDrawn, stop - first);
      int64_t at = 0;
      for (; at + kRowLanes <= count; at += kRowLanes) {
        Lanes error, drawn;
        load_lanes(call.x + first + at, error);
        load_lanes(normals + at, drawn);
        error -= drawn;
        sum.add(error * error);
        if (call.grad) store_lanes(error * call.factor, kRowLanes, call.grad + first + at);
      }
      for (; at < count; ++at) {
        const float error = call.x[first + at] - normals[at];
        sum.add(error * error);
        if (call.grad) call.grad[first + at] = error * call.factor;
      }
      sum.flush();
    }
    call.sums[part] = sum.total();
  }
}

// mean((x - ε)²), ε the normals of a step, and `upstream` times its gradient.
inline double noise_mse(uint64_t key, uint32_t step, int64_t count, const float* x, float* grad,
                        double upstream, int64_t threads) {
  const int64_t parts = (count + NoiseError::kPart - 1) / NoiseError::kPart;
  std::vector<double> sums(static_cast<size_t>(parts));
  const NoiseError call{count, x, static_cast<float>(2.0 * upstream / static_cast<double>(count)), grad,
                        sums.data()};
  shared_out(parts, 4 * NoiseError::kPart, threads,
             [&](int64_t begin, int64_t end) { noise_error_some(begin, end, key, step, call); });
  return in_order(sums) / static_cast<double>(count);
}

}  // namespace kdfast

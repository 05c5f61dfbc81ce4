// Noise added to rows while it is drawn, in float32.
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

}  // namespace kdfast

// One step of a linear sampler, in float32: the CPU path of kdfast/ops/denoise, whose equation is in
// kernels/denoise.
//
// A few hundred elements at a time, so that what one term leaves behind the next finds in the cache.
#pragma once

#include <cmath>

#include "lanes.hpp"
#include "shares.hpp"

namespace kdfast {

// Columns of a coefficient table.
struct StepRow {
  float px, po, a, b, d, h[3], c, s;
};

// Samples [rows, inner], dense; the output's rows are `output_stride` apart. With guidance, `conditional` and
// `unconditional` point at the halves, whose rows are `half`, and the sample may have a row for each.
struct Step {
  int64_t rows, inner, half, output_stride;
  const float *sample, *conditional, *unconditional;
  float guidance;
  const float* history[3];
  const float* noise;  // null where there is none, like history and x0
  float clip;          // infinite: none
  float *y, *x0;
};

KDFAST_EVERY_WIDTH
inline void step_some(int64_t begin, int64_t end, const Step& step, const StepRow& row) {
  constexpr int64_t kTogether = 512;
  const bool clipped = std::isfinite(step.clip), split = clipped || step.x0;
  // Where nobody sees x0, its terms go into those of the sample and the output.
  const auto folded = [&](float own, float factor) {
    return split ? own
                 : static_cast<float>(static_cast<double>(own) +
                                      static_cast<double>(row.b) * static_cast<double>(factor));
  };
  const float of_sample = folded(row.a, row.px), of_output = folded(row.d, row.po), clip = step.clip;
  float o[kTogether], y[kTogether];
  for (int64_t r = begin; r < end; ++r) {
    const int64_t output_row = (r < step.half ? r : r - step.half) * step.output_stride;
    for (int64_t from = 0; from < step.inner; from += kTogether) {
      const int64_t size = std::min(kTogether, step.inner - from), place = r * step.inner + from;
      const float *const x = step.sample + place, *const c = step.conditional + output_row + from;
      if (step.unconditional) {
        const float* const u = step.unconditional + output_row + from;
        for (int64_t at = 0; at < size; ++at) o[at] = u[at] + step.guidance * (c[at] - u[at]);
      } else {
        std::memcpy(o, c, static_cast<size_t>(size) * sizeof(float));
      }
      for (int64_t at = 0; at < size; ++at) y[at] = of_sample * x[at] + of_output * o[at];
      if (split) {
        for (int64_t at = 0; at < size; ++at) o[at] = row.px * x[at] + row.po * o[at];
        if (clipped)
          for (int64_t at = 0; at < size; ++at) {
            const float low = o[at] < -clip ? -clip : o[at];  // NaN stays
            o[at] = low > clip ? clip : low;
          }
        for (int64_t at = 0; at < size; ++at) y[at] += row.b * o[at];
        if (step.x0) std::memcpy(step.x0 + place, o, static_cast<size_t>(size) * sizeof(float));
      }
      for (int which = 0; which < 3; ++which)
        if (step.history[which]) {
          const float* const h = step.history[which] + place;
          for (int64_t at = 0; at < size; ++at) y[at] += row.h[which] * h[at];
        }
      if (step.noise) {
        const float* const z = step.noise + place;
        for (int64_t at = 0; at < size; ++at) y[at] += row.c * z[at];
      }
      std::memcpy(step.y + place, y, static_cast<size_t>(size) * sizeof(float));
    }
  }
}

inline void denoise_step(const Step& step, const StepRow& row, int64_t threads) {
  shared_out(step.rows, step.inner, threads,
             [&](int64_t begin, int64_t end) { step_some(begin, end, step, row); });
}

}  // namespace kdfast

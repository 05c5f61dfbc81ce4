// Kdiffusion's recursion over re-parameterised branches, in float32: the CPU path of kdfast/ops/feature.
//
// A few elements of all branches at a time: their residuals stay in the cache between the way there and the
// way back.
#pragma once

#include "lanes.hpp"
#include "shares.hpp"

namespace kdfast {

// [count, outer, inner] with inner dense; the target is dense altogether.
struct Branches {
  int64_t count, outer, inner;
  const float* data;
  int64_t branch_stride, outer_stride;
  const float* target;
};

// R_k = u_k·(R_{k-1} - w_{k-1}·z_{k-1}) + v_k·(S_{order(k)} - x0), R_0 = 0; the loss is the sum of their mean
// squares.
struct Recursion {
  const float *u, *v;
  const int64_t* order;
  const float* noise;  // w, or null
  uint64_t seed;
  bool carry;
};

// Null where nobody wants it; grad is laid out as the branches are, with strides of its own, grad_mean is
// that of the branches' mean, dense.
struct BranchResults {
  float *mean, *grad;
  int64_t branch_stride, outer_stride;
  const float* grad_mean;
  double upstream;
};

// Of a block: with normals, as many as begin anywhere in a block of those.
constexpr int64_t kBranchBlock = 4 * kNormalLanes - 4;

inline int64_t blocks_of(const Branches& branches) {
  return (branches.inner + kBranchBlock - 1) / kBranchBlock;
}

// Σ R², of blocks numbered row by row, in float64 a block.
KDFAST_EVERY_WIDTH
inline void recursion_some(int64_t begin, int64_t end, const Branches& s, const Recursion& call, double* sums,
                           const BranchResults& out, float* residuals) {
  constexpr int64_t kRoom = 4 * kNormalLanes;
  const int64_t blocks = blocks_of(s);
  const float each = 1.0f / static_cast<float>(s.count);
  const float slope = static_cast<float>(2.0 * out.upstream / static_cast<double>(s.outer * s.inner));
  float x0[kRoom], behind[kRoom], total[kRoom], normals[kRoom];
  for (int64_t block = begin; block < end; ++block) {
    const int64_t row = block / blocks, from = block % blocks * kBranchBlock;
    const int64_t size = s.inner - from < kBranchBlock ? s.inner - from : kBranchBlock;
    const int64_t place = row * s.inner + from, first = row * s.outer_stride + from;
    const int64_t padded = (size + kRowLanes - 1) / kRowLanes * kRowLanes;
    std::memcpy(x0, s.target + place, static_cast<size_t>(size) * sizeof(float));
    std::memset(behind, 0, sizeof behind);
    std::memset(total, 0, sizeof total);
    WideSum sum;
    for (int64_t k = 0; k < s.count; ++k) {
      const float* const branch = s.data + call.order[k] * s.branch_stride + first;
      float* const residual = residuals + k * kRoom;
      const float u = call.u[k], v = call.v[k];
      for (int64_t at = 0; at < size; ++at) {
        residual[at] = u * behind[at] + v * (branch[at] - x0[at]);
        total[at] += branch[at];
      }
      for (int64_t at = size; at < padded; ++at) residual[at] = 0.0f;
      for (int64_t at = 0; at < padded; at += kRowLanes) {
        Lanes value;
        load_lanes(residual + at, value);
        sum.add(value * value);
      }
      sum.flush();
      if (call.noise && k + 1 < s.count) {
        normal_block(call.seed, static_cast<uint32_t>(k), static_cast<uint64_t>(place) / 4, normals);
        const float w = call.noise[k];
        for (int64_t at = 0; at < size; ++at) behind[at] = residual[at] - w * normals[place % 4 + at];
      } else {
        std::memcpy(behind, residual, static_cast<size_t>(size) * sizeof(float));
      }
    }
    sums[block] = sum.total();
    if (out.mean)
      for (int64_t at = 0; at < size; ++at) out.mean[place + at] = total[at] / static_cast<float>(s.count);
    if (!out.grad) continue;
    std::memset(behind, 0, sizeof behind);  // from here on: what later residuals hand back
    for (int64_t k = s.count - 1; k >= 0; --k) {
      const float* const residual = residuals + k * kRoom;
      float* const grad = out.grad + call.order[k] * out.branch_stride + row * out.outer_stride + from;
      const float u = call.carry ? call.u[k] : 0.0f, v = call.v[k];
      for (int64_t at = 0; at < size; ++at) {
        const float slope_here = slope * residual[at] + behind[at];
        behind[at] = u * slope_here;
        total[at] = v * slope_here;
      }
      if (out.grad_mean)
        for (int64_t at = 0; at < size; ++at) total[at] += each * out.grad_mean[place + at];
      std::memcpy(grad, total, static_cast<size_t>(size) * sizeof(float));
    }
  }
}

// The loss.
inline double branch_recursion(const Branches& branches, const Recursion& call, const BranchResults& out,
                               int64_t threads) {
  const int64_t blocks = branches.outer * blocks_of(branches);
  std::vector<double> sums(static_cast<size_t>(blocks));
  shared_out(blocks, branches.count * std::min(branches.inner, kBranchBlock), threads,
             [&](int64_t begin, int64_t end) {
               std::vector<float> residuals(static_cast<size_t>(branches.count * 4 * kNormalLanes));
               recursion_some(begin, end, branches, call, sums.data(), out, residuals.data());
             });
  return in_order(sums) / static_cast<double>(branches.outer * branches.inner);
}

}  // namespace kdfast

// Vectors of 16 floats, GCC's and Clang's own: whatever the machine has, every instruction set adds in the
// same order and gives the same bits.
#pragma once

#include <cstdint>
#include <cstring>

#include "philox_normal.hpp"  // KDFAST_EVERY_WIDTH

#define KDFAST_INLINE inline __attribute__((always_inline))

namespace kdfast {

constexpr int64_t kRowLanes = 16;
typedef float Lanes __attribute__((vector_size(64)));
typedef double WideLanes __attribute__((vector_size(128)));

// By reference: a vector as wide as this has no calling convention that all machines share.
KDFAST_INLINE void load_lanes(const float* from, Lanes& out) { std::memcpy(&out, from, sizeof out); }

// Up to 16 lanes of a row whose `count` last elements are left.
KDFAST_INLINE void store_lanes(const Lanes& value, int64_t count, float* to) {
  if (count >= kRowLanes)
    std::memcpy(to, &value, sizeof value);
  else
    std::memcpy(to, &value, static_cast<size_t>(count) * sizeof(float));
}

KDFAST_INLINE double lane_sum(const Lanes& value) {
  double sum = 0;
  for (int lane = 0; lane < kRowLanes; ++lane) sum += static_cast<double>(value[lane]);
  return sum;
}

// A sum of float32 terms in float64: a few vectors at a time are added in float32, and what fills no vector
// one by one.
struct WideSum {
  static constexpr int64_t kTogether = 16;  // vectors between two calls of `flush`, at most

  Lanes part{};
  WideLanes lanes{};
  double rest = 0;
  KDFAST_INLINE void add(const Lanes& value) { part += value; }
  KDFAST_INLINE void add(float value) { rest += static_cast<double>(value); }
  KDFAST_INLINE void flush() {
    lanes += __builtin_convertvector(part, WideLanes);
    part = Lanes{};
  }
  KDFAST_INLINE double total() const {
    double parts[kRowLanes];  // by halves: one after another, each would wait for the one before
    std::memcpy(parts, &lanes, sizeof parts);
    for (int64_t half = kRowLanes / 2; half > 0; half /= 2)
      for (int64_t lane = 0; lane < half; ++lane) parts[lane] += parts[lane + half];
    return parts[0] + rest;
  }
};

}  // namespace kdfast

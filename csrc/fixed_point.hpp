// Priorities in fixed point, and the one power function behind them:
//   q = clip(round((|delta| + eps)^alpha * scale), 1, 2^32 - 1),   w = (S / (N q))^beta.
//
// libm's pow differs from CUDA's in the last bit, which would make CPU and GPU draw different rows. This one
// is built from IEEE + - * / on doubles and integer moves only, in a fixed order (-ffp-contract=off here,
// enable_fp_fusion=False in kernels/replay.py), so every machine computes the same bits. Its relative error
// is below 2e-15. No branches, and no conversion between int64 and double, so that compilers vectorise the
// loops.
#pragma once

#include <cstdint>
#include <cstring>

// One copy of a hot loop per instruction set, chosen at load time: wheels are built without -march=native.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(KDFAST_NO_CLONES)
#define KDFAST_SIMD __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define KDFAST_SIMD
#endif

namespace kdfast {

constexpr double kQuantumMax = 4294967295.0;

inline uint64_t bits_of(double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline double double_of(uint64_t bits) {
  double value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// log2 of a finite x >= 0; for 0 a number so low that any power of it is 0, save the 0th, which is 1.
inline double fixed_log2(double x) {
  // x = m 2^e with m in [sqrt(1/2), sqrt(2)): e is the exponent after moving sqrt(1/2) to 1.
  constexpr uint64_t kOne = 0x3FF0000000000000, kSqrtHalf = 0x3FE6A09E667F3BCD;
  const uint64_t bits = bits_of(x);
  const uint64_t biased = (bits + (kOne - kSqrtHalf)) >> 52;
  const double m = double_of(bits - (biased << 52) + kOne);
  const double e = double_of(0x4330000000000000 | biased) - (4503599627370496.0 + 1023.0);
  // log2(m) = 2 / ln 2 * atanh(s), s = (m - 1) / (m + 1), by its series to s^21.
  const double s = (m - 1.0) / (m + 1.0), z = s * s;
  double p = 1.0 / 21.0;
  p = p * z + 1.0 / 19.0;
  p = p * z + 1.0 / 17.0;
  p = p * z + 1.0 / 15.0;
  p = p * z + 1.0 / 13.0;
  p = p * z + 1.0 / 11.0;
  p = p * z + 1.0 / 9.0;
  p = p * z + 1.0 / 7.0;
  p = p * z + 1.0 / 5.0;
  p = p * z + 1.0 / 3.0;
  p = p * z + 1.0;
  const double log2 = e + (s * p) * 2.8853900817779268;
  return x > 0.0 ? log2 : -1e300;
}

// 2^y for |y| <= 512.
inline double fixed_exp2(double y) {
  // Adding 1.5 * 2^52 rounds y to an integer n and leaves n in the low bits.
  constexpr double kRound = 6755399441055744.0;
  const double shifted = y + kRound;
  const double t = (y - (shifted - kRound)) * 0.6931471805599453;
  double p = 1.0 / 6227020800.0;
  p = p * t + 1.0 / 479001600.0;
  p = p * t + 1.0 / 39916800.0;
  p = p * t + 1.0 / 3628800.0;
  p = p * t + 1.0 / 362880.0;
  p = p * t + 1.0 / 40320.0;
  p = p * t + 1.0 / 5040.0;
  p = p * t + 1.0 / 720.0;
  p = p * t + 1.0 / 120.0;
  p = p * t + 1.0 / 24.0;
  p = p * t + 1.0 / 6.0;
  p = p * t + 1.0 / 2.0;
  p = p * t + 1.0;
  p = p * t + 1.0;
  return double_of(bits_of(p) + (bits_of(shifted) << 52));
}

inline double fixed_pow(double x, double exponent) {
  double y = fixed_log2(x) * exponent;
  y = y > 512.0 ? 512.0 : y;
  y = y < -512.0 ? -512.0 : y;
  return fixed_exp2(y);
}

// (|delta| + eps)^alpha * scale, before rounding.
KDFAST_SIMD static void fixed_masses(const float* delta, int64_t count, double alpha, double eps,
                                     double scale, double* mass) {
  for (int64_t i = 0; i < count; ++i) {
    const double magnitude = delta[i] < 0.0F ? -delta[i] : delta[i];
    mass[i] = fixed_pow(magnitude + eps, alpha) * scale;
  }
}

// Round to nearest, ties to even, and clip into [1, 2^32 - 1].
KDFAST_SIMD static void fixed_round(const double* mass, int64_t count, uint32_t* quantum) {
  for (int64_t i = 0; i < count; ++i) {
    double value = mass[i] > kQuantumMax ? kQuantumMax : mass[i];
    value = value < 1.0 ? 1.0 : value;
    quantum[i] = static_cast<uint32_t>(bits_of(value + 4503599627370496.0));
  }
}

// P = q / S and w = (N P)^-beta = (S / (N q))^beta.
KDFAST_SIMD static void importance(const uint32_t* quantum, int64_t count, double total, double live,
                                   double beta, float* weight, float* probability) {
  for (int64_t i = 0; i < count; ++i) {
    const double q = double_of(0x4330000000000000 | quantum[i]) - 4503599627370496.0;
    probability[i] = static_cast<float>(q / total);
    weight[i] = static_cast<float>(fixed_pow(total / (live * q), beta));
  }
}

}  // namespace kdfast

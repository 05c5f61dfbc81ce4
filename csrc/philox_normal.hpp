// Standard normals from Philox counters, in float32: the arithmetic of kernels/common/normal.py, operation by
// operation.
//
// Element e of step t under a key is lane e mod 4 of the block at the counter (⌊e/4⌋ low, ⌊e/4⌋ high, t, 0);
// lanes pair up (Box & Muller 1958). No library function is called and nothing is contracted, so that every
// instruction set gives the same bits; error against exact mathematics on the same integers: under 3e-7
// relative to max(1, |n|).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(KDFAST_NO_CLONES)
#define KDFAST_CLONES
#include <immintrin.h>
#endif
#define KDFAST_INLINE inline __attribute__((always_inline))

namespace kdfast {

// One copy a level of vector instructions, chosen when the library is loaded: wheels travel.
#if defined(KDFAST_CLONES)
#if __GNUC__ >= \
    12  // older ones tell no levels apart; with all of a level Philox's products take a third less
#define KDFAST_EVERY_WIDTH __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define KDFAST_EVERY_WIDTH __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#else
#define KDFAST_EVERY_WIDTH
#endif

// Blocks side by side, so that the compiler makes vectors of them.
constexpr int kNormalLanes = 64;

inline float normal_log(float u) {
  int32_t bits;
  std::memcpy(&bits, &u, 4);
  const int32_t exponent = (bits - 0x3F3504F3) >> 23;  // so that the mantissa lies in [√½, √2)
  const int32_t rest = bits - exponent * (1 << 23);
  float f;
  std::memcpy(&f, &rest, 4);
  f -= 1.0f;
  float p = -0.081015572f * f + 0.127123073f;
  p = p * f - 0.129722387f;
  p = p * f + 0.142021745f;
  p = p * f - 0.166422471f;
  p = p * f + 0.200014681f;
  p = p * f - 0.250002980f;
  p = p * f + 0.333333284f;
  return static_cast<float>(exponent) * 0.693147181f + (f - f * f * (0.5f - f * p));
}

inline void normal_pair(uint32_t i, uint32_t k, float* first, float* second) {
  // Rounded once to 24 bits, like an unsigned conversion, of halves that vector instructions can convert.
  const float whole =
      static_cast<float>(static_cast<double>(static_cast<int32_t>(i ^ 0x80000000u)) + 2147483648.0);
  const float u = (whole + 0.5f) * 2.3283064365386963e-10f;
  const float log = normal_log(u);
  const float r = std::sqrt(-2.0f * (log < 0.0f ? log : 0.0f));
  const uint32_t quadrant = (k + 0x20000000u) >> 30;
  const float theta =
      static_cast<float>(static_cast<int32_t>(k - (quadrant << 30))) * 1.4629180792671596e-09f;
  const float w = theta * theta;
  const float sine = theta + theta * w * (-0.166666642f + w * (0.008332748f - w * 0.000195879f));
  const float cosine = 1.0f - 0.5f * w + w * w * (0.041666664f + w * (-0.00138883f + w * 2.4547580e-05f));
  const bool odd = (quadrant & 1u) != 0;
  const float across = odd ? sine : cosine, up = odd ? cosine : sine;
  *first = ((quadrant == 1u) | (quadrant == 2u) ? -r : r) * across;
  *second = (quadrant >= 2u ? -r : r) * up;
}

// Ten rounds of Philox4x32 of counters side by side, in place.
KDFAST_INLINE void philox_rounds_plain(uint64_t key, uint32_t* c0, uint32_t* c1, uint32_t* c2, uint32_t* c3) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int lane = 0; lane < kNormalLanes; ++lane) {
      const uint64_t p0 = uint64_t{0xD2511F53} * c0[lane], p1 = uint64_t{0xCD9E8D57} * c2[lane];
      c0[lane] = static_cast<uint32_t>(p1 >> 32) ^ c1[lane] ^ k0;
      c2[lane] = static_cast<uint32_t>(p0 >> 32) ^ c3[lane] ^ k1;
      c1[lane] = static_cast<uint32_t>(p1);
      c3[lane] = static_cast<uint32_t>(p0);
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

#if defined(KDFAST_CLONES)
// GCC makes of a product of 32 by 32 bits a shuffle before and after it where there is AVX2 alone: of even
// and odd counters separately there is none, and a third of the instructions.
__attribute__((target("avx2"))) inline void philox_rounds_avx2(uint64_t key, uint32_t* c0, uint32_t* c1,
                                                               uint32_t* c2, uint32_t* c3) {
  const __m256i m0 = _mm256_set1_epi64x(0xD2511F53), m1 = _mm256_set1_epi64x(0xCD9E8D57);
  // Two vectors of counters at a time: a round waits for the one before.
  for (int at = 0; at < kNormalLanes; at += 16) {
    __m256i x0[2], x1[2], x2[2], x3[2];
    for (int half = 0; half < 2; ++half) {
      x0[half] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(c0 + at + 8 * half));
      x1[half] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(c1 + at + 8 * half));
      x2[half] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(c2 + at + 8 * half));
      x3[half] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(c3 + at + 8 * half));
    }
    uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
    for (int round = 0; round < 10; ++round) {
      for (int half = 0; half < 2; ++half) {
        const __m256i even0 = _mm256_mul_epu32(x0[half], m0), even1 = _mm256_mul_epu32(x2[half], m1);
        const __m256i odd0 = _mm256_mul_epu32(_mm256_srli_epi64(x0[half], 32), m0);
        const __m256i odd1 = _mm256_mul_epu32(_mm256_srli_epi64(x2[half], 32), m1);
        const __m256i high0 = _mm256_blend_epi32(_mm256_srli_epi64(even0, 32), odd0, 0xAA);
        const __m256i high1 = _mm256_blend_epi32(_mm256_srli_epi64(even1, 32), odd1, 0xAA);
        x0[half] =
            _mm256_xor_si256(_mm256_xor_si256(high1, x1[half]), _mm256_set1_epi32(static_cast<int32_t>(k0)));
        x2[half] =
            _mm256_xor_si256(_mm256_xor_si256(high0, x3[half]), _mm256_set1_epi32(static_cast<int32_t>(k1)));
        x1[half] = _mm256_blend_epi32(even1, _mm256_slli_epi64(odd1, 32), 0xAA);
        x3[half] = _mm256_blend_epi32(even0, _mm256_slli_epi64(odd0, 32), 0xAA);
      }
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    for (int half = 0; half < 2; ++half) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(c0 + at + 8 * half), x0[half]);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(c1 + at + 8 * half), x1[half]);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(c2 + at + 8 * half), x2[half]);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(c3 + at + 8 * half), x3[half]);
    }
  }
}

// With AVX-512 GCC's own is the faster one.
inline const bool kPhiloxByAvx2 = __builtin_cpu_supports("avx2") && !__builtin_cpu_supports("avx512dq");

KDFAST_INLINE void philox_rounds(uint64_t key, uint32_t* c0, uint32_t* c1, uint32_t* c2, uint32_t* c3) {
  if (kPhiloxByAvx2)
    philox_rounds_avx2(key, c0, c1, c2, c3);
  else
    philox_rounds_plain(key, c0, c1, c2, c3);
}
#else
KDFAST_INLINE void philox_rounds(uint64_t key, uint32_t* c0, uint32_t* c1, uint32_t* c2, uint32_t* c3) {
  philox_rounds_plain(key, c0, c1, c2, c3);
}
#endif

// The normals of elements 4·group … of kNormalLanes groups in a row.
KDFAST_EVERY_WIDTH
inline void normal_block(uint64_t key, uint32_t step, uint64_t group, float* out) {
  uint32_t c0[kNormalLanes], c1[kNormalLanes], c2[kNormalLanes], c3[kNormalLanes];
  for (int lane = 0; lane < kNormalLanes; ++lane) {
    const uint64_t at = group + static_cast<uint64_t>(lane);
    c0[lane] = static_cast<uint32_t>(at);
    c1[lane] = static_cast<uint32_t>(at >> 32);
    c2[lane] = step;
    c3[lane] = 0;
  }
  philox_rounds(key, c0, c1, c2, c3);
  float n0[kNormalLanes], n1[kNormalLanes], n2[kNormalLanes], n3[kNormalLanes];
  for (int lane = 0; lane < kNormalLanes; ++lane) normal_pair(c0[lane], c1[lane], &n0[lane], &n1[lane]);
  for (int lane = 0; lane < kNormalLanes; ++lane) normal_pair(c2[lane], c3[lane], &n2[lane], &n3[lane]);
  for (int lane = 0; lane < kNormalLanes; ++lane) {
    out[4 * lane] = n0[lane];
    out[4 * lane + 1] = n1[lane];
    out[4 * lane + 2] = n2[lane];
    out[4 * lane + 3] = n3[lane];
  }
}

// The first `count` normals of a step.
inline void normals(uint64_t key, uint32_t step, int64_t count, float* out) {
  constexpr int64_t kBlock = 4 * kNormalLanes;
  int64_t done = 0;
  for (; done + kBlock <= count; done += kBlock)
    normal_block(key, step, static_cast<uint64_t>(done) / 4, out + done);
  if (done < count) {
    float last[kBlock];
    normal_block(key, step, static_cast<uint64_t>(done) / 4, last);
    std::memcpy(out + done, last, static_cast<size_t>(count - done) * sizeof(float));
  }
}

}  // namespace kdfast

// Philox-4x32-10 (Salmon et al., SC 2011): a counter-based generator, so that draw i of step t is a pure
// function of (seed, t, i) and the CPU and the GPU agree. The same arithmetic as triton.language.philox.
#pragma once

#include <array>
#include <cstdint>

namespace kdfast {

// Keeps replay's stream apart from other users of the same seed ("REPL").
constexpr uint32_t kReplayStream = 0x5245504C;

using PhiloxBlock = std::array<uint32_t, 4>;

inline PhiloxBlock philox4x32(uint64_t key, PhiloxBlock counter) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3];
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53} * c0, p1 = uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return {c0, c1, c2, c3};
}

// 64 uniform bits for each of the first `count` draws of a step: one block serves two draws.
inline void philox_draws(uint64_t seed, uint64_t step, int64_t count, uint64_t* out) {
  for (int64_t i = 0; i < count; i += 2) {
    const PhiloxBlock bits =
        philox4x32(seed, {static_cast<uint32_t>(i >> 1), kReplayStream, static_cast<uint32_t>(step),
                          static_cast<uint32_t>(step >> 32)});
    out[i] = bits[0] | uint64_t{bits[1]} << 32;
    if (i + 1 < count) out[i + 1] = bits[2] | uint64_t{bits[3]} << 32;
  }
}

}  // namespace kdfast

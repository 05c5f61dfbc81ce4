// Dead leaves in painter's order: the arithmetic of kdfast/reference/procedural/leaves.py, operation by operation, so
// that images agree to the last bit. Each leaf is drawn from its Philox blocks when it falls, and only pixels within
// its circle are looked at.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "philox.hpp"

namespace kdfast {

struct LeafLaw {
  const float* radii;       // as shares of the image's side
  const float* cumulative;  // their probabilities, added up
  int64_t bins;
};

struct Leaf {
  float x, y, square;
  float sides[4][3];  // A·dx + B·dy + C ≥ 0 inside
  bool circle;
  uint32_t colour;
};

inline float leaf_uniform(uint32_t word) { return static_cast<float>(word >> 8) * 5.9604644775390625e-08f; }

// sin(2π·turns): reference/procedural/arithmetic.py.
inline float leaf_wave(float turns) {
  const float u = turns - std::floor(turns + 0.5f);
  const float a = std::fabs(u);
  const float f = std::min(a, 0.5f - a);
  const float w = f * f;
  const float s = f * (w * (w * (w * -70.99356555f + 81.34078436f) + -41.33714291f) + 6.28316405f);
  return u < 0 ? -s : s;
}

inline Leaf draw_leaf(uint64_t seed, int64_t image, int64_t number, int64_t height, int64_t width,
                      const LeafLaw& law) {
  const auto words = [&](uint32_t block) {
    return philox4x32(seed, {static_cast<uint32_t>(number), static_cast<uint32_t>(image),
                             static_cast<uint32_t>(static_cast<uint64_t>(image) >> 32), block});
  };
  const PhiloxBlock place = words(0), look = words(1), shape = words(2);
  Leaf leaf;
  leaf.x = leaf_uniform(place[2]) * static_cast<float>(width);
  leaf.y = leaf_uniform(place[3]) * static_cast<float>(height);
  const float* const found =
      std::upper_bound(law.cumulative, law.cumulative + law.bins, leaf_uniform(place[1]));
  const int64_t bin = std::min<int64_t>(found - law.cumulative, law.bins - 1);
  const float radius = law.radii[bin] * static_cast<float>(std::min(height, width));
  leaf.square = radius * radius;
  leaf.colour = look[0] >> 8;
  const int kind = static_cast<int>((uint64_t{place[0]} * 6) >> 32);
  leaf.circle = kind == 0;
  if (leaf.circle) return leaf;

  const float angle = leaf_uniform(look[1]);
  float corners[4];
  if (kind < 4) {  // square, turned square, rectangle: corners ± half of this from an axis
    const float half = kind == 3 ? 0.03f + 0.19f * leaf_uniform(look[2]) : 0.125f;
    const float start = kind == 1 ? 0.0f : angle;
    corners[0] = start - half;
    corners[1] = start + half;
    corners[2] = start + (0.5f - half);
    corners[3] = start + (0.5f + half);
  } else {  // free shapes: one corner a sector
    const float sector = kind == 4 ? static_cast<float>(1.0 / 3.0) : 0.25f;
    for (int k = 0; k < 4; ++k)
      corners[k] = angle + (static_cast<float>(k) + 0.8f * leaf_uniform(shape[k])) * sector;
    if (kind == 4) corners[3] = corners[2];
  }
  float xs[4], ys[4];
  for (int k = 0; k < 4; ++k) {
    xs[k] = leaf_wave(corners[k] + 0.25f) * radius;
    ys[k] = leaf_wave(corners[k]) * radius;
  }
  for (int k = 0; k < 4; ++k) {
    const int after = (k + 1) % 4;
    const float across = xs[after] - xs[k], up = ys[after] - ys[k];
    const bool none = across == 0 && up == 0;  // a triangle's fourth side keeps everything
    leaf.sides[k][0] = none ? 0.0f : -up;
    leaf.sides[k][1] = none ? 0.0f : across;
    leaf.sides[k][2] = none ? 1.0f : up * xs[k] - across * ys[k];
  }
  return leaf;
}

inline bool covers(const Leaf& leaf, float dx, float dy) {
  if (!(dx * dx + dy * dy <= leaf.square)) return false;
  if (leaf.circle) return true;
  for (const auto& side : leaf.sides)
    if (!((side[0] * dx + side[1] * dy) + side[2] >= 0)) return false;
  return true;
}

// Image `image` of at most `limit` leaves as uint8 [3, H, W]; bare pixels are black.
inline void paint_leaves(uint64_t seed, int64_t image, int64_t height, int64_t width, int64_t limit,
                         const LeafLaw& law, std::vector<uint8_t>& covered, uint8_t* out) {
  const int64_t pixels = height * width;
  covered.assign(static_cast<size_t>(pixels), 0);
  std::fill_n(out, 3 * pixels, uint8_t{0});
  int64_t bare = pixels;
  for (int64_t number = 0; number < limit && bare; ++number) {
    const Leaf leaf = draw_leaf(seed, image, number, height, width, law);
    const float reach = std::sqrt(leaf.square) + 1.0f;
    const auto first = [&](float centre) { return static_cast<int64_t>(std::max(centre - reach, 0.0f)); };
    const auto last = [&](float centre, int64_t size) {
      return std::min(static_cast<int64_t>(centre + reach), size - 1);
    };
    for (int64_t row = first(leaf.y); row <= last(leaf.y, height); ++row) {
      const float dy = (static_cast<float>(row) + 0.5f) - leaf.y;
      for (int64_t column = first(leaf.x); column <= last(leaf.x, width); ++column) {
        if (!covers(leaf, (static_cast<float>(column) + 0.5f) - leaf.x, dy)) continue;
        const int64_t at = row * width + column;
        out[at] = static_cast<uint8_t>(leaf.colour >> 16);
        out[pixels + at] = static_cast<uint8_t>(leaf.colour >> 8);
        out[2 * pixels + at] = static_cast<uint8_t>(leaf.colour);
        bare -= covered[at] == 0;
        covered[at] = 1;
      }
    }
  }
}

}  // namespace kdfast

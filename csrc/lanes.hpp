// 16 floats side by side: whatever the machine has, every instruction set adds in the same order and gives
// the same bits.
//
// They are pairs of vectors that a register holds (GCC's and Clang's own). One vector of 64 bytes GCC would
// take apart by itself where registers are narrower: comparisons and selections lane by lane, the rest
// through memory.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "philox_normal.hpp"  // KDFAST_EVERY_WIDTH, KDFAST_INLINE

namespace kdfast {

template <typename Half>
struct Pair {
  Half lo, hi;
};

// A part is what AVX2 has, or NEON. Of AVX-512 half a register is used.
#if defined(__x86_64__) && !defined(KDFAST_SMALL_PARTS)
#define KDFAST_PART_BYTES 32
template <typename Part>
using OfParts = Pair<Part>;
#else
#define KDFAST_PART_BYTES 16
template <typename Part>
using OfParts = Pair<Pair<Part>>;
#endif

typedef float FloatPart __attribute__((vector_size(KDFAST_PART_BYTES)));
typedef float PartInMemory __attribute__((vector_size(KDFAST_PART_BYTES), aligned(4), may_alias));
typedef int32_t IntPart __attribute__((vector_size(KDFAST_PART_BYTES)));
typedef uint32_t WordPart __attribute__((vector_size(KDFAST_PART_BYTES)));
typedef double WidePart __attribute__((vector_size(2 * KDFAST_PART_BYTES)));
typedef double DoublePart __attribute__((vector_size(KDFAST_PART_BYTES)));
typedef double DoublesInMemory __attribute__((vector_size(KDFAST_PART_BYTES), aligned(8), may_alias));
typedef uint64_t LongPart __attribute__((vector_size(KDFAST_PART_BYTES)));

constexpr int64_t kRowLanes = 16;
typedef OfParts<FloatPart> Lanes;
typedef OfParts<IntPart> IntLanes;
typedef OfParts<WordPart> WordLanes;
typedef OfParts<WidePart> WideLanes;
typedef OfParts<DoublePart> Doubles;  // 8 of them
typedef OfParts<LongPart> Longs;

// What a vector is of, and how many.
template <typename Vector>
using NumberOf = std::conditional_t<std::is_same_v<Vector, Doubles>, double, float>;
template <typename Vector>
constexpr int64_t kLanesOf = sizeof(Vector) / sizeof(NumberOf<Vector>);
static_assert(sizeof(Lanes) == kRowLanes * sizeof(float), "16 lanes");

#define KDFAST_LANEWISE(op)                                                                                 \
  template <typename Half>                                                                                  \
  KDFAST_INLINE auto operator op(const Pair<Half>& a, const Pair<Half>& b) {                                \
    return Pair<std::decay_t<decltype(a.lo op b.lo)>>{a.lo op b.lo, a.hi op b.hi};                          \
  }                                                                                                         \
  template <typename Half, typename Number>                                                                 \
  KDFAST_INLINE std::enable_if_t<std::is_arithmetic_v<Number>, Pair<Half>> operator op(const Pair<Half>& a, \
                                                                                       Number b) {          \
    return {a.lo op b, a.hi op b};                                                                          \
  }                                                                                                         \
  template <typename Half, typename Number>                                                                 \
  KDFAST_INLINE std::enable_if_t<std::is_arithmetic_v<Number>, Pair<Half>> operator op(                     \
      Number a, const Pair<Half>& b) {                                                                      \
    return {a op b.lo, a op b.hi};                                                                          \
  }
KDFAST_LANEWISE(+)
KDFAST_LANEWISE(-)
KDFAST_LANEWISE(*)
KDFAST_LANEWISE(/)
KDFAST_LANEWISE(&)
KDFAST_LANEWISE(>>)
KDFAST_LANEWISE(<<)
#undef KDFAST_LANEWISE

template <typename Half, typename Other>
KDFAST_INLINE Pair<Half>& operator+=(Pair<Half>& a, const Other& b) {
  return a = a + b;
}
template <typename Half, typename Other>
KDFAST_INLINE Pair<Half>& operator-=(Pair<Half>& a, const Other& b) {
  return a = a - b;
}
template <typename Half, typename Other>
KDFAST_INLINE Pair<Half>& operator*=(Pair<Half>& a, const Other& b) {
  return a = a * b;
}

// The same bits as other numbers, part by part.
template <typename To, typename From>
KDFAST_INLINE void set_bits(const From& from, To& to) {
  to = (To)from;
}
template <typename To, typename From>
KDFAST_INLINE void set_bits(const Pair<From>& from, Pair<To>& to) {
  set_bits(from.lo, to.lo);
  set_bits(from.hi, to.hi);
}

// The same values as other numbers.
template <typename To, typename From>
KDFAST_INLINE void convert(const From& from, To& to) {
  to = __builtin_convertvector(from, To);
}
template <typename To, typename From>
KDFAST_INLINE void convert(const Pair<From>& from, Pair<To>& to) {
  convert(from.lo, to.lo);
  convert(from.hi, to.hi);
}

// x where it is more than `least`, or NaN; else that.
template <typename Part>
KDFAST_INLINE void at_least(const Part& least, Part& x) {
  x = x < least ? least : x;
}
template <typename Half>
KDFAST_INLINE void at_least(const Pair<Half>& least, Pair<Half>& x) {
  at_least(least.lo, x.lo);
  at_least(least.hi, x.hi);
}

// `other`'s NaN in place of x.
template <typename Part>
KDFAST_INLINE void keep_nan(const Part& other, Part& x) {
  x = other != other ? other : x;
}
template <typename Half>
KDFAST_INLINE void keep_nan(const Pair<Half>& other, Pair<Half>& x) {
  keep_nan(other.lo, x.lo);
  keep_nan(other.hi, x.hi);
}

// 0 where x is below it; NaN stays.
template <typename T>
KDFAST_INLINE void relu(T& x) {
  at_least(T{}, x);
}

// The gradient of that: 0 where what it showed is 0 or less.
template <typename T>
KDFAST_INLINE void relu_backward(const T& shown, T& grad) {
  grad = shown <= 0.0f ? T{} : grad;
}
template <typename Half>
KDFAST_INLINE void relu_backward(const Pair<Half>& shown, Pair<Half>& grad) {
  relu_backward(shown.lo, grad.lo);
  relu_backward(shown.hi, grad.hi);
}

// Not by memcpy, which GCC makes of 16 bytes at a time: a wider register then waits for two of them.
KDFAST_INLINE void load_lanes(const float* from, float& out) { out = *from; }
KDFAST_INLINE void load_lanes(const float* from, FloatPart& out) {
  out = *reinterpret_cast<const PartInMemory*>(from);
}
KDFAST_INLINE void load_lanes(const double* from, DoublePart& out) {
  out = *reinterpret_cast<const DoublesInMemory*>(from);
}
template <typename Half, typename Number>
KDFAST_INLINE void load_lanes(const Number* from, Pair<Half>& out) {
  load_lanes(from, out.lo);
  load_lanes(from + sizeof(Half) / sizeof(Number), out.hi);
}

KDFAST_INLINE void save_lanes(float value, float* to) { *to = value; }
KDFAST_INLINE void save_lanes(const FloatPart& value, float* to) {
  *reinterpret_cast<PartInMemory*>(to) = value;
}
KDFAST_INLINE void save_lanes(const DoublePart& value, double* to) {
  *reinterpret_cast<DoublesInMemory*>(to) = value;
}
template <typename Half, typename Number>
KDFAST_INLINE void save_lanes(const Pair<Half>& value, Number* to) {
  save_lanes(value.lo, to);
  save_lanes(value.hi, to + sizeof(Half) / sizeof(Number));
}

// Up to 16 lanes of a row whose `count` last elements are left.
KDFAST_INLINE void store_lanes(const Lanes& value, int64_t count, float* to) {
  if (count >= kRowLanes)
    save_lanes(value, to);
  else
    std::memcpy(to, &value, static_cast<size_t>(count) * sizeof(float));
}

template <typename Vector>
KDFAST_INLINE double lane_sum(const Vector& value) {
  NumberOf<Vector> parts[kLanesOf<Vector>];
  save_lanes(value, parts);
  double sum = 0;
  for (const auto part : parts) sum += static_cast<double>(part);
  return sum;
}

// Of a row of whole vectors.
template <typename Vector>
KDFAST_INLINE NumberOf<Vector> largest(const NumberOf<Vector>* row, int64_t padded) {
  Vector most;
  load_lanes(row, most);
  for (int64_t at = kLanesOf<Vector>; at < padded; at += kLanesOf<Vector>) {
    Vector x;
    load_lanes(row + at, x);
    at_least(x, most);
  }
  NumberOf<Vector> parts[kLanesOf<Vector>];
  save_lanes(most, parts);
  NumberOf<Vector> out = parts[0];
  for (const auto part : parts) out = part > out ? part : out;
  return out;
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
    WideLanes wide;
    convert(part, wide);
    lanes += wide;
    part = Lanes{};
  }
  KDFAST_INLINE void copy(double (&out)[kRowLanes]) const { std::memcpy(out, &lanes, sizeof out); }
  KDFAST_INLINE double total() const {
    double parts[kRowLanes];  // by halves: one after another, each would wait for the one before
    copy(parts);
    for (int64_t half = kRowLanes / 2; half > 0; half /= 2)
      for (int64_t lane = 0; lane < half; ++lane) parts[lane] += parts[lane + half];
    return parts[0] + rest;
  }
};

}  // namespace kdfast

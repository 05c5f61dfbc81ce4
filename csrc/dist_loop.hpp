// DIST (Huang et al. 2022, Eq. 9) with its gradients, in float32: the CPU path of kdfast/reference/dist.py.
//
// Rows are softmaxed and correlated while they are in a core's cache; columns a few vectors at a time; then
// each row's gradient goes through its softmax. Sums are in float64 and in one order, however many threads.
#pragma once

#include <memory>

#include "row_losses.hpp"

namespace kdfast {

constexpr double kDistEps = 1e-8;  // of the denominator, as its authors have it

// Sums of what is left of two sides after a rounded mean is taken off: of each, of its squares, of products.
KDFAST_INLINE void add_moments(const Lanes& a, const Lanes& b, WideSum (&sums)[5]) {
  sums[0].add(a);
  sums[1].add(b);
  sums[2].add(a * a);
  sums[3].add(b * b);
  sums[4].add(a * b);
}

// ρ = ⟨a, b⟩/(|a|·|b| + ε), and its gradient's factors: share·∂ρ/∂a = weight·b - along_a·a.
struct Correlation {
  double rho;
  float weight, along_a, along_b;
};

// A side that is the same everywhere has no length.
KDFAST_INLINE Correlation correlation(double count, const double (&sums)[5], double share) {
  const auto [a, b, square_a, square_b, product] = sums;
  const auto length = [count](double sum, double square) __attribute__((always_inline)) {
    const double rest = square - sum * sum / count;  // what the mean's rounding left is taken off
    return rest <= 0 ? 0.0 : std::sqrt(rest);        // NaN stays
  };
  const double length_a = length(a, square_a), length_b = length(b, square_b);
  const double rest = length_a * length_b + kDistEps, rho = (product - a * b / count) / rest;
  const double weight = share / rest;
  const auto along = [&](double own, double others) __attribute__((always_inline)) {
    return static_cast<float>(own == 0 ? 0.0 : weight * rho * others / own);
  };
  return {rho, static_cast<float>(weight), along(length_a, length_b), along(length_b, length_a)};
}

// Rows of `classes` logits of the student and the teacher, and what is made of them. A row of probabilities
// is followed by zeros up to `padded`.
struct Dist {
  int64_t rows, classes, padded;
  Rows student, teacher;
  float inverse;  // 1/T
  double beta, gamma;
  Gradient grad_student, grad_teacher;

  float *q, *p;            // [rows, padded]
  float* level;            // [padded]: the mean of a row of probabilities, then zeros
  Correlation* of_row;     // [rows]
  float *mean_q, *mean_p;  // [padded], as are the next: the means of the columns, and what of_row has of rows
  float *weight, *along_q, *along_p;
  double* rho;  // of the columns
};

// softmax(row/T).
KDFAST_INLINE void probabilities(const Dist& call, const float* row, float* copy, float* out) {
  const int64_t classes = call.classes, whole = (classes + kRowLanes - 1) / kRowLanes * kRowLanes;
  const float share = static_cast<float>(1.0 / powers_of(row, classes, whole, call.inverse, copy, out).sum);
  for (int64_t at = 0; at < whole; at += kRowLanes) {
    Lanes x;
    load_lanes(out + at, x);
    x *= share;
    save_lanes(x, out + at);
  }
  for (int64_t at = classes; at < call.padded; ++at) out[at] = 0;
}

KDFAST_EVERY_WIDTH
inline void dist_rows_some(int64_t begin, int64_t end, const Dist& call, float* copy) {
  for (int64_t row = begin; row < end; ++row) {
    float *const q = call.q + row * call.padded, *const p = call.p + row * call.padded;
    probabilities(call, call.student.at(row), copy, q);
    probabilities(call, call.teacher.at(row), copy, p);
    WideSum sums[5];
    for (int64_t at = 0; at < call.padded;) {
      const int64_t last = std::min(call.padded, at + WideSum::kTogether * kRowLanes);
      for (; at < last; at += kRowLanes) {
        Lanes a, b, level;
        load_lanes(q + at, a);
        load_lanes(p + at, b);
        load_lanes(call.level + at, level);
        a -= level;
        b -= level;
        add_moments(a, b, sums);
      }
      for (WideSum& sum : sums) sum.flush();
    }
    double totals[5];
    for (int index = 0; index < 5; ++index) totals[index] = sums[index].total();
    call.of_row[row] =
        correlation(static_cast<double>(call.classes), totals, call.beta / static_cast<double>(call.rows));
  }
}

// Vectors of columns side by side that are read together, so that a row gives a few lines of its memory.
constexpr int64_t kAcross = 2;

// body(row, index, at) for each vector of these columns, a row after another; `sums` are flushed in time.
template <int kSums, typename Body>
KDFAST_INLINE void each_row(const Dist& call, int64_t first, WideSum (&sums)[kAcross][kSums],
                            const Body& body) {
  for (int64_t row = 0; row < call.rows;) {
    const int64_t last = std::min(call.rows, row + WideSum::kTogether);
    for (; row < last; ++row)
      for (int64_t index = 0; index < kAcross; ++index)
        body(index, row * call.padded + first + index * kRowLanes);
    for (auto& column : sums)
      for (WideSum& sum : column) sum.flush();
  }
}

KDFAST_INLINE Lanes mean_of(const WideSum& sum, double count) {
  double wide[kRowLanes];
  sum.copy(wide);
  float narrow[kRowLanes];
  for (int64_t lane = 0; lane < kRowLanes; ++lane) narrow[lane] = static_cast<float>(wide[lane] / count);
  Lanes out;
  load_lanes(narrow, out);
  return out;
}

KDFAST_EVERY_WIDTH
inline void dist_columns_some(int64_t begin, int64_t end, const Dist& call) {
  const double count = static_cast<double>(call.rows);
  for (int64_t group = begin; group < end; ++group) {
    const int64_t first = group * kAcross * kRowLanes;
    Lanes mean_q[kAcross], mean_p[kAcross];
    for (int64_t index = 0; index < kAcross; ++index) {
      load_lanes(call.q + first + index * kRowLanes, mean_q[index]);
      load_lanes(call.p + first + index * kRowLanes, mean_p[index]);
    }
    // Off the first row: of a column that is the same everywhere nothing is left, to the last bit.
    WideSum away[kAcross][2], sums[kAcross][5];
    each_row(call, first, away, [&](int64_t index, int64_t at) __attribute__((always_inline)) {
      Lanes a, b;
      load_lanes(call.q + at, a);
      load_lanes(call.p + at, b);
      away[index][0].add(a - mean_q[index]);
      away[index][1].add(b - mean_p[index]);
    });
    for (int64_t index = 0; index < kAcross; ++index) {
      mean_q[index] += mean_of(away[index][0], count);
      mean_p[index] += mean_of(away[index][1], count);
      save_lanes(mean_q[index], call.mean_q + first + index * kRowLanes);
      save_lanes(mean_p[index], call.mean_p + first + index * kRowLanes);
    }
    each_row(call, first, sums, [&](int64_t index, int64_t at) __attribute__((always_inline)) {
      Lanes a, b;
      load_lanes(call.q + at, a);
      load_lanes(call.p + at, b);
      a -= mean_q[index];
      b -= mean_p[index];
      add_moments(a, b, sums[index]);
    });
    for (int64_t index = 0; index < kAcross; ++index) {
      double of_lanes[5][kRowLanes];
      for (int which = 0; which < 5; ++which) sums[index][which].copy(of_lanes[which]);
      for (int64_t lane = 0; lane < kRowLanes; ++lane) {
        const int64_t column = first + index * kRowLanes + lane;
        double totals[5];
        for (int which = 0; which < 5; ++which) totals[which] = of_lanes[which][lane];
        const Correlation found = correlation(count, totals, call.gamma / static_cast<double>(call.classes));
        call.rho[column] = found.rho;
        call.weight[column] = found.weight;
        call.along_q[column] = found.along_a;
        call.along_p[column] = found.along_b;
      }
    }
  }
}

// T times a row's gradient to one side's logits, from own and others' probabilities: with g = ∂/∂own it is
// own·(g - ⟨g, own⟩). Of the columns' zeros beyond the last class nothing is seen.
KDFAST_INLINE void dist_gradient(const Dist& call, const Correlation& row, float row_along, const float* own,
                                 const float* others, const float* own_mean, const float* others_mean,
                                 const float* along, float* slope, float* out) {
  WideSum dot;
  for (int64_t at = 0; at < call.padded;) {
    const int64_t last = std::min(call.padded, at + WideSum::kTogether * kRowLanes);
    for (; at < last; at += kRowLanes) {
      Lanes x, y, mean_x, mean_y, level, column, weight;
      load_lanes(own + at, x);
      load_lanes(others + at, y);
      load_lanes(own_mean + at, mean_x);
      load_lanes(others_mean + at, mean_y);
      load_lanes(call.level + at, level);
      load_lanes(along + at, column);
      load_lanes(call.weight + at, weight);
      const Lanes g = (x - level) * row_along - (y - level) * row.weight +
                      ((x - mean_x) * column - (y - mean_y) * weight);
      dot.add(g * x);
      save_lanes(g, slope + at);
    }
    dot.flush();
  }
  const float level = static_cast<float>(dot.total());
  for (int64_t at = 0; at < call.classes; at += kRowLanes) {
    Lanes x, g;
    load_lanes(own + at, x);
    load_lanes(slope + at, g);
    store_lanes(x * (g - level), call.classes - at, out + at);
  }
}

KDFAST_EVERY_WIDTH
inline void dist_gradients_some(int64_t begin, int64_t end, const Dist& call, float* slope) {
  for (int64_t row = begin; row < end; ++row) {
    const float *const q = call.q + row * call.padded, *const p = call.p + row * call.padded;
    const Correlation& found = call.of_row[row];
    if (float* const out = call.grad_student.at(row))
      dist_gradient(call, found, found.along_a, q, p, call.mean_q, call.mean_p, call.along_q, slope, out);
    if (float* const out = call.grad_teacher.at(row))
      dist_gradient(call, found, found.along_b, p, q, call.mean_p, call.mean_q, call.along_p, slope, out);
  }
}

// β·mean(1 - ρ of rows) + γ·mean(1 - ρ of columns) of softmax(student/T) and softmax(teacher/T), and T times
// its gradients.
inline double dist_loss(int64_t rows, int64_t classes, Rows student, Rows teacher, float inverse, double beta,
                        double gamma, Gradient grad_student, Gradient grad_teacher, int64_t threads) {
  constexpr int64_t kGroup = kAcross * kRowLanes;
  const int64_t groups = (classes + kGroup - 1) / kGroup, padded = groups * kGroup;
  // Not a vector: memory as large as the logits would be filled with zeros first.
  const std::unique_ptr<float[]> rows_memory(new float[static_cast<size_t>(2 * rows * padded)]);
  std::vector<float> columns(static_cast<size_t>(6 * padded));
  std::vector<Correlation> of_row(static_cast<size_t>(rows));
  std::vector<double> rho(static_cast<size_t>(padded));
  float* const column = columns.data();
  const Dist call{rows,
                  classes,
                  padded,
                  student,
                  teacher,
                  inverse,
                  beta,
                  gamma,
                  grad_student,
                  grad_teacher,
                  rows_memory.get(),
                  rows_memory.get() + rows * padded,
                  column,
                  of_row.data(),
                  column + padded,
                  column + 2 * padded,
                  column + 3 * padded,
                  column + 4 * padded,
                  column + 5 * padded,
                  rho.data()};
  std::fill_n(column, classes, static_cast<float>(1.0 / static_cast<double>(classes)));
  const auto with_row = [&](const auto& part) {
    return [&](int64_t begin, int64_t end) {
      std::vector<float> row(static_cast<size_t>(padded));
      part(begin, end, call, row.data());
    };
  };
  shared_out(rows, 2 * classes, threads, with_row(dist_rows_some));
  shared_out(groups, 2 * rows * kGroup, threads,
             [&](int64_t begin, int64_t end) { dist_columns_some(begin, end, call); });
  if (grad_student.data || grad_teacher.data)
    shared_out(rows, 2 * classes, threads, with_row(dist_gradients_some));
  double within = 0, across = 0;
  for (const Correlation& row : of_row) within += 1 - row.rho;
  for (int64_t at = 0; at < classes; ++at) across += 1 - rho[static_cast<size_t>(at)];
  return beta * within / static_cast<double>(rows) + gamma * across / static_cast<double>(classes);
}

}  // namespace kdfast

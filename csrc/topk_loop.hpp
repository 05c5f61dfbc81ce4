// The KL divergence to a teacher of whose classes k were kept, with its gradient, in float32: the CPU path of
// kdfast/reference/topk.py, which has the equations.
//
// The V - k classes that were not kept cost an exponential, a sum and a product each. Kept ones are in
// float64. A row that has to be computed with more care has NaN for its loss.
#pragma once

#include "row_losses.hpp"

namespace kdfast {

// Dense rows of `kept` classes with the teacher's logits at them, and where there is one, its log-sum-exp of
// all classes at T.
struct Kept {
  int64_t kept;
  const int64_t* classes;
  const float *logits, *normalizer;
  bool bucket;  // whether the classes that were not kept are one more outcome
};

// The student's rows of `classes`.
struct TopK {
  int64_t classes;
  Rows student;
  double inverse;  // 1/T
  Kept teacher;
  float* loss;
  Gradient grad;
};

// A class that counts.
struct Named {
  int64_t at;
  double student, teacher;  // logits over T
  double q, p;
};

// Which classes a row names; false where it names none, or one twice. `seen` is false everywhere, and is left
// so.
inline bool named_of(const TopK& call, int64_t row, std::vector<uint8_t>& seen, std::vector<Named>& named) {
  const int64_t kept = call.teacher.kept, *const at = call.teacher.classes + row * kept;
  const float *const logits = call.teacher.logits + row * kept, *const student = call.student.at(row);
  bool once = true;
  named.clear();
  for (int64_t k = 0; k < kept; ++k) {
    if (at[k] < 0 || at[k] >= call.classes || logits[k] == -HUGE_VALF) continue;
    once = once && !seen[static_cast<size_t>(at[k])];
    seen[static_cast<size_t>(at[k])] = 1;
    named.push_back({at[k], static_cast<double>(student[at[k]]) * call.inverse,
                     static_cast<double>(logits[k]) * call.inverse, 0, 0});
  }
  for (const Named& one : named) seen[static_cast<size_t>(one.at)] = 0;
  return once && !named.empty();
}

// log Σ exp, of one side's logits.
template <double Named::* kSide>
double log_sum(const std::vector<Named>& named) {
  double most = -HUGE_VAL, sum = 0;
  for (const Named& one : named) most = std::fmax(most, one.*kSide);
  for (const Named& one : named) sum += std::exp(one.*kSide - most);
  return most + std::log(sum);
}

// Σ p·(log p - log q) over the kept classes, of log-sum-exps; q and p are written.
inline double divergence(std::vector<Named>& named, double log_q, double log_p) {
  double sum = 0;
  for (Named& one : named) {
    one.q = std::exp(one.student - log_q);
    one.p = std::exp(one.teacher - log_p);
    sum += one.p * ((one.teacher - log_p) - (one.student - log_q));
  }
  return sum;
}

// The softmaxes over the kept classes alone.
inline double renormalized_row(std::vector<Named>& named, int64_t classes, float* grad) {
  const double loss = divergence(named, log_sum<&Named::student>(named), log_sum<&Named::teacher>(named));
  if (grad) {
    std::memset(grad, 0, static_cast<size_t>(classes) * sizeof *grad);
    for (const Named& one : named) grad[one.at] = static_cast<float>(one.q - one.p);
  }
  return loss;
}

// All other classes as one outcome.
KDFAST_INLINE double bucket_row(const TopK& call, int64_t row, std::vector<Named>& named, Scratch& scratch) {
  const int64_t padded = scratch.padded;
  float* const grad = call.grad.at(row);
  float* const powers = grad && call.classes == padded ? grad : scratch.part(1);
  const float peak = powers_of(call.student.at(row), call.classes, padded, static_cast<float>(call.inverse),
                               scratch.part(0), powers)
                         .peak;
  // Without the others' own sum 1 - Σ q would cancel.
  for (const Named& one : named) powers[one.at] = 0;
  WideSum sum;
  for (int64_t at = 0; at < padded;) {
    const int64_t last = std::min(padded, at + WideSum::kTogether * kRowLanes);
    for (; at < last; at += kRowLanes) {
      Lanes x;
      load_lanes(powers + at, x);
      sum.add(x);
    }
    sum.flush();
  }
  const double highest = static_cast<double>(peak) * call.inverse;
  double all = sum.total();
  for (const Named& one : named) all += std::exp(one.student - highest);
  const double others = sum.total() / all;

  const float* const normalizer = call.teacher.normalizer;
  const double log_p = normalizer ? static_cast<double>(normalizer[row]) : log_sum<&Named::teacher>(named);
  double loss = divergence(named, highest + std::log(all), log_p), mass = 0;
  for (const Named& one : named) mass += one.p;
  const double rest = normalizer && mass < 1 ? 1 - mass : 0.0;
  mass += rest;
  if (rest > 0) loss += rest * std::log(rest / others);
  loss += 1 - mass;
  if (grad) {
    const float factor = static_cast<float>((mass - rest / others) / all);
    for (int64_t at = 0; at < call.classes; at += kRowLanes) {
      Lanes x;
      load_lanes(powers + at, x);
      store_lanes(x * factor, call.classes - at, grad + at);
    }
    for (const Named& one : named) grad[one.at] = static_cast<float>(one.q * mass - one.p);
  }
  return others < 1.1920929e-7 ? NAN : loss;
}

KDFAST_EVERY_WIDTH
inline void topk_some(int64_t begin, int64_t end, const TopK& call, Scratch& scratch,
                      std::vector<uint8_t>& seen, std::vector<Named>& named) {
  for (int64_t row = begin; row < end; ++row) {
    float loss = NAN;
    if (named_of(call, row, seen, named))
      loss =
          static_cast<float>(call.teacher.bucket ? bucket_row(call, row, named, scratch)
                                                 : renormalized_row(named, call.classes, call.grad.at(row)));
    call.loss[row] = std::isfinite(loss) ? loss : NAN;
  }
}

// Returns the smallest loss, or NaN where one is.
inline float topk_rows(int64_t rows, const TopK& call, int64_t threads) {
  shared_out(rows, call.classes, threads, [&](int64_t begin, int64_t end) {
    Scratch scratch(call.classes);
    std::vector<uint8_t> seen(static_cast<size_t>(call.classes));
    std::vector<Named> named;
    topk_some(begin, end, call, scratch, seen, named);
  });
  return least_of(rows, call.loss);
}

}  // namespace kdfast

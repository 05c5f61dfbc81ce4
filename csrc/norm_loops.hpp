// Batch norm with what follows it, in float32, of dense [batch, channels, inner]: the CPU path of
// kdfast/ops/norm.
//
// A channel is taken at a time: what its second and third pass read is in the cache from the first. Sums are
// in float64 and in one order, whatever the machine and however many threads.
#pragma once

#include <cmath>
#include <type_traits>

#include "lanes.hpp"
#include "shares.hpp"

namespace kdfast {

// Null where there is none. In training mean and rstd are written by the forward and read by the gradients;
// in evaluation the running ones take their place.
struct Norm {
  int64_t batch, channels, inner;
  const float *weight, *bias;
  float *running_mean, *running_var;
  float *mean, *rstd;
  double momentum, eps;
  bool training;

  double count() const { return static_cast<double>(batch * inner); }
};

// act(scale·BN(x) + carry·residual).
struct Act {
  bool relu;
  float scale, carry;
};

// BN: x to (x - mean)·gain + shift.
struct Channel {
  float mean, gain, shift;
  double rstd;

  template <typename T>
  KDFAST_INLINE void normalise(T& x) const {
    x = (x - mean) * gain + shift;
  }
};

// body(tag, at) for each place of a channel, a row at a time: whole vectors, then one by one what is left.
// Sums are flushed in time, but not for every short row.
template <typename Body, typename... Sums>
KDFAST_INLINE void each_place(const Norm& norm, int64_t c, const Body& body, Sums&... sums) {
  int64_t room = WideSum::kTogether;
  for (int64_t b = 0; b < norm.batch; ++b) {
    const int64_t row = (b * norm.channels + c) * norm.inner;
    int64_t at = 0;
    while (at + kRowLanes <= norm.inner) {
      const int64_t whole = std::min((norm.inner - at) / kRowLanes, room);
      for (const int64_t end = at + whole * kRowLanes; at < end; at += kRowLanes)
        body(static_cast<Lanes*>(nullptr), row + at);
      room -= whole;
      if (room == 0) {
        (sums.flush(), ...);
        room = WideSum::kTogether;
      }
    }
    for (; at < norm.inner; ++at) body(static_cast<float*>(nullptr), row + at);
  }
  (sums.flush(), ...);
}

#define KDFAST_PLACE [&](auto* tag, int64_t at) __attribute__((always_inline))
#define KDFAST_VALUE(name, from)               \
  std::remove_pointer_t<decltype(tag)> name{}; \
  load_lanes(from, name)

KDFAST_INLINE Channel channel_at(const Norm& norm, int64_t c, float mean, float rstd) {
  const double weight = norm.weight ? static_cast<double>(norm.weight[c]) : 1.0;
  const double exact = static_cast<double>(rstd);
  return {mean, static_cast<float>(weight * exact), norm.bias ? norm.bias[c] : 0.0f, exact};
}

// What the forward had.
KDFAST_INLINE Channel channel_again(const Norm& norm, int64_t c) {
  if (norm.training) return channel_at(norm, c, norm.mean[c], norm.rstd[c]);
  const double rstd = 1.0 / std::sqrt(static_cast<double>(norm.running_var[c]) + norm.eps);
  return channel_at(norm, c, norm.running_mean[c], static_cast<float>(rstd));
}

// The batch's statistics, of differences from a mean that is rounded already; running ones are moved.
KDFAST_INLINE Channel channel_of(const Norm& norm, int64_t c, const float* x) {
  if (!norm.training) return channel_again(norm, c);
  WideSum sum, off, square;
  each_place(
      norm, c,
      KDFAST_PLACE {
        KDFAST_VALUE(value, x + at);
        sum.add(value);
      },
      sum);
  const float mean = static_cast<float>(sum.total() / norm.count());
  each_place(
      norm, c,
      KDFAST_PLACE {
        KDFAST_VALUE(away, x + at);
        away -= mean;
        off.add(away);
        square.add(away * away);
      },
      off, square);
  const double rest = off.total() / norm.count();
  const double variance = std::fmax(square.total() / norm.count() - rest * rest, 0.0);
  norm.mean[c] = mean;
  norm.rstd[c] = static_cast<float>(1.0 / std::sqrt(variance + norm.eps));
  if (norm.running_mean) {
    const double unbiased = variance * norm.count() / (norm.count() - 1.0), keep = 1.0 - norm.momentum;
    norm.running_mean[c] = static_cast<float>(keep * static_cast<double>(norm.running_mean[c]) +
                                              norm.momentum * (static_cast<double>(mean) + rest));
    norm.running_var[c] =
        static_cast<float>(keep * static_cast<double>(norm.running_var[c]) + norm.momentum * unbiased);
  }
  return channel_again(norm, c);
}

KDFAST_EVERY_WIDTH
inline void act_some(int64_t begin, int64_t end, const Norm& norm, const Act& act, const float* x,
                     const float* residual, float* y) {
  for (int64_t c = begin; c < end; ++c) {
    const Channel channel = channel_of(norm, c, x);
    each_place(
        norm, c, KDFAST_PLACE {
          KDFAST_VALUE(value, x + at);
          channel.normalise(value);
          value *= act.scale;
          if (residual) {
            KDFAST_VALUE(beside, residual + at);
            value += beside * act.carry;
          }
          if (act.relu) relu(value);
          save_lanes(value, y + at);
        });
  }
}

inline void norm_act(const Norm& norm, const Act& act, const float* x, const float* residual, float* y,
                     int64_t threads) {
  shared_out(norm.channels, norm.batch * norm.inner, threads,
             [&](int64_t begin, int64_t end) { act_some(begin, end, norm, act, x, residual, y); });
}

// Null where nobody wants it.
struct NormGradients {
  float *x, *residual, *weight, *bias;
};

// The gradient of x from that of BN(x): (g - mean(g) - (x - mean)·rstd²·mean(g·(x - mean)))·gain.
struct Slope {
  float level, tilt;
  KDFAST_INLINE Slope(const Norm& norm, const Channel& channel, double sum, double moment)
      : level(norm.training ? static_cast<float>(sum / norm.count()) : 0.0f),
        tilt(norm.training ? static_cast<float>(moment / norm.count() * channel.rstd * channel.rstd) : 0.0f) {
  }

  // In evaluation x has no part: an infinite one times nothing would be NaN.
  template <typename T>
  KDFAST_INLINE void take_off(const Norm& norm, const Channel& channel, const T& x, T& grad) const {
    if (norm.training) grad = (grad - level) - (x - channel.mean) * tilt;
  }
};

// y is the forward's result where a ReLU hid something that x alone does not tell, else null.
KDFAST_EVERY_WIDTH
inline void act_backward_some(int64_t begin, int64_t end, const Norm& norm, const Act& act,
                              const float* upstream, const float* x, const float* y,
                              const NormGradients& grads) {
  const bool summed = norm.training || grads.weight || grads.bias;
  for (int64_t c = begin; c < end; ++c) {
    const Channel channel = channel_again(norm, c);
    WideSum sum, moment;
    const auto hide = [&](auto& grad, const auto& value, int64_t at) __attribute__((always_inline)) {
      if (!act.relu) return;
      auto shown = value;
      if (y)
        load_lanes(y + at, shown);
      else {
        channel.normalise(shown);
        shown *= act.scale;
      }
      relu_backward(shown, grad);
    };
    if (summed)
      each_place(
          norm, c,
          KDFAST_PLACE {
            KDFAST_VALUE(value, x + at);
            KDFAST_VALUE(grad, upstream + at);
            hide(grad, value, at);
            sum.add(grad);
            moment.add(grad * (value - channel.mean));
          },
          sum, moment);
    const double total = sum.total(), total_moment = moment.total(), scale = static_cast<double>(act.scale);
    if (grads.weight) grads.weight[c] = static_cast<float>(total_moment * channel.rstd * scale);
    if (grads.bias) grads.bias[c] = static_cast<float>(total * scale);
    if (!grads.x && !grads.residual) continue;
    const Slope slope(norm, channel, total, total_moment);
    const float gain = channel.gain * act.scale;
    each_place(
        norm, c, KDFAST_PLACE {
          KDFAST_VALUE(value, x + at);
          KDFAST_VALUE(grad, upstream + at);
          hide(grad, value, at);
          if (grads.residual) {
            const auto handed = grad * act.carry;
            save_lanes(handed, grads.residual + at);
          }
          if (grads.x) {
            slope.take_off(norm, channel, value, grad);
            grad *= gain;
            save_lanes(grad, grads.x + at);
          }
        });
  }
}

inline void norm_act_backward(const Norm& norm, const Act& act, const float* upstream, const float* x,
                              const float* y, const NormGradients& grads, int64_t threads) {
  shared_out(norm.channels, norm.batch * norm.inner, threads, [&](int64_t begin, int64_t end) {
    act_backward_some(begin, end, norm, act, upstream, x, y, grads);
  });
}

// Σ (BN(x) - target)² of each channel, and the gradients of `upstream` times the mean of them all. Statistics
// are those that mean and rstd hold already where they are `known`.
KDFAST_EVERY_WIDTH
inline void mse_some(int64_t begin, int64_t end, const Norm& norm, bool known, const float* x,
                     const float* target, double upstream, double* sums, const NormGradients& grads) {
  const double factor = 2.0 * upstream / (norm.count() * static_cast<double>(norm.channels));
  for (int64_t c = begin; c < end; ++c) {
    const Channel channel = known ? channel_again(norm, c) : channel_of(norm, c, x);
    WideSum square, sum, moment;
    each_place(
        norm, c,
        KDFAST_PLACE {
          KDFAST_VALUE(value, x + at);
          KDFAST_VALUE(wanted, target + at);
          auto error = value;
          channel.normalise(error);
          error -= wanted;
          square.add(error * error);
          sum.add(error);
          moment.add(error * (value - channel.mean));
        },
        square, sum, moment);
    sums[c] = square.total();
    const double total = sum.total(), total_moment = moment.total();
    if (grads.weight) grads.weight[c] = static_cast<float>(total_moment * channel.rstd * factor);
    if (grads.bias) grads.bias[c] = static_cast<float>(total * factor);
    if (!grads.x) continue;
    const Slope slope(norm, channel, total, total_moment);
    const float gain = static_cast<float>(static_cast<double>(channel.gain) * factor);
    each_place(
        norm, c, KDFAST_PLACE {
          KDFAST_VALUE(value, x + at);
          KDFAST_VALUE(wanted, target + at);
          auto error = value;
          channel.normalise(error);
          error -= wanted;
          slope.take_off(norm, channel, value, error);
          error *= gain;
          save_lanes(error, grads.x + at);
        });
  }
}

inline double norm_mse(const Norm& norm, bool known, const float* x, const float* target, double upstream,
                       const NormGradients& grads, int64_t threads) {
  std::vector<double> sums(static_cast<size_t>(norm.channels));
  shared_out(norm.channels, norm.batch * norm.inner, threads, [&](int64_t begin, int64_t end) {
    mse_some(begin, end, norm, known, x, target, upstream, sums.data(), grads);
  });
  return in_order(sums) / (norm.count() * static_cast<double>(norm.channels));
}

#undef KDFAST_PLACE
#undef KDFAST_VALUE

}  // namespace kdfast

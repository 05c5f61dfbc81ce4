// The loops over batch norms, branches, denoising steps and noise under sanitizers: rows of every width up to
// two vectors and some beyond, each thing that may be absent absent, memory exact to its last byte, values
// that are no numbers; then eight threads at once, whose results must be those of one. Exits 0 when all
// holds; a sanitizer ends the process otherwise.
#include <atomic>
#include <cstdio>
#include <functional>
#include <limits>
#include <random>

#include "branch_loops.hpp"
#include "denoise_loops.hpp"
#include "noise_loops.hpp"
#include "norm_loops.hpp"

using namespace kdfast;

namespace {

using Floats = std::vector<float>;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Memory that ends with the last element, so that a read or a write past it is seen.
Floats some(std::mt19937& random, int64_t count, bool odd) {
  Floats values(static_cast<size_t>(count));
  std::normal_distribution<float> normal(0.5F, 2.0F);
  for (float& value : values) {
    value = normal(random);
    if (odd && random() % 20 == 0)
      value = Floats{NAN, kInfinity, -kInfinity, 3e38F, -3e38F, 1e-40F}[random() % 6];
  }
  return values;
}

Floats room(int64_t count) { return Floats(static_cast<size_t>(count)); }

const float* maybe(const Floats& values, bool wanted) { return wanted ? values.data() : nullptr; }
float* maybe(Floats& values, bool wanted) { return wanted ? values.data() : nullptr; }

// Everything that a call wrote, one after another.
Floats joined(const std::vector<Floats>& parts) {
  Floats all;
  for (const Floats& part : parts) all.insert(all.end(), part.begin(), part.end());
  return all;
}

Floats norms(uint32_t seed, int64_t batch, int64_t channels, int64_t inner, uint32_t options, bool odd,
             int64_t threads) {
  std::mt19937 random(seed);
  const auto has = [options](int bit) { return (options >> bit & 1) != 0; };
  const int64_t count = batch * channels * inner;
  const Floats x = some(random, count, odd), beside = some(random, count, odd),
               upstream = some(random, count, odd), weight = some(random, channels, odd),
               bias = some(random, channels, odd);
  Floats running_mean = some(random, channels, odd), running_var(static_cast<size_t>(channels), 1.5F);
  Floats mean = room(channels), rstd = room(channels), y = room(count), error(1);
  const bool training = has(0), tracked = !training || has(1);
  const Norm norm{batch,
                  channels,
                  inner,
                  maybe(weight, has(2)),
                  maybe(bias, has(3)),
                  maybe(running_mean, tracked),
                  maybe(running_var, tracked),
                  mean.data(),
                  rstd.data(),
                  0.1,
                  1e-5,
                  training};
  const Act act{has(4), has(5) ? 1.0F : 0.3F, has(6) ? 1.0F : -0.7F};
  norm_act(norm, act, x.data(), maybe(beside, has(7)), y.data(), threads);
  std::vector<Floats> grads{room(count), room(count), room(channels), room(channels)};
  const NormGradients wanted{maybe(grads[0], has(8)), maybe(grads[1], has(9)), maybe(grads[2], has(10)),
                             maybe(grads[3], has(11))};
  norm_act_backward(norm, act, upstream.data(), x.data(), maybe(y, has(7)), wanted, threads);
  Floats all = joined({y, joined(grads)});
  error[0] = static_cast<float>(norm_mse(norm, has(12), x.data(), beside.data(), 1.5, wanted, threads));
  return joined({all, joined(grads), error, mean, rstd, running_mean, running_var});
}

Floats branches(uint32_t seed, int64_t count, int64_t outer, int64_t inner, uint32_t options, bool odd,
                int64_t threads) {
  std::mt19937 random(seed);
  const auto has = [options](int bit) { return (options >> bit & 1) != 0; };
  const int64_t apart = inner + (has(0) ? 3 : 0), each = outer > 0 ? (outer - 1) * apart + inner : 0;
  const Floats data = some(random, count * each, odd), target = some(random, outer * inner, odd),
               u = some(random, count, false), v = some(random, count, false), w = some(random, count, false),
               grad_mean = some(random, outer * inner, odd);
  std::vector<int64_t> order(static_cast<size_t>(count));
  for (int64_t k = 0; k < count; ++k) order[static_cast<size_t>(k)] = count - 1 - k;
  Floats mean = room(outer * inner), grad = room(count * outer * inner), loss(1);
  loss[0] = static_cast<float>(branch_recursion(
      {count, outer, inner, data.data(), each, apart, target.data()},
      {u.data(), v.data(), order.data(), maybe(w, has(1)), ~uint64_t{0} - seed, has(2)},
      {maybe(mean, has(3)), maybe(grad, has(4)), outer * inner, inner, maybe(grad_mean, has(5)), 0.5},
      threads));
  return joined({loss, mean, grad});
}

Floats steps(uint32_t seed, int64_t rows, int64_t inner, uint32_t options, bool odd, int64_t threads) {
  std::mt19937 random(seed);
  const auto has = [options](int bit) { return (options >> bit & 1) != 0; };
  const bool guided = has(0), both = guided && has(1);  // a sample for each half, or one for the two
  const int64_t half = both ? (rows + 1) / 2 : rows, samples = both ? 2 * half : rows;
  const int64_t stride = inner + (has(2) ? 5 : 0), outputs = guided ? 2 * half : rows;
  const Floats output = some(random, outputs > 0 ? (outputs - 1) * stride + inner : 0, odd),
               sample = some(random, samples * inner, odd), noise = some(random, samples * inner, odd),
               past = some(random, samples * inner, odd), numbers = some(random, 10, false);
  StepRow row;
  std::memcpy(&row, numbers.data(), sizeof row);
  Floats y = room(samples * inner), x0 = room(samples * inner);
  const float* const unconditional = guided ? output.data() + (outputs > 0 ? half * stride : 0) : nullptr;
  denoise_step({samples,
                inner,
                half,
                stride,
                sample.data(),
                output.data(),
                unconditional,
                3.0F,
                {maybe(past, has(3)), maybe(past, has(4)), nullptr},
                maybe(noise, has(5)),
                has(6) ? 1.0F : kInfinity,
                y.data(),
                maybe(x0, has(7))},
               row, threads);
  return joined({y, x0});
}

Floats noised(uint32_t seed, int64_t rows, int64_t inner, bool odd, int64_t threads) {
  std::mt19937 random(seed);
  const Floats x = some(random, rows * inner, odd), scale = some(random, rows, odd),
               sigma = some(random, rows, odd);
  Floats out = room(rows * inner);
  noised_rows(~uint64_t{0} - seed, 7, {rows, inner, x.data(), scale.data(), sigma.data(), out.data()},
              threads);
  return out;
}

Floats errors(uint32_t seed, int64_t count, bool odd, bool wanted, int64_t threads) {
  std::mt19937 random(seed);
  const Floats x = some(random, count, odd);
  Floats grad = room(count), loss(1);
  loss[0] = static_cast<float>(
      noise_mse(~uint64_t{0} - seed, 7, count, x.data(), maybe(grad, wanted), 0.5, threads));
  return joined({loss, grad});
}

int64_t all_widths() {
  std::mt19937 random(4);
  int64_t calls = 0;
  const auto width = [](int64_t turn) { return turn <= 35 ? turn : 36 + (turn - 35) * 97; };
  for (int round = 0; round < 12; ++round)
    for (int64_t turn = 1; turn <= 42; ++turn, ++calls) {
      const int64_t inner = width(turn), few = 1 + random() % 3;
      const uint32_t options = random(), seed = random();
      const bool odd = round % 2 != 0;
      norms(seed, few + 1, 1 + random() % 3, inner, options, odd, 4);
      branches(seed, few, random() % 3, inner, options, odd, 4);
      steps(seed, random() % 4, inner, options, odd, 4);
      noised(seed, random() % 4, inner, odd, 4);
      errors(seed, 1 + random() % 700, odd, round % 3 != 0, 4);
    }
  return calls;
}

// Work enough for threads of their own, by eight callers at once.
bool agree(const std::function<Floats(int64_t)>& call) {
  const Floats alone = call(1);
  std::atomic<int> wrong{0};
  std::vector<std::thread> callers;
  for (int index = 0; index < 8; ++index)
    callers.emplace_back([&, index] {
      const Floats got = call(1 + index % 4);
      wrong += got.size() != alone.size() ||
               std::memcmp(got.data(), alone.data(), got.size() * sizeof(float)) != 0;
    });
  for (std::thread& caller : callers) caller.join();
  return wrong == 0;
}

}  // namespace

int main() {
  const int64_t calls = all_widths();
  const bool same = agree([](int64_t threads) { return norms(1, 4, 5, 40001, ~0U, false, threads); }) &&
                    agree([](int64_t threads) { return norms(2, 4, 5, 40001, ~1U, false, threads); }) &&
                    agree([](int64_t threads) { return branches(3, 4, 5, 40001, ~0U, false, threads); }) &&
                    agree([](int64_t threads) { return steps(4, 20, 40001, ~2U, false, threads); }) &&
                    agree([](int64_t threads) { return noised(5, 20, 40001, false, threads); }) &&
                    agree([](int64_t threads) { return errors(6, 800003, false, true, threads); });
  if (!same) return std::puts("threads change what is computed"), 1;
  std::printf("%lld calls of each loop\n", static_cast<long long>(calls));
  return 0;
}

// Work shared out among threads, where there is enough of it, and sums whose order no thread changes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace kdfast {

// Elements that are worth a thread of their own: half a millisecond.
constexpr int64_t kThreadElements = 1 << 18;

// part(begin, end) of `items` of so many elements each, evenly, on at most so many threads; the caller is
// one.
template <typename Part>
void shared_out(int64_t items, int64_t elements, int64_t threads, const Part& part) {
  threads = std::max<int64_t>(1, std::min({threads, items, items * elements / kThreadElements}));
  std::vector<std::thread> others;
  for (int64_t index = 1; index < threads; ++index)
    others.emplace_back(
        [&part, items, threads, index] { part(items * index / threads, items * (index + 1) / threads); });
  part(0, items / threads);
  for (std::thread& other : others) other.join();
}

inline double in_order(const std::vector<double>& parts) {
  double sum = 0;
  for (const double value : parts) sum += value;
  return sum;
}

}  // namespace kdfast

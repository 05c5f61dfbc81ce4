// The loops over rows, pixels and normals under sanitizers: every width up to three vectors and some beyond,
// rows side by side and apart, exact to the last byte of their memory, values that are no numbers, students
// that nearly agree; then eight threads at once, whose results must be those of one. Exits 0 when all holds;
// a sanitizer ends the process otherwise. The checksum that it prints is the same however the loops were
// compiled.
#include <array>
#include <atomic>
#include <cstdio>
#include <limits>
#include <random>
#include <thread>

#include "dead_leaves.hpp"
#include "dist_loop.hpp"
#include "jsd_loop.hpp"
#include "philox_normal.hpp"
#include "row_losses.hpp"
#include "topk_loop.hpp"

using namespace kdfast;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Losses {
  std::vector<float> loss, student, teacher;
  bool operator==(const Losses& other) const {
    const auto same = [](const std::vector<float>& a, const std::vector<float>& b) {
      return a.size() == b.size() &&
             (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
    };
    return same(loss, other.loss) && same(student, other.student) && same(teacher, other.teacher);
  }
};

// Of the bits of all results in their order; one NaN is as good as another.
struct Checksum {
  uint64_t value = 14695981039346656037U;
  void add(const std::vector<float>& numbers) {
    for (const float number : numbers) {
      uint32_t bits = 0x7fc00000;
      if (number == number) std::memcpy(&bits, &number, sizeof bits);
      value = (value ^ bits) * 1099511628211U;
    }
  }
  void add(const Losses& losses) {
    add(losses.loss);
    add(losses.student);
    add(losses.teacher);
  }
};

// Memory that ends with the last element, so that a read or a write past it is seen.
std::vector<float> logits(std::mt19937& random, int64_t rows, int64_t classes, int64_t stride, int odd) {
  std::vector<float> values(static_cast<size_t>(rows ? (rows - 1) * stride + classes : 0));
  std::normal_distribution<float> normal(0.0F, 5.0F);
  for (float& value : values) {
    value = normal(random);
    if (odd && random() % 20 == 0)
      value = std::vector<float>{NAN, kInfinity, -kInfinity, 3e38F, -3e38F, 1e-40F}[random() % 6];
  }
  return values;
}

enum class Kind { kKl, kJsd };

Losses losses(Kind kind, const std::vector<float>& s, int64_t s_stride, const std::vector<float>& t,
              int64_t t_stride, int64_t rows, int64_t classes, float inverse, int wanted, int64_t threads) {
  Losses out;
  out.loss.resize(static_cast<size_t>(rows));
  if (wanted & 1) out.student.resize(static_cast<size_t>(rows * classes));
  if (wanted & 2) out.teacher.resize(static_cast<size_t>(rows * classes));
  const Rows student{s.data(), s_stride}, teacher{t.data(), t_stride};
  const Gradient grad_s{wanted & 1 ? out.student.data() : nullptr, classes};
  const Gradient grad_t{wanted & 2 ? out.teacher.data() : nullptr, classes};
  const Care care{static_cast<double>(inverse), 1e-3F};
  if (kind == Kind::kKl)
    kl_rows(rows, classes, student, teacher, care, out.loss.data(), grad_s, grad_t, threads);
  else
    jsd_rows(rows, classes, student, teacher, care, 0.3, out.loss.data(), grad_s, grad_t, threads);
  return out;
}

Losses dist(const std::vector<float>& s, int64_t s_stride, const std::vector<float>& t, int64_t t_stride,
            int64_t rows, int64_t classes, float inverse, int wanted, int64_t threads) {
  Losses out;
  if (wanted & 1) out.student.resize(static_cast<size_t>(rows * classes));
  if (wanted & 2) out.teacher.resize(static_cast<size_t>(rows * classes));
  out.loss.push_back(
      static_cast<float>(dist_loss(rows, classes, {s.data(), s_stride}, {t.data(), t_stride}, inverse, 0.7,
                                   1.6, {wanted & 1 ? out.student.data() : nullptr, classes},
                                   {wanted & 2 ? out.teacher.data() : nullptr, classes}, threads)));
  return out;
}

// A cache whose classes are anything, some of them twice and some of them none.
Losses topk(std::mt19937 random, const std::vector<float>& s, int64_t stride, int64_t rows, int64_t classes,
            float inverse, int wanted, int64_t threads) {
  const int64_t kept = random() % (std::min<int64_t>(classes, 20) + 2);
  std::vector<int64_t> index(static_cast<size_t>(rows * kept));
  for (int64_t& one : index) one = static_cast<int64_t>(random() % (classes + 2)) - 1;
  const auto held = logits(random, rows, kept, kept, wanted & 4), z = logits(random, rows, 1, 1, wanted & 4);
  Losses out;
  out.loss.resize(static_cast<size_t>(rows));
  if (wanted & 1) out.student.resize(static_cast<size_t>(rows * classes));
  topk_rows(rows,
            {classes,
             {s.data(), stride},
             inverse,
             {kept, index.data(), held.data(), wanted & 2 ? z.data() : nullptr, (wanted & 8) == 0},
             out.loss.data(),
             {wanted & 1 ? out.student.data() : nullptr, classes}},
            threads);
  return out;
}

// A teacher, or one whom the student nearly agrees with.
std::vector<float> taught(std::mt19937& random, const std::vector<float>& student, int64_t rows,
                          int64_t classes, int64_t stride, int odd, bool near) {
  auto out = logits(random, rows, classes, stride, odd);
  for (size_t at = 0; near && at < out.size(); ++at) out[at] = student[at] + 1e-4F * out[at];
  return out;
}

int64_t rows_of_all_widths(Checksum& checksum) {
  std::mt19937 random(1);
  int64_t calls = 0;
  for (int round = 0; round < 40; ++round)
    for (int64_t classes = 1; classes <= 50; ++classes, ++calls) {
      const bool near = round % 8 >= 6;
      const int64_t rows = random() % 4, s_stride = classes + random() % 3,
                    t_stride = near ? s_stride : classes + random() % 3;
      const auto s = logits(random, rows, classes, s_stride, round % 2);
      const auto t = taught(random, s, rows, classes, t_stride, round % 4 == 3, near);
      const float inverse = std::vector<float>{1.0F, 0.25F, 1e-18F, 1e18F}[random() % 4];
      for (Kind kind : {Kind::kKl, Kind::kJsd})
        checksum.add(losses(kind, s, s_stride, t, t_stride, rows, classes, inverse,
                            static_cast<int>(random() % 4), 4));
      if (rows > 0)
        checksum.add(
            dist(s, s_stride, t, t_stride, rows, classes, inverse, static_cast<int>(random() % 4), 4));
      checksum.add(topk(random, s, s_stride, rows, classes, inverse, static_cast<int>(random() % 16), 4));
    }
  return calls;
}

// Rows enough for threads of their own, by eight callers at once.
bool threads_agree() {
  std::mt19937 random(2);
  const int64_t rows = 700, classes = 1003;
  const auto s = logits(random, rows, classes, classes, 0);
  auto t = logits(random, rows, classes, classes, 0);
  for (size_t at = 0; at < t.size() / 4; ++at) t[at] = s[at] + 1e-4F * t[at];
  const auto all = [&](int64_t threads) {
    return std::array<Losses, 4>{losses(Kind::kKl, s, classes, t, classes, rows, classes, 0.5F, 3, threads),
                                 losses(Kind::kJsd, s, classes, t, classes, rows, classes, 0.5F, 3, threads),
                                 dist(s, classes, t, classes, rows, classes, 0.5F, 3, threads),
                                 topk(random, s, classes, rows, classes, 0.5F, 3, threads)};
  };
  const auto alone = all(1);
  std::atomic<int> wrong{0};
  std::vector<std::thread> callers;
  for (int index = 0; index < 8; ++index)
    callers.emplace_back([&, index] {
      for (int round = 0; round < 3; ++round) wrong += !(all(1 + index % 4) == alone);
    });
  for (std::thread& caller : callers) caller.join();
  return wrong == 0;
}

std::vector<uint8_t> painted(uint64_t seed, int64_t image, int64_t height, int64_t width, int64_t limit,
                             const LeafLaw& law) {
  std::vector<uint8_t> covered, out(static_cast<size_t>(3 * height * width));
  paint_leaves(seed, image, height, width, limit, law, covered, out.data());
  return out;
}

int64_t images_of_all_sizes(const LeafLaw& law) {
  std::mt19937_64 random(3);
  int64_t images = 0;
  for (int64_t height = 0; height <= 33; height += 1 + height / 8)
    for (int64_t width = 0; width <= 33; width += 1 + width / 8)
      for (int64_t limit : {0, 1, 7, 200}) {
        painted(random(), static_cast<int64_t>(random() >> 1), height, width, limit, law);
        ++images;
      }
  return images;
}

bool painters_agree(const LeafLaw& law) {
  const auto alone = painted(5, 7, 64, 48, 300, law);
  std::atomic<int> wrong{0};
  std::vector<std::thread> painters;
  for (int index = 0; index < 8; ++index)
    painters.emplace_back([&] {
      for (int round = 0; round < 10; ++round) wrong += painted(5, 7, 64, 48, 300, law) != alone;
    });
  for (std::thread& painter : painters) painter.join();
  return wrong == 0;
}

// Counts that end inside a block of normals too.
int64_t normals_of_all_counts() {
  for (int64_t count = 0; count <= 200; ++count) {
    std::vector<float> out(static_cast<size_t>(count));
    normals(~uint64_t{0} - static_cast<uint64_t>(count), ~uint32_t{0}, count, out.data());
  }
  return 201;
}

}  // namespace

int main() {
  const std::vector<float> radii{0.01F, 0.1F, 0.5F, 2.0F}, cumulative{0.4F, 0.8F, 0.95F, 1.0F};
  const LeafLaw law{radii.data(), cumulative.data(), 4};
  Checksum checksum;
  const int64_t calls = rows_of_all_widths(checksum), images = images_of_all_sizes(law),
                counts = normals_of_all_counts();
  if (!threads_agree()) return std::puts("threads change what a row gets"), 1;
  if (!painters_agree(law)) return std::puts("threads change what is painted"), 1;
  std::printf("%lld calls of rows, %lld images, %lld runs of normals, checksum %016llx\n",
              static_cast<long long>(calls), static_cast<long long>(images), static_cast<long long>(counts),
              static_cast<unsigned long long>(checksum.value));
  return 0;
}

// How many live rows each class has, exactly, whatever evicts them.
#pragma once

#include <cstdint>

namespace kdfast {

constexpr int32_t kUnlabelled = -1;

class ClassHistogram {
 public:
  ClassHistogram(int64_t classes, int64_t* counts) : classes_(classes), counts_(counts) {}

  int64_t classes() const { return classes_; }
  int64_t count(int64_t label) const { return counts_[label]; }
  bool counts(int32_t label) const { return label >= 0 && label < classes_; }

  void add(int32_t label) {
    if (counts(label)) ++counts_[label];
  }

  void remove(int32_t label) {
    if (counts(label)) --counts_[label];
  }

 private:
  int64_t classes_;
  int64_t* counts_;
};

}  // namespace kdfast

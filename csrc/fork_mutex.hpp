// A mutex that a fork cannot leave locked in the child.
//
// A child has only the thread that forked. A mutex that another thread held at that moment stays locked in
// the child for ever, and what it guards may be half written. So every fork first waits for all of these
// mutexes, and gives them back in parent and child: the child starts with whole state and free locks. Nobody
// may fork, or take a second ForkMutex, while holding one.
#pragma once

#include <pthread.h>

#include <mutex>
#include <unordered_set>

namespace kdfast {

class ForkMutex {
 public:
  ForkMutex() {
    Registry& all = registry();
    const std::lock_guard<std::mutex> guard(all.guard);
    all.members.insert(this);
  }
  ForkMutex(const ForkMutex&) = delete;
  ForkMutex& operator=(const ForkMutex&) = delete;
  ~ForkMutex() {
    Registry& all = registry();
    const std::lock_guard<std::mutex> guard(all.guard);
    all.members.erase(this);
  }

  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  struct Registry {
    std::mutex guard;
    std::unordered_set<ForkMutex*> members;
  };

  // Never destroyed: buffers may outlive static destruction.
  static Registry& registry() {
    static Registry* const all = [] {
      pthread_atfork(&before, &after, &after);
      return new Registry;
    }();
    return *all;
  }

  static void before() {
    registry().guard.lock();
    for (ForkMutex* member : registry().members) member->lock();
  }

  static void after() {
    for (ForkMutex* member : registry().members) member->unlock();
    registry().guard.unlock();
  }

  std::mutex mutex_;
};

}  // namespace kdfast

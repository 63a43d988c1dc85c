// A parallel loop over tasks that never brings a thread pool of its own.
//
// torch's worker threads keep spinning for a while after each of its own loops, so a second pool
// (or a second copy of an OpenMP runtime) would compete with them for the same cores. The loop
// therefore runs on the runtime that torch itself loaded: its entry point GOMP_parallel, part of
// libgomp's stable binary interface and also offered by the runtimes of LLVM and Intel, is looked
// up at run time and handed in. Nothing is linked, and no compiler needs to know OpenMP. Where
// there is no such function, threads are started for the one loop (some tens of microseconds).
//
// Loops that need each other's results may share one such start: `parallel_phases`.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>
#include <tuple>
#include <vector>

namespace vqlogits {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

inline std::atomic<GompParallel> gomp_parallel{nullptr};

// Runs `run(self)` on some threads, this one among them, until all have returned.
inline void on_threads(int threads, void (*run)(void*), void* self) {
  if (threads <= 1) {
    run(self);
    return;
  }
  if (const GompParallel start = gomp_parallel.load(std::memory_order_relaxed)) {
    start(run, self, static_cast<unsigned>(threads), 0);
    return;
  }
  std::vector<std::thread> helpers;
  try {
    helpers.reserve(threads - 1);
    while (static_cast<int>(helpers.size()) < threads - 1) helpers.emplace_back(run, self);
  } catch (const std::exception&) {
    // The system has no memory or no thread left to give; those that started share the work.
  }
  run(self);
  for (std::thread& helper : helpers) helper.join();
}

// Tasks 0 to `count` - 1 of a loop, claimed one by one: any number of threads may come, and a slow
// one delays nobody.
template <typename Task>
struct Phase {
  int64_t count;
  const Task& task;
  std::atomic<int64_t> next{0}, done{0};

  Phase(int64_t count, const Task& task) : count(count), task(task) {}

  void work() {
    int64_t made = 0;
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count; made++) task(i);
    if (made) done.fetch_add(made, std::memory_order_release);
  }
  // Until all tasks are done, whoever claimed them: threads that never came have claimed none.
  void wait() const {
    for (int turns = 0; done.load(std::memory_order_acquire) < count; turns++) {
      if (turns >= 1000) std::this_thread::yield();
    }
  }
};

// Loops one after the other in one start of the threads; each begins when the one before is over.
template <typename... Tasks>
void parallel_phases(int threads, Phase<Tasks>&... phases) {
  std::tuple<Phase<Tasks>&...> all(phases...);
  on_threads(
      threads,
      [](void* self) {
        std::apply(
            [](auto&... phase) {
              size_t left = sizeof...(phase);
              ((phase.work(), --left ? phase.wait() : void()), ...);
            },
            *static_cast<std::tuple<Phase<Tasks>&...>*>(self));
      },
      &all);
}

template <typename Task>
void parallel_for(int64_t tasks, int threads, const Task& task) {
  Phase<Task> phase(tasks, task);
  parallel_phases(static_cast<int>(std::min<int64_t>(threads, tasks)), phase);
}

}  // namespace vqlogits

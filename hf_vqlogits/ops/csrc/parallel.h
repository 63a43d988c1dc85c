// A parallel loop over tasks that never brings a thread pool of its own.
//
// torch's worker threads keep spinning for a while after each of its own loops, so a second pool
// (or a second copy of an OpenMP runtime) would compete with them for the same cores. The loop
// therefore runs on the runtime that torch itself loaded: its entry point GOMP_parallel, part of
// libgomp's stable binary interface and also offered by the runtimes of LLVM and Intel, is looked
// up at run time and handed in. Nothing is linked, and no compiler needs to know OpenMP. Where
// there is no such function, threads are started for the one loop (some tens of microseconds).
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

namespace vqlogits {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

inline std::atomic<GompParallel> gomp_parallel{nullptr};

template <typename Task>
void parallel_for(int64_t tasks, int threads, const Task& task) {
  struct Loop {
    std::atomic<int64_t> next{0};
    int64_t tasks;
    const Task* task;
    // Tasks are claimed one by one: any number of threads may come, and a slow one delays nobody.
    static void run(void* self) {
      auto* loop = static_cast<Loop*>(self);
      for (int64_t i; (i = loop->next.fetch_add(1, std::memory_order_relaxed)) < loop->tasks;) {
        (*loop->task)(i);
      }
    }
  };
  Loop loop;
  loop.tasks = tasks;
  loop.task = &task;
  threads = static_cast<int>(std::min<int64_t>(threads, tasks));
  if (threads <= 1) {
    Loop::run(&loop);
    return;
  }
  if (const GompParallel start = gomp_parallel.load(std::memory_order_relaxed)) {
    start(&Loop::run, &loop, static_cast<unsigned>(threads), 0);
    return;
  }
  std::vector<std::thread> helpers;
  try {
    helpers.reserve(threads - 1);
    while (static_cast<int>(helpers.size()) < threads - 1) helpers.emplace_back(&Loop::run, &loop);
  } catch (const std::exception&) {
    // The system has no memory or no thread left to give; those that started share the work.
  }
  Loop::run(&loop);
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace vqlogits

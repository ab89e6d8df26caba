// Threads that share one piece of work, and sleep between two.
//
// Not OpenMP's: its threads keep spinning for a while after each piece, which costs dearly where another program, or
// another model of this one, wants the core; and each thread that calls it has a team of its own.

#pragma once

#include <pthread.h>
#ifdef __linux__
#include <sched.h>
#endif

#include <atomic>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace {

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// waits until `word` is no longer `old`: looks a while, then sleeps
template <typename T>
inline void await_change(const std::atomic<T> &word, T old) {
  for (int looks = 0; looks < 10000; looks++) {
    if (word.load(std::memory_order_acquire) != old) return;
    relax();
  }
  while (word.load(std::memory_order_acquire) == old) word.wait(old, std::memory_order_acquire);
}

class Pool {
  std::mutex one;  // caller at a time: each piece of work wants all cores
  std::atomic<uint32_t> call{0};
  std::atomic<int> busy{0};
  std::vector<std::thread> workers;
  const std::function<void(int)> *work = nullptr;
  int wanted = 0, home = -1;
  size_t placed = 0;

  // Threads that sleep and wake often are woken where the waker runs, and two then take turns on one core while another
  // is free. So the workers may run on every core that is ours but the caller's.
  void place() {
#ifdef __linux__
    int here = sched_getcpu();
    if (here == home && placed == workers.size()) return;
    cpu_set_t ours;
    if (here < 0 || sched_getaffinity(0, sizeof ours, &ours) || CPU_COUNT(&ours) < 2) return;
    CPU_CLR(here, &ours);
    for (auto &worker : workers) pthread_setaffinity_np(worker.native_handle(), sizeof ours, &ours);
    home = here, placed = workers.size();
#endif
  }

  void serve(int index, uint32_t seen) {
    for (;;) {
      await_change(call, seen);
      seen++;
      if (index < wanted) (*work)(index);
      if (busy.fetch_sub(1, std::memory_order_acq_rel) == 1) busy.notify_one();
    }
  }

 public:
  // f(0) here and f(1) .. f(threads - 1) on other threads; returns when all have
  void run(int threads, const std::function<void(int)> &f) {
    std::lock_guard<std::mutex> lock(one);
    if (threads > 1) {
      while (int(workers.size()) < threads - 1)
        workers.emplace_back(&Pool::serve, this, int(workers.size()) + 1, call.load(std::memory_order_relaxed));
      place();
      work = &f, wanted = threads;
      busy.store(int(workers.size()), std::memory_order_relaxed);
      call.fetch_add(1, std::memory_order_release);
      call.notify_all();
    }
    f(0);
    if (threads > 1)
      for (int left; (left = busy.load(std::memory_order_acquire)) > 0;) await_change(busy, left);
  }
};

// never destroyed: its threads may sleep in it when the program ends. A forked child has none of them and starts anew
inline Pool *&pool() {
  static Pool *one = [] {
    pthread_atfork(nullptr, nullptr, [] { pool() = new Pool; });
    return new Pool;
  }();
  return one;
}

}  // namespace

// Threads that help the one that calls kernels. Unlike OpenMP's they never hold it up: whoever comes late finds nothing
// left to do. So a busy core costs no more than its help, where the groups of a model share the cores with its router.
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <memory>
#include <system_error>
#include <thread>
#include <vector>

namespace pimoe {

constexpr int MAX_THREADS = 64;
constexpr int SPINS = 400;  // looks before a thread goes to sleep, some ten microseconds

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

class Pool {
 public:
  ~Pool() {
    stopping_.store(true);
    job_.fetch_add(1);
    wake(job_, INT_MAX);
    for (auto& helper : helpers_) helper.join();
  }

  // Runs `body(context, unit)` for every unit below `units`, on this thread and on up to `threads - 1` others.
  void run(int threads, int64_t units, int64_t chunk, void (*body)(void*, int64_t), void* context) {
    try {
      while (int(helpers_.size()) < std::min(threads, MAX_THREADS) - 1) helpers_.emplace_back([this] { help(); });
    } catch (const std::system_error&) {  // no more threads are to be had: those that are there help
    }
    body_ = body, context_ = context, units_ = units, chunk_ = chunk;
    next_.store(0, std::memory_order_relaxed);
    wanted_.store(threads - 1, std::memory_order_relaxed);
    open_.store(true);
    job_.fetch_add(1);
    if (sleeping_.load() > 0) wake(job_, threads - 1);
    work();
    open_.store(false);  // from now on nobody begins ...
    for (int looks = 0; active_.load() > 0;) {  // ... and those who have begun are soon done
      if (++looks < SPINS) {
        relax();
      } else if (const uint32_t active = active_.load(); active > 0) {
        leaving_.store(true);
        sleep_while(active_, active);
      }
    }
    leaving_.store(false);
  }

 private:
  void work() {
    while (true) {
      const int64_t first = next_.fetch_add(chunk_, std::memory_order_relaxed);
      if (first >= units_) return;
      const int64_t end = std::min(units_, first + chunk_);
      for (int64_t unit = first; unit < end; ++unit) body_(context_, unit);
    }
  }

  void help() {
    uint32_t seen = 0;
    while (true) {
      for (int looks = 0; job_.load() == seen; ++looks) {
        if (looks < SPINS) {
          relax();
          continue;
        }
        sleeping_.fetch_add(1);
        sleep_while(job_, seen);
        sleeping_.fetch_sub(1);
      }
      seen = job_.load();
      if (stopping_.load()) return;
      active_.fetch_add(1);
      // Only after it has been counted as active: then whoever closes the job waits for it.
      if (open_.load() && wanted_.fetch_sub(1) > 0) work();
      active_.fetch_sub(1);
      if (leaving_.load()) wake(active_, INT_MAX);
    }
  }

  // The kernel looks at `word` itself before it sleeps: a change on the way there is never missed.
  static void sleep_while(std::atomic<uint32_t>& word, uint32_t value) {
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
  }
  static void wake(std::atomic<uint32_t>& word, int count) {
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE_PRIVATE, count, nullptr, nullptr, 0);
  }

  std::vector<std::thread> helpers_;
  std::atomic<uint32_t> job_{0}, active_{0};
  std::atomic<int> sleeping_{0}, wanted_{0};
  std::atomic<bool> open_{false}, stopping_{false}, leaving_{false};
  std::atomic<int64_t> next_{0};
  int64_t units_ = 0, chunk_ = 1;
  void (*body_)(void*, int64_t) = nullptr;
  void* context_ = nullptr;
};

// `body(unit)` for every unit below `units`; on this thread alone where that is all there is to gain.
template <class Body> void parallel_for(int threads, int64_t units, int64_t chunk, Body body) {
  const int wanted = int(std::min<int64_t>(threads, (units + chunk - 1) / chunk));
  if (wanted <= 1) {
    for (int64_t unit = 0; unit < units; ++unit) body(unit);
    return;
  }
  static thread_local std::unique_ptr<Pool> pool;
  if (pool == nullptr) pool = std::make_unique<Pool>();
  pool->run(wanted, units, chunk, [](void* context, int64_t unit) { (*static_cast<Body*>(context))(unit); }, &body);
}

}  // namespace pimoe

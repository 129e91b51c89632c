// The threads that run a program: they are woken once, not once a step, because waking and joining them takes as long as a small
// step.
//
// The leader goes through the steps and publishes the tasks of each as a job; everyone takes tasks of the newest job until there
// are none. Nobody waits for a thread that has not come, only for tasks that someone has begun: where the helpers come late, or
// one after another on the leader's own thread, the leader does all the work alone.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <new>
#include <thread>

namespace sparsegan {

// A callable that outlives the call it is passed to; unlike std::function it never takes memory.
struct Body {
  const void* callable = nullptr;
  void (*call)(const void* callable, int64_t i) = nullptr;
  void operator()(int64_t i) const { call(callable, i); }
};

template <class F>
Body body_of(const F& callable) {
  return {&callable, [](const void* c, int64_t i) { (*static_cast<const F*>(c))(i); }};
}

class Team {
 public:
  static constexpr int64_t kMaxThreads = 64;  // layers of generators do not feed more

  // Bytes that a team needs, aligned to 64, for this many jobs at most.
  static int64_t bytes(int64_t threads, int64_t jobs) { return threads > 1 ? jobs * (1 + threads) * int64_t(sizeof(Share)) : 0; }

  Team(int64_t threads, int64_t jobs, uint8_t* memory) : threads_(threads), jobs_(threads > 1 ? jobs : 0), memory_(memory) {
    for (int64_t i = 0; i < jobs_ * (1 + threads); i++) new (memory + i * int64_t(sizeof(Share))) Share();
  }
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  // By the leader: run(i) for all i in [0, tasks), at the same time where it can. Every worker starts on its own share of the
  // tasks, which are neighbours, so that it mostly reads what it wrote in the layer before. Then it helps with the other shares:
  // tasks differ in their kept blocks, and cores in what else runs on them.
  template <class F>
  void for_each(int64_t tasks, bool serial, const F& run) {
    if (serial || tasks <= 1 || published_.load(std::memory_order_relaxed) >= jobs_) {
      for (int64_t i = 0; i < tasks; i++) run(i);
      return;
    }
    const int64_t number = published_.load(std::memory_order_relaxed);
    Share* const job = at(number);
    job->body = body_of(run);
    for (int64_t s = 0; s < threads_; s++) {
      job[1 + s].next.store(s * tasks / threads_, std::memory_order_relaxed);
      job[1 + s].end = (s + 1) * tasks / threads_;
    }
    published_.store(number + 1, std::memory_order_release);
    work(job, 0);
    for (int64_t turns = 0; job->next.load(std::memory_order_acquire) < tasks; turns++) relax(turns);
  }

  // By the leader, when there will be no more jobs.
  void dismiss() { published_.store(kDismissed, std::memory_order_release); }

  // By the others; returns when the leader dismisses them.
  void help(int64_t worker) {
    int64_t seen = 0, turns = 0;
    for (;;) {
      const int64_t published = published_.load(std::memory_order_acquire);
      if (published == kDismissed) return;
      if (published == seen) {
        relax(turns++);
        continue;
      }
      seen = published, turns = 0;
      work(at(seen - 1), worker);
    }
  }

 private:
  // A worker's share of the tasks of a job; before the shares stands the head, whose `next` counts the tasks that are done.
  struct alignas(64) Share {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
    Body body;
  };
  static constexpr int64_t kDismissed = -1;

  Share* at(int64_t job) { return reinterpret_cast<Share*>(memory_) + job * (1 + threads_); }

  void work(Share* job, int64_t worker) {
    int64_t done = 0;
    for (int64_t s = 0; s < threads_; s++) {
      Share& share = job[1 + (worker + s) % threads_];
      for (int64_t i = share.next.fetch_add(1, std::memory_order_relaxed); i < share.end;
           i = share.next.fetch_add(1, std::memory_order_relaxed)) {
        job->body(i);
        done++;
      }
    }
    if (done) job->next.fetch_add(done, std::memory_order_release);
  }

  // Waits a moment: busily at first, later so that other threads get the core.
  static void relax(int64_t turns) {
    if (turns > 256) return std::this_thread::yield();
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  const int64_t threads_, jobs_;
  uint8_t* const memory_;
  alignas(64) std::atomic<int64_t> published_{0};
};

}  // namespace sparsegan

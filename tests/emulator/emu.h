// Runs CUDA C++ kernels on the host, so that they can be tested with no GPU: every CUDA thread is a fibre (a stack of its own,
// switched by hand) and a scheduler runs the fibres of one block after another on one host thread.
//
//     launch ──> block (order by seed) ──> warp (order by seed) ──> lane (order by seed): runs until it must wait
//                  │ shared memory: garbage at first,                  │ barrier: until all threads of the block are there
//                  │ a red zone behind every piece                     │ collective: until all lanes of its mask are there
//
// csrc/cuda/warp.cuh builds its host branch on this: barriers, collectives, shuffles, mma, ldmatrix, cp.async.
//
// What is caught, as emu::Error with the source line: threads of a block that wait at different barriers, or exit while others
// wait; lanes of a warp that meet in different operations; a lane missing from a mask; shared memory taken beyond what was
// launched, or differently by two threads, or written past the end of a piece; misaligned vector accesses. A kernel that
// overflows its stack ends the process. Options: other seeds give other orders and other garbage; copies of cp.async land either
// at the wait that wants them (finds a missing wait) or at once (finds a tile overwritten while it is still read).
//
// With -fsanitize=address the red zones are poisoned and each access is checked. With -fsanitize=thread every CUDA thread is a
// thread to the race detector, and only __syncthreads and __syncwarp order memory, as on the device: a missing barrier is a data
// race, and so are two blocks that write to one address. Wrong inline PTX is beyond it: warp.cuh replaces it here.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <source_location>
#include <stdexcept>
#include <string>
#include <vector>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

namespace emu {

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the fibre that runs

struct Options {
  uint64_t seed = 0;          // order of blocks, warps and lanes; what shared memory holds at first
  bool interleave = false;    // true: warps take turns at every collective; false: a warp runs until it waits at a barrier
  bool eager_copies = false;  // true: cp.async lands at once; false: at the wait that wants it, or when its thread exits
  size_t shared_limit =
      99 << 10;  // bytes a block may have: what the smallest supported architectures (sm_86, sm_89, sm_120) give
};
inline Options options;

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct Abandoned {};  // unwinds the other fibres after an Error
[[noreturn]] inline void fail(const std::string& text) { throw Error("emulator: " + text); }

using Site = std::source_location;  // functions that can fail take `Site at = Site::current()`: the line of the kernel
inline std::string show(const Site& at) {
  const char* slash = std::strrchr(at.file_name(), '/');
  return std::string(slash ? slash + 1 : at.file_name()) + ":" + std::to_string(at.line());
}
inline bool same(const Site& a, const Site& b) { return a.line() == b.line() && !std::strcmp(a.file_name(), b.file_name()); }

// ---- sanitizers --------------------------------------------------------------------------------------------------------------

#if defined(__SANITIZE_THREAD__)
inline void release(void* object) { __tsan_release(object); }
inline void acquire(void* object) { __tsan_acquire(object); }
struct Quiet {  // while it lives, accesses are the emulator's book-keeping, not the kernel's
  Quiet() {
    AnnotateIgnoreReadsBegin("", 0);
    AnnotateIgnoreWritesBegin("", 0);
  }
  ~Quiet() {
    AnnotateIgnoreReadsEnd("", 0);
    AnnotateIgnoreWritesEnd("", 0);
  }
};
#else
inline void release(void*) {}
inline void acquire(void*) {}
struct Quiet {
  ~Quiet() {}
};
#endif

#if defined(__SANITIZE_ADDRESS__)
inline void poison(const void* p, size_t bytes) { __asan_poison_memory_region(p, bytes); }
inline void unpoison(const void* p, size_t bytes) { __asan_unpoison_memory_region(p, bytes); }
constexpr size_t kStackBytes = 256 << 10;
#else
inline void poison(const void*, size_t) {}
inline void unpoison(const void*, size_t) {}
constexpr size_t kStackBytes = 64 << 10;
#endif

// ---- fibres ------------------------------------------------------------------------------------------------------------------

// Where one flow of control is while another runs.
struct Context {
  const void* stack = nullptr;  // nullptr: the host thread's own
  size_t stack_bytes = 0;
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t registers;
#endif
  void* asan_frames = nullptr;
  void* tsan_fibre = nullptr;
};

#if defined(__x86_64__)
// Six registers survive a call in the System V ABI; swapcontext would add two system calls.
[[gnu::naked, gnu::noinline]] __attribute__((no_sanitize("address", "thread", "undefined"))) inline void switch_stack(void**,
                                                                                                                      void*) {
  asm("push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
      "mov %rsp, (%rdi)\n mov %rsi, %rsp\n"
      "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret");
}
#endif

__attribute__((no_sanitize("thread"))) inline void switch_to(Context& from, Context& to) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&from.asan_frames, to.stack, to.stack_bytes);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(to.tsan_fibre, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__x86_64__)
  switch_stack(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.registers, &to.registers);
#endif
#if defined(__SANITIZE_ADDRESS__)
  // Whoever comes back here comes from `to`: the scheduler and one of the fibres run in turn.
  __sanitizer_finish_switch_fiber(from.asan_frames, &to.stack, &to.stack_bytes);
#endif
}

enum class State { kReady, kAtCollective, kAtBarrier, kExited };

struct Copy {  // of 16 bytes by cp.async; source nullptr: zeros
  void* destination;
  const void* source;
};

inline void fibre_loop();

// One CUDA thread after another, of one block after another: a fibre is made once and runs fibre_loop() for ever.
struct Fibre {
  Context context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  unsigned id = 0;
  dim3 index;
  State state = State::kReady;
  const char* waits_in = "";
  Site waits_at;
  std::vector<std::vector<Copy>> copies;  // groups; the last is still open

  Fibre() {
    std::memset(stack.get(), kCanary, kCanaryBytes);
    context.stack = stack.get();
    context.stack_bytes = kStackBytes;
#if defined(__SANITIZE_THREAD__)
    context.tsan_fibre = __tsan_create_fiber(0);
#endif
#if defined(__x86_64__)
    void** top = reinterpret_cast<void**>(stack.get() + kStackBytes - 24);
    *top = nullptr;  // the return address of fibre_loop, 8 bytes below a multiple of 16 as the ABI has it
    *--top = reinterpret_cast<void*>(fibre_loop);
    for (int i = 0; i < 6; i++) *--top = nullptr;
    context.stack_pointer = top;
#else
    getcontext(&context.registers);
    context.registers.uc_stack.ss_sp = stack.get();
    context.registers.uc_stack.ss_size = kStackBytes;
    makecontext(&context.registers, fibre_loop, 0);
#endif
  }
  ~Fibre() {
#if defined(__SANITIZE_THREAD__)
    __tsan_destroy_fiber(context.tsan_fibre);
#endif
  }
  Fibre(const Fibre&) = delete;
  bool overflowed() const {
    for (size_t i = 0; i < kCanaryBytes; i++)
      if (stack[i] != kCanary) return true;
    return false;
  }

 private:
  static constexpr char kCanary = 0x5C;
  static constexpr size_t kCanaryBytes = 16;
};

// ---- one block
// ------------------------------------------------------------------------------------------------------------------

// Lanes that wait for each other in one warp-wide operation.
struct Meeting {
  unsigned mask = 0, arrived = 0;
  const char* operation = "";
  Site at;
  void* brought[32];
  char* order = nullptr;  // synchronisation object
};

// Synchronisation objects of the race detector, which knows them by their addresses. Each barrier has another one: a fibre that
// wakes late must not acquire what the next barrier releases.
inline char order_objects[1 << 20];
inline size_t next_order_object = 0;
inline char* new_order() { return &order_objects[next_order_object++ * 8 % sizeof order_objects]; }

struct Warp {
  std::vector<Meeting> meetings;
};

struct Piece {  // of shared memory
  size_t offset, bytes;
};
constexpr size_t kRedZone = 128, kMaxPieces = 32;

struct Block {
  std::vector<Fibre*> fibres;
  std::vector<Warp> warps;
  Fibre* current = nullptr;
  std::function<void()> kernel;
  std::string error;        // of a fibre: an exception cannot cross stacks
  bool abandoned = false;   // after an error, while the fibres leave the kernel
  char* barrier = nullptr;  // synchronisation object of the barrier to come
  alignas(8) char launched = 0;
  alignas(8) char finished = 0;  // acquired by the host only, so nothing orders one block before another

  char* shared = nullptr;
  size_t shared_bytes = 0;  // as launched
  unsigned char garbage = 0;
  std::vector<Piece> pieces;

  void free_shared() {
    if (shared) unpoison(shared, shared_bytes + kMaxPieces * kRedZone);
    ::operator delete[](shared, std::align_val_t(128));
    shared = nullptr;
  }
};
inline Block* block = nullptr;
inline Context scheduler;  // the host thread that launches; outlives a launch, as fibres do
inline std::vector<std::unique_ptr<Fibre>> fibre_pool;
inline std::mutex launching;  // all of this is global

inline unsigned lane() { return block->current->id % 32; }

inline void wait(State state, const char* operation, const Site& at) {
  Fibre& me = *block->current;
  me.state = state;
  me.waits_in = operation;
  me.waits_at = at;
  switch_to(me.context, scheduler);
  if (block->abandoned) throw Abandoned();
}

// A warp-wide operation. Every lane of `mask` brings a T; the last to arrive runs together(T* (&lanes)[32]) for all of them.
template <class T, class F>
void collective(const char* operation, const Site& at, unsigned mask, bool orders_memory, T* mine, F together) {
  Quiet quiet;
  Fibre& me = *block->current;
  Warp& warp = block->warps[me.id / 32];
  const unsigned bit = 1u << lane();
  const auto named = [](const char* what, const Site& where) { return std::string(what) + " (" + show(where) + ")"; };
  if (!(mask & bit)) fail(named(operation, at) + ": lane " + std::to_string(lane()) + " is not in its own mask");
  Meeting* meeting = nullptr;
  for (Meeting& other : warp.meetings) {
    if (!(other.mask & mask)) continue;
    if (other.mask != mask || other.operation != operation || !same(other.at, at))
      fail("divergent warp: lane " + std::to_string(lane()) + " is in " + named(operation, at) + ", others wait in " +
           named(other.operation, other.at));
    meeting = &other;
  }
  if (!meeting) {
    meeting = &warp.meetings.emplace_back();
    meeting->mask = mask;
    meeting->operation = operation;
    meeting->at = at;
    meeting->order = new_order();
  }
  char* const order = meeting->order;
  if (orders_memory) release(order);
  meeting->brought[lane()] = mine;
  meeting->arrived |= bit;
  if (meeting->arrived != mask) {
    wait(State::kAtCollective, operation, at);
  } else {
    T* lanes[32] = {};
    for (int i = 0; i < 32; i++)
      if (mask >> i & 1) lanes[i] = static_cast<T*>(meeting->brought[i]);
    warp.meetings.erase(warp.meetings.begin() + (meeting - warp.meetings.data()));
    together(lanes);
    for (unsigned i = 0; i < 32; i++)
      if (mask >> i & 1) block->fibres[me.id / 32 * 32 + i]->state = State::kReady;
  }
  if (orders_memory) acquire(order);
}

inline void barrier(const Site& at) {
  Quiet quiet;
  char* const order = block->barrier;
  release(order);
  wait(State::kAtBarrier, "__syncthreads", at);
  acquire(order);
}

inline void land(const Copy& copy) {
  if (copy.source)
    std::memcpy(copy.destination, copy.source, 16);
  else
    std::memset(copy.destination, 0, 16);
}

// Lands the oldest groups of cp.async until only `left` committed ones remain.
inline void land_groups(size_t left) {
  auto& groups = block->current->copies;
  for (;;) {
    std::vector<Copy> oldest;
    {
      Quiet quiet;
      if (groups.size() <= left + 1) return;
      oldest = std::move(groups.front());
      groups.erase(groups.begin());
    }
    for (size_t i = 0; i < oldest.size(); i++) land(oldest[i]);
    Quiet quiet;
    oldest = {};
  }
}

// The source must be aligned even where zeros are copied: the instruction says so.
inline void start_async_copy(void* destination, const void* source, bool valid, const Site& at) {
  if (reinterpret_cast<uintptr_t>(destination) % 16) fail("cp.async (" + show(at) + "): the destination is not 16-byte aligned");
  if (reinterpret_cast<uintptr_t>(source) % 16) fail("cp.async (" + show(at) + "): the source is not 16-byte aligned");
  const Copy copy{destination, valid ? source : nullptr};
  if (options.eager_copies) return land(copy);
  Quiet quiet;
  block->current->copies.back().push_back(copy);
}

inline void commit_async_copies() {
  Quiet quiet;
  block->current->copies.emplace_back();
}

inline void fibre_loop() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler.stack, &scheduler.stack_bytes);
#endif
  for (;;) {
    acquire(&block->launched);
    try {
      if (!block->abandoned) {
        block->kernel();
        commit_async_copies();
        land_groups(0);
      }
    } catch (const Abandoned&) {
    } catch (const std::exception& error) {
      Quiet quiet;
      block->error = std::string(error.what()) + ", thread " + std::to_string(block->current->id) + " of block (" +
                     std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ", " + std::to_string(blockIdx.z) + ")";
    }
    release(&block->finished);
    Context* mine;
    {
      Quiet quiet;
      block->current->state = State::kExited;
      mine = &block->current->context;
    }
    switch_to(*mine, scheduler);  // not in the Quiet: the next block starts here
  }
}

inline void resume(Fibre& fibre) {
  block->current = &fibre;
  threadIdx = fibre.index;
  switch_to(scheduler, fibre.context);
  if (!block->error.empty()) throw Error(block->error);
  if (fibre.overflowed()) {  // and wrote over who knows what
    std::fprintf(stderr, "emulator: thread %u overflowed its stack\n", fibre.id);
    std::abort();
  }
}

// "threads 0-31 in __syncthreads (k.cuh:7), 32-63 exited"
inline std::string who_waits_where() {
  std::string text;
  auto& fibres = block->fibres;
  for (size_t begin = 0, end; begin < fibres.size() && text.size() < 600; begin = end) {
    auto where = [&](size_t i) {
      const Fibre& f = *fibres[i];
      return f.state == State::kExited ? std::string("exited") : std::string("in ") + f.waits_in + " (" + show(f.waits_at) + ")";
    };
    for (end = begin + 1; end < fibres.size() && where(end) == where(begin); end++) {
    }
    text += (text.empty() ? "threads " : ", ") + std::to_string(begin) + "-" + std::to_string(end - 1) + " " + where(begin);
  }
  return text;
}

inline void check_red_zones() {
  for (size_t i = 0; i < block->pieces.size(); i++) {
    const Piece& piece = block->pieces[i];
    const unsigned char* zone = reinterpret_cast<unsigned char*>(block->shared) + piece.offset + piece.bytes;
    unpoison(zone, kRedZone);
    for (size_t j = 0; j < kRedZone; j++)
      if (zone[j] != block->garbage)
        fail("written " + std::to_string(j) + " bytes past the end of piece " + std::to_string(i) + " of shared memory");
  }
}

inline void run_block(std::mt19937_64& random) {
  auto& fibres = block->fibres;
  std::vector<unsigned> warp_order(block->warps.size()), lane_order(32);
  for (unsigned i = 0; i < warp_order.size(); i++) warp_order[i] = i;
  for (unsigned i = 0; i < 32; i++) lane_order[i] = i;
  for (;;) {
    std::shuffle(warp_order.begin(), warp_order.end(), random);
    std::shuffle(lane_order.begin(), lane_order.end(), random);
    bool any = false;
    for (unsigned warp : warp_order)
      for (bool again = true; again;) {
        again = false;
        for (unsigned lane : lane_order) {
          const size_t id = warp * 32 + lane;
          if (id >= fibres.size() || fibres[id]->state != State::kReady) continue;
          resume(*fibres[id]);
          any = true;
          again = !options.interleave;
        }
      }
    if (any) continue;
    const auto count = [&](State s) {
      return size_t(std::count_if(fibres.begin(), fibres.end(), [s](Fibre* f) { return f->state == s; }));
    };
    if (count(State::kExited) == fibres.size()) return;
    if (count(State::kAtBarrier) < fibres.size()) fail("deadlock: " + who_waits_where());
    for (Fibre* fibre : fibres)
      if (!same(fibre->waits_at, fibres[0]->waits_at)) fail("divergent barrier: " + who_waits_where());
    for (Fibre* fibre : fibres) fibre->state = State::kReady;
    block->barrier = new_order();
  }
}

template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 threads, size_t shared_bytes, A&&... arguments) {
  const std::lock_guard<std::mutex> lock(launching);
  Quiet quiet;
  const uint64_t count = uint64_t(threads.x) * threads.y * threads.z, blocks = uint64_t(grid.x) * grid.y * grid.z;
  if (count == 0 || count > 1024 || threads.z > 64) fail("blocks of " + std::to_string(count) + " threads");
  if (blocks == 0 || grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535) fail("a grid that CUDA refuses");
  if (shared_bytes > options.shared_limit)
    fail(std::to_string(shared_bytes) + " bytes of shared memory, at most " + std::to_string(options.shared_limit));
  if (blocks > (64u << 20)) fail("a grid of " + std::to_string(blocks) + " blocks is too much for the emulator");

  gridDim = grid;
  blockDim = threads;
  Block state;
  // Parameters are converted once, as by a launch; each thread has its own copy.
  state.kernel = [kernel, parameters = std::tuple<std::remove_cv_t<P>...>(std::forward<A>(arguments)...)] {
    std::apply(kernel, parameters);
  };
  block = &state;
  struct Cleanup {
    bool finished = false;
    ~Cleanup() {
      block->abandoned = !finished;
      for (Fibre* fibre : block->fibres)
        if (fibre && fibre->state != State::kExited) {
          block->current = fibre;
          switch_to(scheduler, fibre->context);
        }
      acquire(&block->finished);
      block->free_shared();
      block = nullptr;
    }
  } cleanup;
#if defined(__SANITIZE_THREAD__)
  scheduler.tsan_fibre = __tsan_get_current_fiber();
  constexpr int kSets = 2;  // of fibres in turn, lest two blocks that race look like one thread after the other
#else
  constexpr int kSets = 1;
#endif
  while (fibre_pool.size() < kSets * count) fibre_pool.push_back(std::make_unique<Fibre>());

  std::mt19937_64 random(options.seed);
  std::vector<uint32_t> order(blocks);
  for (uint32_t i = 0; i < blocks; i++) order[i] = i;
  std::shuffle(order.begin(), order.end(), random);
  state.fibres.resize(count);
  state.shared_bytes = shared_bytes;
  const size_t allocated = shared_bytes + kMaxPieces * kRedZone;
  release(&state.launched);
  for (uint32_t turn = 0; turn < blocks; turn++) {
    const uint32_t id = order[turn];
    blockIdx = dim3(id % grid.x, id / grid.x % grid.y, id / grid.x / grid.y);
    state.warps.assign((count + 31) / 32, {});
    state.barrier = new_order();
    state.pieces.clear();
    // All ones are NaN in every float format; other garbage finds what a NaN hides, such as a maximum.
    state.garbage = options.seed % 2 ? static_cast<unsigned char>(random()) : 0xFF;
    // Memory of its own for each block: to the race detector, too, it is not what the last block used.
    state.free_shared();
    state.shared = static_cast<char*>(::operator new[](allocated, std::align_val_t(128)));
    std::memset(state.shared, state.garbage, allocated);
    poison(state.shared, allocated);
    for (unsigned i = 0; i < count; i++) {
      Fibre& fibre = *fibre_pool[turn % kSets * count + i];
      fibre.id = i;
      fibre.index = dim3(i % threads.x, i / threads.x % threads.y, i / threads.x / threads.y);
      fibre.state = State::kReady;
      fibre.copies.assign(1, {});
      state.fibres[i] = &fibre;
    }
    run_block(random);
    check_red_zones();
  }
  cleanup.finished = true;
}

// Pieces of the dynamic shared memory, 16-byte aligned. All threads take the same pieces.
class SmemCarver {
 public:
  template <class T>
  T* take(size_t count, const Site& at = Site::current()) {
    Quiet quiet;
    auto& pieces = block->pieces;
    offset_ = (offset_ + 15) / 16 * 16;
    const Piece piece{offset_ + taken_ * kRedZone, count * sizeof(T)};
    offset_ += piece.bytes;
    if (offset_ > block->shared_bytes)
      fail("SmemCarver (" + show(at) + "): " + std::to_string(offset_) + " bytes taken, " + std::to_string(block->shared_bytes) +
           " launched");
    if (taken_ == kMaxPieces) fail("SmemCarver (" + show(at) + "): too many pieces");
    if (taken_ == pieces.size()) {
      pieces.push_back(piece);
      unpoison(block->shared + piece.offset, piece.bytes);
    } else if (pieces[taken_].offset != piece.offset || pieces[taken_].bytes != piece.bytes) {
      fail("SmemCarver (" + show(at) + "): threads take different pieces");
    }
    taken_++;
    return reinterpret_cast<T*>(block->shared + piece.offset);
  }

 private:
  size_t offset_ = 0, taken_ = 0;
};

}  // namespace emu

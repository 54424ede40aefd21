// What csrc/cuda asks of CUDA, for g++: the very same kernels run on the CPU, for tests. Every CUDA
// thread is a fiber; the blocks of a grid run one after another, and the fibers of a block take
// turns, each from one meeting point (__syncthreads, a shuffle) to the next. With host_reverse the
// last thread goes first: a missing barrier then shows in one order or the other. A block whose
// threads cannot all go on is a deadlock and ends the process.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one after another

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream;
};

namespace cuda_host {

constexpr int kWarpSize = 32;
inline bool host_reverse = false;

// Where a stack goes on. swapcontext sets the signal mask, which takes two calls of the system: it
// enters a fiber, and what follows are jumps (but where AddressSanitizer watches, which sees each
// jump as the end of a function).
struct Context {
  ucontext_t context;
  jmp_buf place;
  bool entered = false;
};

inline void switch_to(Context& from, Context& to) {
#if defined(__SANITIZE_ADDRESS__)
  swapcontext(&from.context, &to.context);
#else
  if (_setjmp(from.place)) return;
  if (to.entered) _longjmp(to.place, 1);
  to.entered = true;
  setcontext(&to.context);
#endif
}

struct Fiber {
  Context context;
  char* stack = nullptr;
  bool done = false;
  int waits_for = 0;  // the generation of its meeting point that it has to see
  int* generation = nullptr;
  int shuffles = 0;
  void* fake_stack = nullptr;
};

struct Meeting {
  int arrived = 0, generation = 0;
  bool votes[3] = {};  // of this generation, the next and the last
};

struct Block {
  std::vector<Fiber> fibers;
  Meeting all;
  std::vector<Meeting> warps;
  std::vector<uint64_t> lanes;  // two rounds of one word a thread
  Context scheduler;
  int current = 0;
  std::function<void()> body;
};
inline Block* block = nullptr;

constexpr size_t kStack = 64 * 1024;
inline std::vector<std::unique_ptr<char[]>> stacks;  // the next block uses them again

inline char* stack_of(size_t thread) {
  if (thread == stacks.size()) stacks.emplace_back(new char[kStack]);
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stacks[thread].get(), kStack);
#endif
  return stacks[thread].get();
}

inline const void* scheduler_stack;
inline size_t scheduler_size;
inline void* scheduler_fake;

inline void enter_fiber([[maybe_unused]] Fiber& fiber) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &scheduler_stack, &scheduler_size);
#endif
}

inline void yield() {
  Fiber& fiber = block->fibers[block->current];
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(fiber.done ? nullptr : &fiber.fake_stack, scheduler_stack,
                                 scheduler_size);
#endif
  switch_to(fiber.context, block->scheduler);
  enter_fiber(fiber);
}

inline void trampoline() {
  Fiber& fiber = block->fibers[block->current];
  enter_fiber(fiber);
  block->body();
  fiber.done = true;
  yield();
}

// Whether any of those who meet says so.
inline bool meet(Meeting& point, int size, bool vote = false) {
  const int seen = point.generation;
  bool& here = point.votes[seen % 3];
  here = here || vote;
  point.votes[(seen + 1) % 3] = false;
  if (++point.arrived == size) {
    point.arrived = 0;
    ++point.generation;
    return here;
  }
  Fiber& fiber = block->fibers[block->current];
  fiber.waits_for = seen + 1;
  fiber.generation = &point.generation;
  yield();
  return here;
}

// The value of the lane that `source` names, which is the thread's own where that is none.
template <typename T, typename Source>
T shuffle(T value, const Source& source_of) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  const int thread = block->current, threads = static_cast<int>(block->fibers.size());
  uint64_t* lanes = &block->lanes[(block->fibers[thread].shuffles++ % 2) * threads];
  std::memcpy(lanes + thread, &value, sizeof(T));
  meet(block->warps[thread / kWarpSize], kWarpSize);
  const int lane = thread % kWarpSize, wanted = source_of(lane);
  const int source = wanted >= 0 && wanted < kWarpSize ? thread - lane + wanted : thread;
  T result;
  std::memcpy(&result, lanes + source, sizeof(T));
  return result;
}

inline void run_block(int threads, const std::function<void()>& body) {
  Block here;
  here.fibers = std::vector<Fiber>(threads);
  here.warps.resize(threads / kWarpSize);
  here.lanes.resize(2 * threads);
  here.body = body;
  block = &here;
  here.scheduler.entered = true;
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = here.fibers[i];
    fiber.stack = stack_of(i);
    ucontext_t& start = fiber.context.context;
    getcontext(&start);
    start.uc_stack.ss_sp = fiber.stack;
    start.uc_stack.ss_size = kStack;
    makecontext(&start, trampoline, 0);
  }
  for (int left = threads; left > 0;) {
    bool moved = false;
    for (int i = 0; i < threads; ++i) {
      const int thread = host_reverse ? threads - 1 - i : i;
      Fiber& fiber = here.fibers[thread];
      if (fiber.done || (fiber.generation && *fiber.generation < fiber.waits_for)) continue;
      here.current = thread;
      threadIdx = dim3(static_cast<unsigned>(thread), 0, 0);
#if defined(__SANITIZE_ADDRESS__)
      __sanitizer_start_switch_fiber(&scheduler_fake, fiber.stack, kStack);
#endif
      switch_to(here.scheduler, fiber.context);
#if defined(__SANITIZE_ADDRESS__)
      __sanitizer_finish_switch_fiber(scheduler_fake, nullptr, nullptr);
#endif
      moved = true;
      left -= fiber.done;
    }
    if (!moved) {
      std::fprintf(stderr, "deadlock: a thread has left before a barrier of its block\n");
      std::abort();
    }
  }
  block = nullptr;
}

}  // namespace cuda_host

inline void __syncthreads() {
  cuda_host::meet(cuda_host::block->all, static_cast<int>(blockDim.x));
}

inline int __syncthreads_or(int vote) {
  return cuda_host::meet(cuda_host::block->all, static_cast<int>(blockDim.x), vote != 0);
}

inline int atomicOr(int* to, int bits) {
  const int before = *to;
  *to |= bits;
  return before;
}

template <typename T>
T __shfl_down_sync(unsigned, T value, int step) {
  return cuda_host::shuffle(value, [=](int lane) { return lane + step; });
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return cuda_host::shuffle(value, [=](int lane) { return lane ^ mask; });
}

// A quotient within 2 units in the last place; off by as much here, so that nobody relies on more.
inline float __fdividef(float x, float y) { return x / y * (1.0f + 0x1p-23f); }

template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               const Args&... args) {
  gridDim = config->gridDim, blockDim = config->blockDim;
  if (gridDim.x == 0 || gridDim.x >> 31 || gridDim.y == 0 || gridDim.y > 65535 || blockDim.x == 0 ||
      blockDim.x % cuda_host::kWarpSize != 0 || blockDim.x > 1024) {
    return cudaErrorInvalidValue;
  }
  for (unsigned y = 0; y < gridDim.y; ++y) {
    for (unsigned x = 0; x < gridDim.x; ++x) {
      blockIdx = dim3(x, y, 0);
      cuda_host::run_block(static_cast<int>(blockDim.x), [&] { kernel(args...); });
    }
  }
  return cudaSuccess;
}

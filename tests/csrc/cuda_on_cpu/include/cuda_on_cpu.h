// Enough of CUDA to run the kernels of csrc/ on a CPU, for their tests: the threads of a block are fibers of one OS thread that switch at
// barriers and warp operations, blocks run one after another. Not modelled: memory ordering within a warp's step, speed.
// Threads run in ascending or descending order (M2_CUDA_ORDER=descending), so that a missing barrier shows in one of the two.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __shared__ static thread_local
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

template <typename A, typename B>
std::common_type_t<A, B> min(A a, B b) { return a < b ? a : b; }
template <typename A, typename B>
std::common_type_t<A, B> max(A a, B b) { return a > b ? a : b; }

namespace cuda_on_cpu {

constexpr unsigned kWarp = 32;
constexpr size_t kStack = 64 * 1024, kShared = 228 * 1024;

// Threads that meet; `round` counts their meetings.
struct Barrier {
  unsigned arrived = 0, round = 0;
};

struct Thread {
  jmp_buf place;
  std::unique_ptr<char[]> stack;
  bool started = false, done = false;
  Barrier* waiting = nullptr;
  unsigned round = 0;
};

struct Warp {
  Barrier barrier;
  alignas(16) char slots[kWarp][64];    // what lanes show each other
  alignas(16) float scratch[3][256];    // fragments of a warp's matrix product
};

struct Block {
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<Barrier> warpgroups;
  Barrier barrier;
  jmp_buf scheduler;
  unsigned count = 0, current = 0, alive = 0;
  std::function<void()> kernel;
  std::string failure;
};

inline thread_local Block* block = nullptr;
alignas(1024) inline thread_local char shared_memory[kShared];

inline unsigned linear_thread() { return block->current; }
inline Warp& warp() { return block->warps[block->current / kWarp]; }
inline unsigned lane() { return block->current % kWarp; }

inline void yield() {
  if (_setjmp(block->threads[block->current].place) == 0) _longjmp(block->scheduler, 1);
}

inline void leave() {
  block->threads[block->current].done = true;
  --block->alive;
  _longjmp(block->scheduler, 1);
}

inline void meet(Barrier& barrier, unsigned count) {
  if (++barrier.arrived == count) {
    barrier.arrived = 0;
    ++barrier.round;
    return;
  }
  Thread& me = block->threads[block->current];
  me.waiting = &barrier, me.round = barrier.round;
  yield();
  me.waiting = nullptr;
}

inline void fail(const char* condition) {
  if (block->failure.empty()) block->failure = condition;
  leave();
}

inline void run_fiber() {
  block->kernel();
  leave();
}

// Goes on with a fiber until it waits or ends. Only a fiber's start needs a context: switching contexts is a system call.
inline void resume(Thread& t) {
  if (_setjmp(block->scheduler)) return;
  if (t.started) _longjmp(t.place, 1);
  t.started = true;
  ucontext_t context{};
  getcontext(&context);
  context.uc_stack.ss_sp = t.stack.get();
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, run_fiber, 0);
  setcontext(&context);
}

// One block, to its end. A round in which nobody could go on is a deadlock: a barrier that some threads never reach.
inline void run_block(Block& b) {
  static const bool descending = [] {
    const char* order = std::getenv("M2_CUDA_ORDER");
    return order && std::string(order) == "descending";
  }();
  const unsigned count = b.count;
  b.barrier = {};
  b.alive = count;
  for (Warp& w : b.warps) w.barrier = {};
  for (Thread& t : b.threads) t.started = t.done = false, t.waiting = nullptr;
  while (b.alive) {
    bool moved = false;
    for (unsigned n = 0; n < count; ++n) {
      const unsigned i = descending ? count - 1 - n : n;
      Thread& t = b.threads[i];
      if (t.done || (t.waiting && t.waiting->round == t.round)) continue;
      moved = true;
      b.current = i;
      threadIdx = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y);
      resume(t);
    }
    if (!moved && b.alive) {
      if (b.failure.empty()) b.failure = "deadlock: some threads wait at a barrier that others never reach";
      break;  // the fibers that wait are dropped with their stacks
    }
  }
}

template <typename Kernel, typename... Arguments>
void launch(dim3 grid, dim3 threads, size_t shared_bytes, int, Kernel kernel, Arguments... arguments) {
  const unsigned count = threads.x * threads.y * threads.z;
  TORCH_CHECK(count > 0 && count <= 1024, "launch: ", count, " threads");
  TORCH_CHECK(grid.x > 0 && grid.y > 0 && grid.z > 0 && grid.y < 65536 && grid.z < 65536, "launch: a grid of ", grid.x, ", ", grid.y);
  TORCH_CHECK(shared_bytes <= 227 * 1024, "launch: ", shared_bytes, " bytes of shared memory");
  static thread_local Block b;
  block = &b;
  b.failure.clear();
  b.count = count;
  while (b.threads.size() < count) b.threads.push_back({{}, std::unique_ptr<char[]>(new char[kStack])});
  b.warps.resize((count + kWarp - 1) / kWarp);
  b.warpgroups.assign((count + 127) / 128, {});
  b.kernel = [=] { kernel(arguments...); };
  blockDim = threads, gridDim = grid;
  for (unsigned z = 0; z < grid.z && b.failure.empty(); ++z) {
    for (unsigned y = 0; y < grid.y && b.failure.empty(); ++y) {
      for (unsigned x = 0; x < grid.x && b.failure.empty(); ++x) {
        blockIdx = dim3(x, y, z);
        std::memset(shared_memory, 0xff, shared_bytes);  // NaN: nothing may be read before it is written
        run_block(b);
      }
    }
  }
  TORCH_CHECK_VALUE(b.failure.empty(), "device assert: ", b.failure);
}

// Waits until a barrier's round is no longer `round`.
inline void wait_round(Barrier& barrier, unsigned round) {
  if (barrier.round != round) return;
  Thread& me = block->threads[block->current];
  me.waiting = &barrier, me.round = round;
  yield();
  me.waiting = nullptr;
}

// Every lane shows a value; take(of) reads the lane `of`.
template <typename T, typename Take>
auto exchange(T mine, Take take) {
  static_assert(sizeof(T) <= 64);
  Warp& w = warp();
  std::memcpy(w.slots[lane()], &mine, sizeof(T));
  meet(w.barrier, kWarp);
  const auto result = take([&w](unsigned of) {
    T other;
    std::memcpy(&other, w.slots[of], sizeof(T));
    return other;
  });
  meet(w.barrier, kWarp);
  return result;
}

}  // namespace cuda_on_cpu

#undef CUDA_KERNEL_ASSERT
#define CUDA_KERNEL_ASSERT(condition) \
  do { \
    if (!(condition)) ::cuda_on_cpu::fail(#condition); \
  } while (false)

inline void __syncthreads() { cuda_on_cpu::meet(cuda_on_cpu::block->barrier, cuda_on_cpu::block->count); }
inline void __syncwarp(unsigned = 0xffffffffu) { cuda_on_cpu::meet(cuda_on_cpu::warp().barrier, cuda_on_cpu::kWarp); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  const unsigned from = cuda_on_cpu::lane() ^ static_cast<unsigned>(mask);
  return cuda_on_cpu::exchange(value, [from](auto of) { return of(from); });
}
template <typename T>
T __shfl_sync(unsigned, T value, int from) {
  return cuda_on_cpu::exchange(value, [from](auto of) { return of(static_cast<unsigned>(from) % 32); });
}
inline unsigned __reduce_max_sync(unsigned, unsigned value) {
  return cuda_on_cpu::exchange(value, [](auto of) {
    unsigned best = of(0);
    for (unsigned i = 1; i < 32; ++i) best = std::max(best, of(i));
    return best;
  });
}
inline unsigned __reduce_min_sync(unsigned, unsigned value) {
  return cuda_on_cpu::exchange(value, [](auto of) {
    unsigned best = of(0);
    for (unsigned i = 1; i < 32; ++i) best = std::min(best, of(i));
    return best;
  });
}
inline unsigned __match_any_sync(unsigned, int value) {
  return cuda_on_cpu::exchange(value, [value](auto of) {
    unsigned same = 0;
    for (unsigned i = 0; i < 32; ++i) same |= (of(i) == value) << i;
    return same;
  });
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }

template <typename T>
T atomicAdd(T* to, T value) {
  const T before = *to;
  *to += value;
  return before;
}

inline float __fdividef(float a, float b) { return a / b; }
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
using std::isnan;

// ---- the runtime --------------------------------------------------------------------------------------------------------------------

using cudaStream_t = int;
enum { cudaDevAttrMultiProcessorCount, cudaFuncAttributeMaxDynamicSharedMemorySize };
inline int cudaDeviceGetAttribute(int* value, int, int) { return *value = 2, 0; }
template <typename Kernel>
int cudaFuncSetAttribute(Kernel, int, int bytes) { return bytes <= 227 * 1024 ? 0 : 1; }
#define C10_CUDA_CHECK(call) TORCH_CHECK((call) == 0, #call)
#define C10_CUDA_KERNEL_LAUNCH_CHECK() static_cast<void>(0)
namespace cuda_on_cpu {
// at::mm with an output type, which the CPU has not.
inline at::Tensor mm(const at::Tensor& a, const at::Tensor& b, at::ScalarType type) { return a.to(type).matmul(b.to(type)); }
}  // namespace cuda_on_cpu
namespace c10::cuda {
struct CUDAGuard {
  explicit CUDAGuard(const c10::Device&) {}
};
inline int getCurrentCUDAStream() { return 0; }
inline int current_device() { return 0; }
}  // namespace c10::cuda
#include "ipc_on_cpu.h"

// csrc/common/hopper.cuh for a CPU: what the PTX ISA says of barriers, swizzled copies and warpgroup products.
#pragma once
#include <c10/util/Float8_e4m3fn.h>

#include "cuda_on_cpu.h"

namespace m2 {

constexpr int kWarpgroup = 128;

struct mbarrier_t {
  cuda_on_cpu::Barrier barrier;
  unsigned count, pending;  // arrivals of a phase, and those still to come
  int64_t bytes;            // still to come

  void settle() {
    if (pending || bytes) return;
    pending = count;
    ++barrier.round;
  }
};

struct TensorMap {
  const char* data;
  int64_t rows, columns, stride;
  int box_rows;
};

inline TensorMap map_of(const void* data, int64_t rows, int64_t columns, int64_t stride, int box_rows) {
  TORCH_CHECK(stride % 16 == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0, "map_of: not in multiples of 16 bytes");
  TORCH_CHECK(rows > 0 && columns > 0 && box_rows <= 256, "map_of: [", rows, ", ", columns, "]");
  return {static_cast<const char*>(data), rows, columns, stride, box_rows};
}

inline void mbarrier_init(mbarrier_t* b, int arrivals) { *b = {{}, static_cast<unsigned>(arrivals), static_cast<unsigned>(arrivals), 0}; }
inline void mbarrier_init_done() {}
inline void mbarrier_arrive(mbarrier_t* b) {
  if (b->pending-- == 0) cuda_on_cpu::fail("mbarrier: more arrivals than it counts");
  b->settle();
}
inline void mbarrier_arrive_expecting(mbarrier_t* b, int bytes) {
  b->bytes += bytes;
  mbarrier_arrive(b);
}
// The phase under way has the parity of its round; the one before it is over.
inline void mbarrier_wait(mbarrier_t* b, uint32_t parity) {
  if ((b->barrier.round & 1) == parity) cuda_on_cpu::wait_round(b->barrier, b->barrier.round);
}

inline int64_t swizzled(int64_t address) { return address ^ (address >> 7 & 7) << 4; }

inline void copy_box(void* to, const TensorMap* map, mbarrier_t* barrier, int column, int row) {
  const int64_t start = static_cast<char*>(to) - cuda_on_cpu::shared_memory;
  if (start % 1024) cuda_on_cpu::fail("copy_box: a swizzled box starts at a multiple of 1024 bytes");
  for (int r = 0; r < map->box_rows; ++r) {
    for (int c = 0; c < 128; ++c) {
      const bool inside = row + r < map->rows && column + c < map->columns;
      cuda_on_cpu::shared_memory[swizzled(start + r * 128 + c)] = inside ? map->data[(row + r) * map->stride + column + c] : 0;
    }
  }
  barrier->bytes -= map->box_rows * 128;
  barrier->settle();
}

inline void prefetch_map(const TensorMap*) {}

inline uint64_t matrix_descriptor(const void* start) { return static_cast<const char*>(start) - cuda_on_cpu::shared_memory; }

inline void meet_warpgroup() {
  cuda_on_cpu::meet(cuda_on_cpu::block->warpgroups[cuda_on_cpu::linear_thread() / kWarpgroup], kWarpgroup);
}

inline void wgmma_begin() { meet_warpgroup(); }
template <int N>
void wgmma_finish(float (&)[N]) { meet_warpgroup(); }

inline float code_at(uint64_t matrix, int row, int term) {
  const int64_t address = swizzled(static_cast<int64_t>(matrix) + row / 8 * 1024 + row % 8 * 128 + term);
  return c10::Float8_e4m3fn(static_cast<uint8_t>(cuda_on_cpu::shared_memory[address]), c10::Float8_e4m3fn::from_bits());
}

inline void wgmma_e4m3(float (&sums)[64], uint64_t a, uint64_t b, bool add) {
  meet_warpgroup();
  const int thread = static_cast<int>(cuda_on_cpu::linear_thread()) % kWarpgroup;
  for (int r = 0; r < 2; ++r) {
    const int row = thread / 32 * 16 + thread % 32 / 4 + 8 * r;
    float left[32];
    for (int k = 0; k < 32; ++k) left[k] = code_at(a, row, k);
    for (int i = 0; i < 16; ++i) {
      for (int c = 0; c < 2; ++c) {
        float& sum = sums[4 * i + 2 * r + c];
        float total = add ? sum : 0.0f;
        for (int k = 0; k < 32; ++k) total += left[k] * code_at(b, 8 * i + thread % 4 * 2 + c, k);
        sum = total;
      }
    }
  }
  meet_warpgroup();
}

template <int kCount>
void more_registers() {}
template <int kCount>
void fewer_registers() {}

}  // namespace m2

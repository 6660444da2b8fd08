// What Hopper's FP8 products share: a ring of stages that the copy engine fills, tiles of 128 rows, sums in registers and their way out.
// Include ../common/hopper.cuh first.
// Shape suffixes: R rows grouped by expert, E experts.
#pragma once

#include <c10/util/BFloat16.h>

#include "../common/warp.cuh"
#include "grouped_gemm_fp8.h"

namespace m2::grouped_gemm {

using bf16 = c10::BFloat16;

constexpr int kTile = 128;
constexpr int kBytes = kTile * static_cast<int>(kScaleBlock);  // of an operand's tile
constexpr int kMultiplying = 2;                                // warpgroups, 64 rows each
constexpr int kThreads = (kMultiplying + 1) * kWarpgroup;

// Which stage comes next, and the parity of its barriers.
template <int kStages>
struct Stage {
  int index = 0;
  uint32_t parity = 0;
  __device__ void next() {
    if (++index == kStages) index = 0, parity ^= 1;
  }
};

// The ring in shared memory: each stage has a tile of every operand, a barrier that counts its bytes and one that counts its readers.
template <int kStages, int kOperands>
struct Ring {
  static constexpr int kSharedBytes = kStages * (kOperands * kBytes + 2 * static_cast<int>(sizeof(mbarrier_t)));
  uint8_t* tiles;
  mbarrier_t *full, *empty;

  __device__ explicit Ring(char* memory)
      : tiles(reinterpret_cast<uint8_t*>(memory)),
        full(reinterpret_cast<mbarrier_t*>(tiles + kStages * kOperands * kBytes)),
        empty(full + kStages) {}

  // By the whole block, before anything else.
  __device__ void set_up() const {
    if (threadIdx.x == 0) {
      for (int i = 0; i < kStages; ++i) {
        mbarrier_init(full + i, 1);
        mbarrier_init(empty + i, kMultiplying * kWarpgroup / kWarpSize);
      }
      mbarrier_init_done();
    }
    __syncthreads();
  }
  __device__ uint8_t* tile(int stage, int operand) const { return tiles + (stage * kOperands + operand) * kBytes; }

  // The copying thread: waits until the stage has been read; copies of all its operands follow.
  __device__ void begin_copies(Stage<kStages> stage) const {
    mbarrier_wait(empty + stage.index, stage.parity ^ 1);
    mbarrier_arrive_expecting(full + stage.index, kOperands * kBytes);
  }
  // A multiplying warp.
  __device__ void wait(Stage<kStages> stage) const { mbarrier_wait(full + stage.index, stage.parity); }
  __device__ void release(Stage<kStages> stage) const {
    if (threadIdx.x % kWarpSize == 0) mbarrier_arrive(empty + stage.index);
  }
};

// product [64, 128] of this warpgroup: its rows of left times right^T, over one block of terms.
__device__ inline void multiply_block(const uint8_t* left, const uint8_t* right, float (&product)[64]) {
  left += threadIdx.x / kWarpgroup * (kBytes / kMultiplying);
  wgmma_begin();
#pragma unroll
  for (int k = 0; k < kScaleBlock; k += 32) wgmma_e4m3(product, matrix_descriptor(left + k), matrix_descriptor(right + k), k > 0);
  wgmma_finish(product);
}

// Where this thread's sums lie: rows `row` and `row + 8` of the tile, columns 8 i + `column` and the one after.
struct Place {
  int row, column;
  __device__ Place()
      : row(threadIdx.x / kWarpSize * 16 + threadIdx.x % kWarpSize / 4),  // a warp has 16 rows, a warpgroup 64
        column(threadIdx.x % 4 * 2) {}
};

// The first group that ends after the row.
__device__ inline int group_of(const int32_t* ends_E, int groups, int row) {
  int low = 0, high = groups;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (ends_E[middle] > row) high = middle;
    else low = middle + 1;
  }
  return low;
}

__device__ inline uint32_t pack(float low, float high) { return bf16(low).x | static_cast<uint32_t>(bf16(high).x) << 16; }

__device__ inline uint32_t pick(const uint32_t (&from)[4], int i) {
  return i & 2 ? (i & 1 ? from[3] : from[2]) : (i & 1 ? from[1] : from[0]);
}

// Four neighbouring threads hold a piece of each of four groups of 8 columns, piece q in thread q. They swap: thread q then has all four
// pieces of group q, in order.
__device__ inline void swap_in_quad(const uint32_t (&mine)[4], uint32_t (&group)[4]) {
  const int quad = threadIdx.x % 4;
  uint32_t came[4];
#pragma unroll
  for (int with = 0; with < 4; ++with) came[with] = __shfl_xor_sync(0xffffffffu, pick(mine, quad ^ with), with);
#pragma unroll
  for (int i = 0; i < 4; ++i) group[i] = pick(came, quad ^ i);
}

// Sums to bf16 rows of `ld`: `out` is the tile's first element, of which `rows` rows and `columns` (a multiple of 8) columns exist.
__device__ inline void write_tile(bf16* out, int64_t ld, int rows, int columns, Place place, const float (&sums)[64]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = place.row + 8 * r;
#pragma unroll
    for (int first = 0; first < 16; first += 4) {
      uint32_t mine[4], group[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) mine[i] = pack(sums[4 * (first + i) + 2 * r], sums[4 * (first + i) + 2 * r + 1]);
      swap_in_quad(mine, group);
      const int column = 8 * (first + threadIdx.x % 4);
      if (row < rows && column < columns)
        *reinterpret_cast<uint4*>(out + row * ld + column) = uint4{group[0], group[1], group[2], group[3]};
    }
  }
}

// ---- host -------------------------------------------------------------------------------------------------------------------------

inline void check_width(const char* name, int64_t width) {
  TORCH_CHECK_VALUE(width % 16 == 0, name, ": width ", width, ", need a multiple of 16 on a GPU");
}

inline TensorMap map_of_rows(const at::Tensor& x) {  // [.., rows, columns], rows side by side
  TORCH_CHECK_VALUE(reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0, "codes must start at a multiple of 16 bytes");
  return map_of(x.const_data_ptr(), x.numel() / std::max<int64_t>(1, x.size(-1)), x.size(-1), x.stride(-2), kTile);
}

// A device assert that groups ascend in multiples of 128 within the rows.
void assert_ends(const int32_t* ends_E, int64_t groups, int64_t rows);

}  // namespace m2::grouped_gemm

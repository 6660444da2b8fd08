// Grouped products of blockwise e4m3 on Hopper: tiles of 128 x 128, blocks of 128 terms copied in by the bulk copy engine and multiplied by
// two warpgroups, each block's fp32 sums then promoted: times both factors, added in registers (DeepSeek-V3, arXiv:2412.19437, 3.3.2;
// the schedule is DeepGEMM's: one warpgroup copies, persistent blocks). Both operands lie with their terms side by side.
// Shape suffixes: R rows grouped by expert, E experts, A and B the widths of a product's input and output, P and Q blocks of 128.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../common/hopper.cuh"
#include "fp8_tiles.cuh"

namespace m2::grouped_gemm {
namespace {

constexpr int kStages = 6;
using TileRing = Ring<kStages, 2>;

// ---- device -----------------------------------------------------------------------------------------------------------------------

// left [., terms] times right [., terms]^T, tile by tile.
struct Problem {
  const int32_t* ends_E;
  int groups, rows;   // rows: R
  int height, width;  // of an output matrix: R x B of a product, B x A of each group's weight gradient
  int terms;          // of a product
  const float *left_scale, *right_scale;
  int64_t scale_group, scale_column, scale_block;  // strides of right_scale of a product, in blocks
  bf16* out;

  __device__ int row_blocks() const { return (height + kTile - 1) / kTile; }
  __device__ int column_blocks() const { return (width + kTile - 1) / kTile; }
};

// One tile of the output: where its operands' boxes begin, which blocks of terms it adds up, which rows it writes.
struct Tile {
  int left_row, right_row, first_block, last_block;
  int group, row, column, last_row;
  int64_t out_row;  // of the output seen as one matrix of rows of `width`
};

// A product's rows: `right` holds the groups' matrices one under the other, each [width, terms]. Rows beyond the groups have no terms.
__device__ Tile product_tile(const Problem& p, int index) {
  const int row = index / p.column_blocks() * kTile, column = index % p.column_blocks() * kTile;
  const int group = group_of(p.ends_E, p.groups, row);
  const int blocks = group < p.groups ? static_cast<int>(blocks_of(p.terms)) : 0;
  return {row, group * p.width + column, 0, blocks, group, row, column, min(row + kTile, p.height), row};
}

// A weight's gradient: the terms are the group's rows.
__device__ Tile wgrad_tile(const Problem& p, int index) {
  const int per_group = p.row_blocks() * p.column_blocks(), group = index / per_group, in_group = index % per_group;
  const int row = in_group / p.column_blocks() * kTile, column = in_group % p.column_blocks() * kTile;
  const int begin = group ? p.ends_E[group - 1] : 0, end = p.ends_E[group];
  return {row,
          column,
          static_cast<int>(begin / kScaleBlock),
          static_cast<int>(end / kScaleBlock),
          group,
          row,
          column,
          min(row + kTile, p.height),
          static_cast<int64_t>(group) * p.height + row};
}

template <bool kWgrad>
__device__ Tile tile_of(const Problem& p, int index) {
  return kWgrad ? wgrad_tile(p, index) : product_tile(p, index);
}

template <bool kWgrad>
__device__ int tiles_of(const Problem& p) {
  return p.row_blocks() * p.column_blocks() * (kWgrad ? p.groups : 1);
}

// One thread: keeps the stages full.
template <bool kWgrad>
__device__ void copy_tiles(const Problem& p, const TensorMap* left, const TensorMap* right, TileRing ring) {
  Stage<kStages> stage;
  for (int i = blockIdx.x; i < tiles_of<kWgrad>(p); i += gridDim.x) {
    const Tile tile = tile_of<kWgrad>(p, i);
    for (int block = tile.first_block; block < tile.last_block; ++block, stage.next()) {
      const int term = block * static_cast<int>(kScaleBlock);
      ring.begin_copies(stage);
      copy_box(ring.tile(stage.index, 0), left, ring.full + stage.index, term, tile.left_row);
      copy_box(ring.tile(stage.index, 1), right, ring.full + stage.index, term, tile.right_row);
    }
  }
}

// sums += product * the factors of this block of terms.
template <bool kWgrad>
__device__ void promote(const Problem& p, const Tile& tile, Place place, int block, const float (&product)[64], float (&sums)[64]) {
  float left[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = min(tile.row + place.row + 8 * r, tile.last_row - 1);
    left[r] = kWgrad ? p.left_scale[static_cast<int64_t>(block) * p.height + row] : p.left_scale[row * blocks_of(p.terms) + block];
  }
  if (!kWgrad) {
    const float right = p.right_scale[tile.group * p.scale_group + tile.column / kScaleBlock * p.scale_column + block * p.scale_block];
    left[0] *= right, left[1] *= right;
  }
  const float* right_A = p.right_scale + static_cast<int64_t>(block) * p.width + tile.column;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    float2 right = make_float2(1.0f, 1.0f);
    if (kWgrad && tile.column + 8 * i < p.width) right = *reinterpret_cast<const float2*>(right_A + 8 * i + place.column);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sums[4 * i + 2 * r] += product[4 * i + 2 * r] * (left[r] * right.x);
      sums[4 * i + 2 * r + 1] += product[4 * i + 2 * r + 1] * (left[r] * right.y);
    }
  }
}

template <bool kWgrad>
__device__ void multiply_tiles(const Problem& p, TileRing ring) {
  const Place place;
  Stage<kStages> stage;
  for (int i = blockIdx.x; i < tiles_of<kWgrad>(p); i += gridDim.x) {
    const Tile tile = tile_of<kWgrad>(p, i);
    float sums[64] = {}, product[64];
    for (int block = tile.first_block; block < tile.last_block; ++block, stage.next()) {
      ring.wait(stage);
      multiply_block(ring.tile(stage.index, 0), ring.tile(stage.index, 1), product);
      ring.release(stage);
      promote<kWgrad>(p, tile, place, block, product, sums);
    }
    write_tile(p.out + tile.out_row * p.width + tile.column, p.width, tile.last_row - tile.row, p.width - tile.column, place, sums);
  }
}

template <bool kWgrad>
__global__ void __launch_bounds__(kThreads, 1)
    product_kernel(const __grid_constant__ TensorMap left, const __grid_constant__ TensorMap right, Problem p) {
  extern __shared__ __align__(1024) char memory[];
  const TileRing ring(memory);
  ring.set_up();
  if (threadIdx.x >= kMultiplying * kWarpgroup) {
    fewer_registers<40>();
    if (threadIdx.x == kMultiplying * kWarpgroup) copy_tiles<kWgrad>(p, &left, &right, ring);
  } else {
    more_registers<232>();
    multiply_tiles<kWgrad>(p, ring);
  }
}

// On its own: an assert's call would keep the products of the same kernel from overlapping (C7510).
__global__ void check_ends_kernel(const int32_t* ends_E, int groups, int rows) {
  for (int e = threadIdx.x; e < groups; e += blockDim.x) {
    const int begin = e ? ends_E[e - 1] : 0, end = ends_E[e];
    CUDA_KERNEL_ASSERT(begin <= end && end <= rows && end % kScaleBlock == 0 && "ends: need ascending multiples of 128 within the rows");
  }
}

// [matrices, rows, columns] of bytes -> [matrices, columns, rows], 64 x 64 at a time.
__global__ void transpose_kernel(const uint8_t* from, int rows, int columns, uint8_t* to) {
  __shared__ uint8_t tile[64][65];
  const int64_t matrix = static_cast<int64_t>(blockIdx.z) * rows * columns;
  const int first_row = blockIdx.y * 64, first_column = blockIdx.x * 64;
  for (int i = threadIdx.x; i < 64 * 64; i += blockDim.x) {
    const int r = first_row + i / 64, c = first_column + i % 64;
    if (r < rows && c < columns) tile[i / 64][i % 64] = from[matrix + static_cast<int64_t>(r) * columns + c];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < 64 * 64; i += blockDim.x) {
    const int r = first_row + i % 64, c = first_column + i / 64;
    if (r < rows && c < columns) to[matrix + static_cast<int64_t>(c) * rows + r] = tile[i % 64][i / 64];
  }
}

// ---- host -------------------------------------------------------------------------------------------------------------------------

at::Tensor transposed_matrices(const at::Tensor& w) {
  at::Tensor out = at::empty({w.size(0), w.size(2), w.size(1)}, w.options());
  if (w.numel() == 0) return out;
  const dim3 grid(static_cast<unsigned>((w.size(2) + 63) / 64), static_cast<unsigned>((w.size(1) + 63) / 64),
                  static_cast<unsigned>(w.size(0)));
  transpose_kernel<<<grid, 256, 0, c10::cuda::getCurrentCUDAStream()>>>(static_cast<const uint8_t*>(w.const_data_ptr()),
                                                                        static_cast<int>(w.size(1)), static_cast<int>(w.size(2)),
                                                                        static_cast<uint8_t*>(out.mutable_data_ptr()));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

// Codes by columns, column by column: as quantize_columns leaves them, or copied so.
at::Tensor by_columns(const at::Tensor& x) {
  const at::Tensor across = x.t();  // [W, R]
  if (across.stride(1) == 1 && across.stride(0) % 16 == 0 && across.stride(0) >= across.size(1)) return across;
  at::Tensor storage = at::empty({across.size(0), (across.size(1) + 15) / 16 * 16}, across.options());
  return storage.narrow(1, 0, across.size(1)).copy_(across);
}

template <bool kWgrad>
void run(const at::Tensor& left, const at::Tensor& right, const Problem& p, int64_t tiles) {
  int multiprocessors = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, c10::cuda::current_device()));
  C10_CUDA_CHECK(cudaFuncSetAttribute(product_kernel<kWgrad>, cudaFuncAttributeMaxDynamicSharedMemorySize, TileRing::kSharedBytes));
  const auto stream = c10::cuda::getCurrentCUDAStream();
  assert_ends(p.ends_E, p.groups, p.rows);
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(tiles, multiprocessors));
  product_kernel<kWgrad><<<blocks, kThreads, TileRing::kSharedBytes, stream>>>(map_of_rows(left), map_of_rows(right), p);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

at::Tensor grouped_mm_fp8(const at::Tensor& x_in, const at::Tensor& x_scale_in, const at::Tensor& w_in, const at::Tensor& w_scale_in,
                          const at::Tensor& ends, bool transposed) {
  const auto [groups, rows, depth, width] = check_product(x_in, x_scale_in, w_in, w_scale_in, ends, transposed);
  check_width("x", depth);
  check_width("w", width);
  const c10::cuda::CUDAGuard guard(x_in.device());
  const at::Tensor x = x_in.contiguous(), x_scale = x_scale_in.contiguous(), w_scale = w_scale_in.contiguous();
  const at::Tensor w = transposed ? w_in.contiguous() : transposed_matrices(w_in.contiguous());  // [E, width, depth]
  at::Tensor out = at::empty({rows, width}, x.options().dtype(at::kBFloat16));
  if (out.numel() == 0) return out;
  if (groups == 0) return out.zero_();
  const int64_t per_row = w_scale.size(2);
  const Problem p{ends.const_data_ptr<int32_t>(),  static_cast<int>(groups),        static_cast<int>(rows),
                  static_cast<int>(rows),          static_cast<int>(width),         static_cast<int>(depth),
                  x_scale.const_data_ptr<float>(), w_scale.const_data_ptr<float>(), w_scale.size(1) * per_row,
                  transposed ? per_row : 1,        transposed ? 1 : per_row,        out.mutable_data_ptr<bf16>()};
  run<false>(x, w, p, blocks_of(rows) * blocks_of(width));
  return out;
}

at::Tensor grouped_wgrad_fp8(const at::Tensor& dy_in, const at::Tensor& dy_scale_in, const at::Tensor& x_in, const at::Tensor& x_scale_in,
                             const at::Tensor& ends) {
  const auto [groups, rows, out_width, in_width] = check_wgrad(dy_in, dy_scale_in, x_in, x_scale_in, ends);
  check_width("dy", out_width);
  check_width("x", in_width);
  const c10::cuda::CUDAGuard guard(dy_in.device());
  const at::Tensor dy = by_columns(dy_in), x = by_columns(x_in), dy_scale = dy_scale_in.contiguous(), x_scale = x_scale_in.contiguous();
  at::Tensor out = at::empty({groups, out_width, in_width}, dy.options().dtype(at::kBFloat16));
  if (out.numel() == 0) return out;
  if (rows == 0) return out.zero_();
  const Problem p{ends.const_data_ptr<int32_t>(),
                  static_cast<int>(groups),
                  static_cast<int>(rows),
                  static_cast<int>(out_width),
                  static_cast<int>(in_width),
                  0,
                  dy_scale.const_data_ptr<float>(),
                  x_scale.const_data_ptr<float>(),
                  0,
                  0,
                  0,
                  out.mutable_data_ptr<bf16>()};
  run<true>(dy, x, p, groups * blocks_of(out_width) * blocks_of(in_width));
  return out;
}

}  // namespace

void assert_ends(const int32_t* ends_E, int64_t groups, int64_t rows) {
  check_ends_kernel<<<1, 256, 0, c10::cuda::getCurrentCUDAStream()>>>(ends_E, static_cast<int>(groups), static_cast<int>(rows));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

TORCH_LIBRARY_IMPL(m2_ops, CUDA, m) {
  m.impl("grouped_mm_fp8", &grouped_mm_fp8);
  m.impl("grouped_wgrad_fp8", &grouped_wgrad_fp8);
}

}  // namespace m2::grouped_gemm

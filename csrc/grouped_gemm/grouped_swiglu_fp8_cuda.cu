// The experts' first product in FP8 on Hopper with SwiGLU in its epilogue: a tile of rows meets the same 128 columns of gate and of up, so
// that silu(gate) * up and the factor of its 128 columns are at hand before gate and up leave the registers.
// Shape suffixes: R rows grouped by expert, E experts, F expert width, P blocks of 128 columns.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../common/fp8.cuh"
#include "../common/hopper.cuh"
#include "fp8_tiles.cuh"

namespace m2::grouped_gemm {
namespace {

constexpr int kStages = 4;
using SwigluRing = Ring<kStages, 3>;

// ---- device -----------------------------------------------------------------------------------------------------------------------

struct Problem {
  const int32_t* ends_E;
  int groups, rows, width, blocks;    // width: F; blocks: of terms
  const float *x_scale_RP, *w_scale;  // w_scale [E, 2 F / 128, blocks]
  bf16* hidden_R2F;
  uint8_t* codes_RF;
  float* scales_RP;

  __device__ int columns() const { return width / kTile; }
  __device__ int tiles() const { return (rows + kTile - 1) / kTile * columns(); }
};

// Rows beyond the groups have no terms.
struct Tile {
  int row, column, group, blocks;
  __device__ Tile(const Problem& p, int index)
      : row(index / p.columns() * kTile),
        column(index % p.columns() * kTile),
        group(group_of(p.ends_E, p.groups, row)),
        blocks(group < p.groups ? p.blocks : 0) {}
};

__device__ void copy_tiles(const Problem& p, const TensorMap* x, const TensorMap* w, SwigluRing ring) {
  Stage<kStages> stage;
  for (int i = blockIdx.x; i < p.tiles(); i += gridDim.x) {
    const Tile tile(p, i);
    const int gate_row = tile.group * 2 * p.width + tile.column;
    for (int block = 0; block < tile.blocks; ++block, stage.next()) {
      const int term = block * static_cast<int>(kScaleBlock);
      ring.begin_copies(stage);
      copy_box(ring.tile(stage.index, 0), x, ring.full + stage.index, term, tile.row);
      copy_box(ring.tile(stage.index, 1), w, ring.full + stage.index, term, gate_row);
      copy_box(ring.tile(stage.index, 2), w, ring.full + stage.index, term, gate_row + p.width);
    }
  }
}

__device__ void add(const float (&product)[64], float upper, float lower, float (&sums)[64]) {
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    sums[4 * i] += product[4 * i] * upper, sums[4 * i + 1] += product[4 * i + 1] * upper;
    sums[4 * i + 2] += product[4 * i + 2] * lower, sums[4 * i + 3] += product[4 * i + 3] * lower;
  }
}

// Codes and factors of silu(gate) * up, whose bf16 values end up in gate.
__device__ void quantize_tile(const Problem& p, const Tile& tile, Place place, float (&gate)[64], const float (&up)[64]) {
  const int64_t scale_blocks = p.columns();
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int64_t row = tile.row + place.row + 8 * r;
    float largest = 0;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float& value = gate[4 * i + 2 * r + c];
        value = swiglu(rounded<bf16>(value), rounded<bf16>(up[4 * i + 2 * r + c]));
        largest = larger(largest, fabsf(value));
      }
    }
    for (int lane = 1; lane < 4; lane *= 2) largest = larger(largest, __shfl_xor_sync(0xffffffffu, largest, lane));  // the row's 4 threads
    const float factor = scale_of(largest);
    if (threadIdx.x % 4 == 0 && row < p.rows) p.scales_RP[row * scale_blocks + tile.column / kTile] = factor;
#pragma unroll
    for (int first = 0; first < 16; first += 4) {
      uint32_t mine[4], group[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* value = gate + 4 * (first + i) + 2 * r;
        mine[i] = code_of(value[0] / factor) | static_cast<uint32_t>(code_of(value[1] / factor)) << 8;
      }
      swap_in_quad(mine, group);
      const int column = tile.column + 8 * (first + static_cast<int>(threadIdx.x % 4));
      if (row < p.rows)
        *reinterpret_cast<uint2*>(p.codes_RF + row * p.width + column) = uint2{group[0] | group[1] << 16, group[2] | group[3] << 16};
    }
  }
}

__device__ void multiply_tiles(const Problem& p, SwigluRing ring) {
  const Place place;
  Stage<kStages> stage;
  for (int i = blockIdx.x; i < p.tiles(); i += gridDim.x) {
    const Tile tile(p, i);
    const int64_t ld = 2 * static_cast<int64_t>(p.width);
    // factors: of this thread's two rows, of the tile's columns of gate and of up
    const int last = p.rows - 1, upper = min(tile.row + place.row, last), lower = min(tile.row + place.row + 8, last);
    const float* x_scale = p.x_scale_RP;
    const float* gate_scale = p.w_scale + (tile.group * (ld / kTile) + tile.column / kTile) * p.blocks;
    const float* up_scale = gate_scale + static_cast<int64_t>(p.columns()) * p.blocks;
    float gate[64] = {}, up[64] = {}, product[64];
    for (int block = 0; block < tile.blocks; ++block, stage.next()) {
      ring.wait(stage);
      const float left[2] = {x_scale[upper * static_cast<int64_t>(p.blocks) + block],
                             x_scale[lower * static_cast<int64_t>(p.blocks) + block]};
      multiply_block(ring.tile(stage.index, 0), ring.tile(stage.index, 1), product);
      add(product, left[0] * gate_scale[block], left[1] * gate_scale[block], gate);
      multiply_block(ring.tile(stage.index, 0), ring.tile(stage.index, 2), product);
      ring.release(stage);
      add(product, left[0] * up_scale[block], left[1] * up_scale[block], up);
    }
    bf16* hidden = p.hidden_R2F + tile.row * ld + tile.column;
    write_tile(hidden, ld, p.rows - tile.row, kTile, place, gate);
    write_tile(hidden + p.width, ld, p.rows - tile.row, kTile, place, up);
    quantize_tile(p, tile, place, gate, up);
  }
}

__global__ void __launch_bounds__(kThreads, 1)
    swiglu_kernel(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w, Problem p) {
  extern __shared__ __align__(1024) char memory[];
  const SwigluRing ring(memory);
  ring.set_up();
  if (threadIdx.x >= kMultiplying * kWarpgroup) {
    fewer_registers<40>();
    if (threadIdx.x == kMultiplying * kWarpgroup) copy_tiles(p, &x, &w, ring);
  } else {
    more_registers<232>();
    multiply_tiles(p, ring);
  }
}

// ---- host -------------------------------------------------------------------------------------------------------------------------

std::tuple<at::Tensor, at::Tensor, at::Tensor> grouped_swiglu_fp8(const at::Tensor& x_in, const at::Tensor& x_scale_in,
                                                                  const at::Tensor& w_in, const at::Tensor& w_scale_in,
                                                                  const at::Tensor& ends) {
  const SwigluSizes s = check_swiglu(x_in, x_scale_in, w_in, w_scale_in, ends);
  check_width("x", s.depth);
  const c10::cuda::CUDAGuard guard(x_in.device());
  const at::Tensor x = x_in.contiguous(), x_scale = x_scale_in.contiguous(), w = w_in.contiguous(), w_scale = w_scale_in.contiguous();
  at::Tensor hidden = at::empty({s.rows, 2 * s.width}, x.options().dtype(at::kBFloat16));
  at::Tensor codes = at::empty({s.rows, s.width}, x.options()), scales = at::empty({s.rows, blocks_of(s.width)}, x_scale.options());
  if (hidden.numel() == 0) return {codes, scales, hidden};
  if (s.groups == 0) {
    codes.view(at::kByte).zero_();
    return {codes, scales.fill_(1.0), hidden.zero_()};
  }
  const Problem p{ends.const_data_ptr<int32_t>(),  static_cast<int>(s.groups),           static_cast<int>(s.rows),
                  static_cast<int>(s.width),       static_cast<int>(blocks_of(s.depth)), x_scale.const_data_ptr<float>(),
                  w_scale.const_data_ptr<float>(), hidden.mutable_data_ptr<bf16>(),      static_cast<uint8_t*>(codes.mutable_data_ptr()),
                  scales.mutable_data_ptr<float>()};
  int multiprocessors = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, c10::cuda::current_device()));
  C10_CUDA_CHECK(cudaFuncSetAttribute(swiglu_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SwigluRing::kSharedBytes));
  assert_ends(p.ends_E, s.groups, s.rows);
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(blocks_of(s.rows) * blocks_of(s.width), multiprocessors));
  swiglu_kernel<<<blocks, kThreads, SwigluRing::kSharedBytes, c10::cuda::getCurrentCUDAStream()>>>(map_of_rows(x), map_of_rows(w), p);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {codes, scales, hidden};
}

}  // namespace

TORCH_LIBRARY_IMPL(m2_ops, CUDA, m) { m.impl("grouped_swiglu_fp8", &grouped_swiglu_fp8); }

}  // namespace m2::grouped_gemm

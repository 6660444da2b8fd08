// Blockwise e4m3 on the GPU: a warp per row and 128 columns, a block per 128 x 128 where columns are quantised too, or weights.
// Codes by columns are laid out column by column, as the product over rows reads them.
// Shape suffixes: R rows, W width, F expert width, P blocks of 128 columns, Q blocks of 128 rows, T tokens.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../common/fp8.cuh"
#include "quantize.h"

namespace m2::quantize {
namespace {

using bf16 = c10::BFloat16;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kSide = static_cast<int>(kScaleBlock);
constexpr int kPerLane = kSide / kWarpSize;

// ---- device -----------------------------------------------------------------------------------------------------------------------

__device__ float warp_largest(float x) {
  for (int lane = kWarpSize / 2; lane > 0; lane /= 2) x = larger(x, __shfl_xor_sync(0xffffffffu, x, lane));
  return x;
}

// Up to 128 values by one warp, this lane's four to their codes; returns their factor, the same in every lane.
__device__ float quantize_four(const float (&x)[kPerLane], uint8_t (&codes)[kPerLane]) {
  float largest = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) largest = larger(largest, fabsf(x[i]));
  const float factor = scale_of(warp_largest(largest));
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) codes[i] = code_of(x[i] / factor);
  return factor;
}

// The block of `count` values of a row of which this lane has four neighbours.
__device__ void quantize_row_block(int count, const float (&x)[kPerLane], uint8_t* codes, float* scale) {
  const int lane = threadIdx.x % kWarpSize, first = lane * kPerLane;
  uint8_t mine[kPerLane];
  const float factor = quantize_four(x, mine);
  if (lane == 0) *scale = factor;
  if (count == kSide && reinterpret_cast<uintptr_t>(codes) % kPerLane == 0) {
    uint32_t all = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) all |= static_cast<uint32_t>(mine[i]) << (8 * i);
    *reinterpret_cast<uint32_t*>(codes + first) = all;
  } else {
    for (int i = 0; i < kPerLane; ++i)
      if (first + i < count) codes[first + i] = mine[i];
  }
}

// Four neighbours of a row, those from `count` on 0.
__device__ void load_four(const bf16* from, int count, float (&x)[kPerLane]) {
  if (count >= kPerLane && reinterpret_cast<uintptr_t>(from) % (kPerLane * sizeof(bf16)) == 0) {
    const uint2 bits = *reinterpret_cast<const uint2*>(from);
    x[0] = __uint_as_float(bits.x << 16), x[1] = __uint_as_float(bits.x & 0xffff0000u);
    x[2] = __uint_as_float(bits.y << 16), x[3] = __uint_as_float(bits.y & 0xffff0000u);
  } else {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) x[i] = i < count ? static_cast<float>(from[i]) : 0.0f;
  }
}

// token_R: the row of x that each row is, -1 for zeros (none: its own).
__global__ void rows_kernel(const bf16* x_TW, const int32_t* token_R, int64_t tokens, int64_t rows, int64_t width, uint8_t* codes_RW,
                            float* scales_RP) {
  const int64_t blocks = (width + kSide - 1) / kSide, i = blockIdx.x * int64_t{kWarps} + threadIdx.x / kWarpSize;
  if (i >= rows * blocks) return;  // the same for a whole warp
  const int64_t r = i / blocks, first = i % blocks * kSide, token = token_R ? token_R[r] : r;
  CUDA_KERNEL_ASSERT(token >= -1 && token < tokens);
  const int count = static_cast<int>(min(int64_t{kSide}, width - first)), mine = threadIdx.x % kWarpSize * kPerLane;
  float x[kPerLane] = {};
  if (token >= 0) load_four(x_TW + token * width + first + mine, count - mine, x);
  quantize_row_block(count, x, codes_RW + r * width + first, scales_RP + i);
}

__global__ void swiglu_kernel(const bf16* hidden_R2F, int64_t rows, int64_t width, uint8_t* codes_RF, float* scales_RP) {
  const int64_t blocks = (width + kSide - 1) / kSide, i = blockIdx.x * int64_t{kWarps} + threadIdx.x / kWarpSize;
  if (i >= rows * blocks) return;
  const int64_t r = i / blocks, first = i % blocks * kSide;
  const int count = static_cast<int>(min(int64_t{kSide}, width - first)), mine = threadIdx.x % kWarpSize * kPerLane;
  float gate[kPerLane], up[kPerLane];
  load_four(hidden_R2F + r * 2 * width + first + mine, count - mine, gate);
  load_four(hidden_R2F + (r * 2 + 1) * width + first + mine, count - mine, up);
#pragma unroll
  for (int n = 0; n < kPerLane; ++n) gate[n] = swiglu(gate[n], up[n]);
  quantize_row_block(count, gate, codes_RF + r * width + first, scales_RP + i);
}

// What tile_kernel quantises: four(r, c, count, x) gives values c to c + 3 of row r, those from `count` on 0, all exact in bf16.
struct Matrix {
  const bf16* x_RW;
  int64_t width;
  __device__ void four(int64_t r, int64_t c, int count, float (&x)[kPerLane]) const { load_four(x_RW + r * width + c, count, x); }
};

struct Codes {
  const uint8_t* codes_RW;
  const float* scales_RP;
  int64_t width;
  __device__ void four(int64_t r, int64_t c, int count, float (&x)[kPerLane]) const {
    if (count <= 0) return;
    const float factor = scales_RP[r * ((width + kSide - 1) / kSide) + c / kSide];
    const uint8_t* from = codes_RW + r * width + c;
    if (count >= kPerLane && reinterpret_cast<uintptr_t>(from) % kPerLane == 0) {
      const uint32_t all = *reinterpret_cast<const uint32_t*>(from);
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) x[i] = rounded<bf16>(value_of(static_cast<uint8_t>(all >> (8 * i))) * factor);
    } else {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) x[i] = i < count ? rounded<bf16>(value_of(from[i]) * factor) : 0.0f;
    }
  }
};

// The gradient of hidden = gate | up from that of silu(gate) * up. Blocks of gate and up of the same rows run side by side, so what both
// read comes from memory once.
struct SwigluGradient {
  const bf16 *d_act_RF, *hidden_R2F;
  int64_t width;  // F
  __device__ void four(int64_t r, int64_t c, int count, float (&x)[kPerLane]) const {
    if (width % kPerLane == 0) {  // then four neighbours lie in one half
      const bool is_gate = c < width;
      const int64_t f = is_gate ? c : c - width;
      float d_act[kPerLane], gate[kPerLane], up[kPerLane] = {};
      load_four(d_act_RF + r * width + f, count, d_act);
      load_four(hidden_R2F + r * 2 * width + f, count, gate);
      if (is_gate) load_four(hidden_R2F + (r * 2 + 1) * width + f, count, up);
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) x[i] = is_gate ? d_gate(d_act[i], gate[i], up[i]) : d_up(d_act[i], gate[i]);
    } else {
      for (int i = 0; i < kPerLane && i < count; ++i) {
        const int64_t f = (c + i) % width;
        const float d_act = d_act_RF[r * width + f], gate = hidden_R2F[r * 2 * width + f], up = hidden_R2F[(r * 2 + 1) * width + f];
        x[i] = c + i < width ? d_gate(d_act, gate, up) : d_up(d_act, gate);
      }
    }
  }
  static __device__ float d_gate(float d_act, float gate, float up) {
    const float share = 1.0f / (1.0f + expf(-gate));
    return rounded<bf16>(d_act * up * share * (1.0f + gate * (1.0f - share)));
  }
  static __device__ float d_up(float d_act, float gate) { return rounded<bf16>(d_act * gate * (1.0f / (1.0f + expf(-gate)))); }
};

struct ByRows {
  uint8_t* codes_RW;  // none: not wanted
  float* scales_RP;
};

struct ByColumns {
  uint8_t* codes_WR;
  float* scales_QW;
  int64_t ld;  // of a column's codes
};

// 128 x 128 values, read once: rows are quantised as they come, columns from shared memory, two at a time.
template <bool kWithRows, typename Source>
__global__ void __launch_bounds__(kThreads) tile_kernel(Source source, int64_t rows, int64_t width, ByRows by_rows, ByColumns by_columns) {
  constexpr int kLd = kSide / 2 + 1;  // words of a row: a warp reads one word of each of 32 rows from 32 banks
  __shared__ uint32_t tile[kSide * kLd];
  const int64_t first_row = blockIdx.y * int64_t{kSide}, first_column = blockIdx.x * int64_t{kSide}, blocks = gridDim.x;
  const int height = static_cast<int>(min(int64_t{kSide}, rows - first_row)),
            columns = static_cast<int>(min(int64_t{kSide}, width - first_column));
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, mine = lane * kPerLane;
#pragma unroll 4
  for (int r = warp; r < kSide; r += kWarps) {
    float x[kPerLane] = {};
    if (r < height) source.four(first_row + r, first_column + mine, columns - mine, x);
#pragma unroll
    for (int i = 0; i < kPerLane; i += 2)
      tile[r * kLd + (mine + i) / 2] = __float_as_uint(x[i]) >> 16 | (__float_as_uint(x[i + 1]) & 0xffff0000u);
    if (kWithRows && r < height) {
      quantize_row_block(columns, x, by_rows.codes_RW + (first_row + r) * width + first_column,
                         by_rows.scales_RP + (first_row + r) * blocks + blockIdx.x);
    }
  }
  __syncthreads();
  for (int c = 2 * warp; c < columns; c += 2 * kWarps) {
    float x[2][kPerLane];
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const uint32_t both = tile[(i * kWarpSize + lane) * kLd + c / 2];
      x[0][i] = __uint_as_float(both << 16), x[1][i] = __uint_as_float(both & 0xffff0000u);
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      uint8_t codes[kPerLane];
      const float factor = quantize_four(x[n], codes);
      if (c + n >= columns) continue;
      if (lane == 0) by_columns.scales_QW[blockIdx.y * width + first_column + c + n] = factor;
      uint8_t* to = by_columns.codes_WR + (first_column + c + n) * by_columns.ld + first_row;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i)
        if (i * kWarpSize + lane < height) to[i * kWarpSize + lane] = codes[i];
    }
  }
}

// Reads its block twice, the second time from the cache.
__global__ void weights_kernel(const bf16* w_EBA, int64_t rows, int64_t columns, uint8_t* codes_EBA, float* scales_EPQ) {
  __shared__ float part[kWarps];
  const int64_t first_row = blockIdx.y * int64_t{kScaleBlock}, first_column = blockIdx.x * int64_t{kScaleBlock};
  const int height = static_cast<int>(min(int64_t{kScaleBlock}, rows - first_row));
  const int64_t c = first_column + threadIdx.x % kScaleBlock;
  const int64_t first = (blockIdx.z * rows + first_row) * columns + c;
  const int step = kThreads / kScaleBlock;
  float largest = 0;
  if (c < columns) {
#pragma unroll 8
    for (int r = threadIdx.x / kScaleBlock; r < height; r += step)
      largest = larger(largest, fabsf(static_cast<float>(w_EBA[first + r * columns])));
  }
  largest = warp_largest(largest);
  if (threadIdx.x % kWarpSize == 0) part[threadIdx.x / kWarpSize] = largest;
  __syncthreads();
  for (const float other : part) largest = larger(largest, other);
  const float factor = scale_of(largest);
  if (threadIdx.x == 0) scales_EPQ[(blockIdx.z * int64_t{gridDim.y} + blockIdx.y) * gridDim.x + blockIdx.x] = factor;
  if (c >= columns) return;
#pragma unroll 8
  for (int r = threadIdx.x / kScaleBlock; r < height; r += step)
    codes_EBA[first + r * columns] = code_of(static_cast<float>(w_EBA[first + r * columns]) / factor);
}

// ---- host -------------------------------------------------------------------------------------------------------------------------

uint8_t* bytes(at::Tensor& codes) { return static_cast<uint8_t*>(codes.mutable_data_ptr()); }

std::tuple<at::Tensor, at::Tensor> empty_rows(const at::Tensor& x, int64_t rows, int64_t width) {
  return {at::empty({rows, width}, x.options().dtype(at::kFloat8_e4m3fn)),
          at::empty({rows, blocks_of(width)}, x.options().dtype(at::kFloat))};
}

unsigned warps_to_blocks(int64_t warps) { return static_cast<unsigned>((warps + kWarps - 1) / kWarps); }

std::tuple<at::Tensor, at::Tensor> rows_of(const at::Tensor& x_in, const int32_t* token_R, int64_t rows) {
  const c10::cuda::CUDAGuard guard(x_in.device());
  const at::Tensor x = x_in.contiguous();
  auto [codes, scales] = empty_rows(x, rows, x.size(1));
  if (codes.numel() == 0) return {codes, scales};
  rows_kernel<<<warps_to_blocks(scales.numel()), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
      x.const_data_ptr<bf16>(), token_R, x.size(0), rows, x.size(1), bytes(codes), scales.mutable_data_ptr<float>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {codes, scales};
}

std::tuple<at::Tensor, at::Tensor> quantize_rows(const at::Tensor& x) {
  check("x", x, 2);
  return rows_of(x, nullptr, x.size(0));
}

std::tuple<at::Tensor, at::Tensor> permute_quantize(const at::Tensor& x, const at::Tensor& token_in) {
  check("x", x, 2);
  check_token(token_in, x);
  const at::Tensor token = token_in.contiguous();
  return rows_of(x, token.const_data_ptr<int32_t>(), token.size(0));
}

std::tuple<at::Tensor, at::Tensor> swiglu_quantize(const at::Tensor& hidden_in) {
  check_hidden(hidden_in);
  const c10::cuda::CUDAGuard guard(hidden_in.device());
  const at::Tensor hidden = hidden_in.contiguous();
  const int64_t rows = hidden.size(0), width = hidden.size(1) / 2;
  auto [codes, scales] = empty_rows(hidden, rows, width);
  if (codes.numel() == 0) return {codes, scales};
  swiglu_kernel<<<warps_to_blocks(scales.numel()), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
      hidden.const_data_ptr<bf16>(), rows, width, bytes(codes), scales.mutable_data_ptr<float>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {codes, scales};
}

// Codes [rows, width] by columns, column by column, from a multiple of 16 bytes on: what the copy engine wants.
struct Columns {
  at::Tensor storage, codes, scales;
  int64_t ld;

  Columns(int64_t rows, int64_t width, const at::TensorOptions& options)
      : storage(at::empty({width, (rows + 15) / 16 * 16}, options.dtype(at::kFloat8_e4m3fn))),
        codes(storage.narrow(1, 0, rows).t()),
        scales(at::empty({blocks_of(rows), width}, options.dtype(at::kFloat))),
        ld(storage.size(1)) {}
};

template <bool kWithRows, typename Source>
void run_tiles(Source source, int64_t rows, int64_t width, const ByRows& by_rows, Columns& columns) {
  if (rows == 0 || width == 0) return;
  TORCH_CHECK_VALUE(blocks_of(rows) <= 65535, "x: ", rows, " rows, need at most 65535 blocks of 128");  // the grid's second dimension
  const dim3 grid(static_cast<unsigned>(blocks_of(width)), static_cast<unsigned>(blocks_of(rows)));
  tile_kernel<kWithRows, Source><<<grid, kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
      source, rows, width, by_rows, ByColumns{bytes(columns.storage), columns.scales.mutable_data_ptr<float>(), columns.ld});
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

using Both = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

template <typename Source>
Both rows_and_columns(Source source, int64_t rows, int64_t width, const at::Tensor& like) {
  auto [codes, scales] = empty_rows(like, rows, width);
  Columns columns(rows, width, like.options());
  run_tiles<true>(source, rows, width, ByRows{bytes(codes), scales.mutable_data_ptr<float>()}, columns);
  return {codes, scales, columns.codes, columns.scales};
}

std::tuple<at::Tensor, at::Tensor> quantize_columns(const at::Tensor& x_in) {
  check("x", x_in, 2);
  const c10::cuda::CUDAGuard guard(x_in.device());
  const at::Tensor x = x_in.contiguous();
  Columns columns(x.size(0), x.size(1), x.options());
  run_tiles<false>(Matrix{x.const_data_ptr<bf16>(), x.size(1)}, x.size(0), x.size(1), ByRows{}, columns);
  return {columns.codes, columns.scales};
}

Both quantize_rows_columns(const at::Tensor& x_in) {
  check("x", x_in, 2);
  const c10::cuda::CUDAGuard guard(x_in.device());
  const at::Tensor x = x_in.contiguous();
  return rows_and_columns(Matrix{x.const_data_ptr<bf16>(), x.size(1)}, x.size(0), x.size(1), x);
}

std::tuple<at::Tensor, at::Tensor> requantize_columns(const at::Tensor& codes_in, const at::Tensor& scales_in) {
  check_codes(codes_in, scales_in);
  const c10::cuda::CUDAGuard guard(codes_in.device());
  const at::Tensor codes = codes_in.contiguous(), scales = scales_in.contiguous();
  const int64_t rows = codes.size(0), width = codes.size(1);
  Columns columns(rows, width, codes.options());
  run_tiles<false>(Codes{static_cast<const uint8_t*>(codes.const_data_ptr()), scales.const_data_ptr<float>(), width}, rows, width, ByRows{},
                   columns);
  return {columns.codes, columns.scales};
}

Both swiglu_backward_quantize(const at::Tensor& d_act_in, const at::Tensor& hidden_in) {
  check_swiglu_gradient(d_act_in, hidden_in);
  const c10::cuda::CUDAGuard guard(hidden_in.device());
  const at::Tensor d_act = d_act_in.contiguous(), hidden = hidden_in.contiguous();
  return rows_and_columns(SwigluGradient{d_act.const_data_ptr<bf16>(), hidden.const_data_ptr<bf16>(), d_act.size(1)}, hidden.size(0),
                          hidden.size(1), hidden);
}

std::tuple<at::Tensor, at::Tensor> quantize_weights(const at::Tensor& w_in) {
  check("w", w_in, 3);
  const c10::cuda::CUDAGuard guard(w_in.device());
  const at::Tensor w = w_in.contiguous();
  at::Tensor codes = at::empty(w.sizes(), w.options().dtype(at::kFloat8_e4m3fn));
  at::Tensor scales = at::empty({w.size(0), blocks_of(w.size(1)), blocks_of(w.size(2))}, w.options().dtype(at::kFloat));
  if (codes.numel() == 0) return {codes, scales};
  const dim3 grid(static_cast<unsigned>(scales.size(2)), static_cast<unsigned>(scales.size(1)), static_cast<unsigned>(w.size(0)));
  weights_kernel<<<grid, kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(w.const_data_ptr<bf16>(), w.size(1), w.size(2), bytes(codes),
                                                                           scales.mutable_data_ptr<float>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {codes, scales};
}

}  // namespace

TORCH_LIBRARY_IMPL(m2_ops, CUDA, m) {
  m.impl("quantize_rows", &quantize_rows);
  m.impl("quantize_columns", &quantize_columns);
  m.impl("quantize_weights", &quantize_weights);
  m.impl("permute_quantize", &permute_quantize);
  m.impl("swiglu_quantize", &swiglu_quantize);
  m.impl("quantize_rows_columns", &quantize_rows_columns);
  m.impl("requantize_columns", &requantize_columns);
  m.impl("swiglu_backward_quantize", &swiglu_backward_quantize);
}

}  // namespace m2::quantize

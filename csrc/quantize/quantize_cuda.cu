// Blockwise e4m3 on the GPU: a warp per row and 128 columns, a block per 128 rows and 64 columns, a block per 128 x 128 weights.
// Codes by columns are laid out column by column, as the product over rows reads them.
// Shape suffixes: R rows, W width, P blocks of 128 columns, Q blocks of 128 rows, T tokens.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/Float8_e4m3fn.h>
#include <torch/library.h>

#include "../common/warp.cuh"
#include "quantize.h"

namespace m2::quantize {
namespace {

using bf16 = c10::BFloat16;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kPerLane = kScaleBlock / kWarpSize;
constexpr int kColumns = 64;  // that a block quantises by columns

// ---- device -----------------------------------------------------------------------------------------------------------------------

__device__ float larger(float a, float b) { return b > a || b != b ? b : a; }  // NaN wins

__device__ float warp_largest(float x) {
  for (int lane = kWarpSize / 2; lane > 0; lane /= 2) x = larger(x, __shfl_xor_sync(0xffffffffu, x, lane));
  return x;
}

__device__ float scale_of(float largest) { return largest == 0 ? 1.0f : largest / kE4m3Max; }

// 128 values of a row, value(i) the i-th of `count`, by one warp.
template <typename Value>
__device__ void quantize_block(int count, Value value, uint8_t* codes, float* scale) {
  const int lane = threadIdx.x % kWarpSize;
  float x[kPerLane], largest = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    x[i] = lane * kPerLane + i < count ? value(lane * kPerLane + i) : 0.0f;
    largest = larger(largest, fabsf(x[i]));
  }
  const float factor = scale_of(warp_largest(largest));
  if (lane == 0) *scale = factor;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i)
    if (lane * kPerLane + i < count) codes[lane * kPerLane + i] = e4m3(x[i] / factor).x;
}

// token_R: the row of x that each row is, -1 for zeros (none: its own).
__global__ void rows_kernel(const bf16* x_TW, const int32_t* token_R, int64_t tokens, int64_t rows, int64_t width, uint8_t* codes_RW,
                            float* scales_RP) {
  const int64_t blocks = (width + kScaleBlock - 1) / kScaleBlock;
  const int64_t i = blockIdx.x * int64_t{kWarps} + threadIdx.x / kWarpSize;
  if (i >= rows * blocks) return;  // the same for a whole warp
  const int64_t r = i / blocks, first = i % blocks * kScaleBlock, token = token_R ? token_R[r] : r;
  CUDA_KERNEL_ASSERT(token >= -1 && token < tokens);
  const bf16* x = x_TW + max(token, int64_t{0}) * width + first;
  const int count = static_cast<int>(min(int64_t{kScaleBlock}, width - first));
  quantize_block(token < 0 ? 0 : count, [&](int n) { return static_cast<float>(x[n]); }, codes_RW + r * width + first, scales_RP + i);
  if (token < 0)
    for (int n = threadIdx.x % kWarpSize; n < count; n += kWarpSize) codes_RW[r * width + first + n] = 0;
}

__global__ void swiglu_kernel(const bf16* hidden_R2W, int64_t rows, int64_t width, uint8_t* codes_RW, float* scales_RP) {
  const int64_t blocks = (width + kScaleBlock - 1) / kScaleBlock;
  const int64_t i = blockIdx.x * int64_t{kWarps} + threadIdx.x / kWarpSize;
  if (i >= rows * blocks) return;
  const int64_t r = i / blocks, first = i % blocks * kScaleBlock;
  const bf16 *gate = hidden_R2W + r * 2 * width + first, *up = gate + width;
  quantize_block(
      static_cast<int>(min(int64_t{kScaleBlock}, width - first)),
      [&](int n) {
        return rounded<bf16>(static_cast<float>(gate[n]) / (1.0f + expf(-static_cast<float>(gate[n]))) * static_cast<float>(up[n]));
      },
      codes_RW + r * width + first, scales_RP + i);
}

// 128 rows of 64 columns: a tile in shared memory, so that both x and the codes of a column are read and written side by side.
__global__ void columns_kernel(const bf16* x_RW, int64_t rows, int64_t width, int64_t ld, uint8_t* codes_WR, float* scales_QW) {
  __shared__ float tile[kScaleBlock][kColumns + 1];
  const int64_t first_row = blockIdx.x * int64_t{kScaleBlock}, first_column = blockIdx.y * int64_t{kColumns};
  const int height = static_cast<int>(min(int64_t{kScaleBlock}, rows - first_row));
  const int columns = static_cast<int>(min(int64_t{kColumns}, width - first_column));
  for (int i = threadIdx.x; i < kScaleBlock * kColumns; i += kThreads) {
    const int r = i / kColumns, c = i % kColumns;
    tile[r][c] = r < height && c < columns ? static_cast<float>(x_RW[(first_row + r) * width + first_column + c]) : 0.0f;
  }
  __syncthreads();
  for (int c = threadIdx.x / kWarpSize; c < columns; c += kWarps) {
    quantize_block(
        height, [&](int r) { return tile[r][c]; }, codes_WR + (first_column + c) * ld + first_row,
        scales_QW + blockIdx.x * width + first_column + c);
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
    codes_EBA[first + r * columns] = e4m3(static_cast<float>(w_EBA[first + r * columns]) / factor).x;
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

std::tuple<at::Tensor, at::Tensor> quantize_columns(const at::Tensor& x_in) {
  check("x", x_in, 2);
  const c10::cuda::CUDAGuard guard(x_in.device());
  const at::Tensor x = x_in.contiguous();
  const int64_t rows = x.size(0), width = x.size(1), ld = (rows + 15) / 16 * 16;  // the copy engine wants multiples of 16 bytes
  at::Tensor storage = at::empty({width, ld}, x.options().dtype(at::kFloat8_e4m3fn));
  at::Tensor scales = at::empty({blocks_of(rows), width}, x.options().dtype(at::kFloat));
  const at::Tensor codes = storage.narrow(1, 0, rows).t();
  if (codes.numel() == 0) return {codes, scales};
  const dim3 grid(static_cast<unsigned>(blocks_of(rows)), static_cast<unsigned>((width + kColumns - 1) / kColumns));
  columns_kernel<<<grid, kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(x.const_data_ptr<bf16>(), rows, width, ld, bytes(storage),
                                                                           scales.mutable_data_ptr<float>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {codes, scales};
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
}

}  // namespace m2::quantize

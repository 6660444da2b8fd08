// RMSNorm over whole rows, then partial RoPE of each head, on the GPU: a block per row, the weight's gradient in parts of rows.
// Shape suffixes: T tokens, W width (heads * head_dim), R rotated pairs of a head.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "../common/warp.cuh"
#include "norm_rope.h"

namespace m2::norm_rope {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostParts = 4096;  // of the weight's gradient: as many blocks as any GPU runs at one time

// ---- device -----------------------------------------------------------------------------------------------------------------------

template <typename T>
__device__ float row_sum(const T* x_W, int64_t width) {
  float squares = 0;
  for (int64_t i = threadIdx.x; i < width; i += kThreads) squares += static_cast<float>(x_W[i]) * static_cast<float>(x_W[i]);
  return block_sum<kThreads>(squares);
}

template <typename T>
__global__ void sum_squares_kernel(const T* x_TW, int64_t width, float* out_T) {
  const float total = row_sum(x_TW + blockIdx.x * width, width);
  if (threadIdx.x == 0) out_T[blockIdx.x] = total;
}

// Every product and sum is rounded where eager PyTorch rounds it.
template <typename T>
__global__ void forward_kernel(Sizes s, float full_width, float eps, const T* x_TW, const T* weight_W, const T* cos_TR, const T* sin_TR,
                               const float* sum_squares_T, T* out_TW, float* rstd_T) {
  const int64_t t = blockIdx.x;
  const int head_dim = static_cast<int>(s.head_dim);  // a 64-bit remainder per element would cost more than the memory
  const T* x_W = x_TW + t * s.width;
  const float squares = sum_squares_T ? sum_squares_T[t] : row_sum(x_W, s.width);
  const float rstd = 1.0f / sqrtf(squares / full_width + eps);
  if (threadIdx.x == 0) rstd_T[t] = rstd;
  const auto normed = [&](int64_t i) {
    return rounded<T>(rounded<T>(static_cast<float>(x_W[i]) * rstd) * static_cast<float>(weight_W[i]));
  };
  for (int64_t i = threadIdx.x; i < s.width; i += kThreads) {
    const int d = static_cast<int>(i) % head_dim, pair = d < s.half ? d : d - static_cast<int>(s.half);
    float value = normed(i);
    if (d < 2 * s.half) {
      const float cos = static_cast<float>(cos_TR[t * s.half + pair]), sin = static_cast<float>(sin_TR[t * s.half + pair]);
      const float other = d < s.half ? -normed(i + s.half) : normed(i - s.half);
      value = rounded<T>(value * cos) + rounded<T>(other * sin);
    }
    out_TW[t * s.width + i] = static_cast<T>(value);
  }
}

// With n = x rstd, out = R (w n) and y = R^-1 grad: d_w = y n, d_n = y w, dx = rstd (d_n - n <d_n, n> / W). A block takes
// tokens_per_part rows; a thread owns its columns, so their sums need no atomics.
template <typename T>
__global__ void backward_kernel(Sizes s, float full_width, int64_t tokens_per_part, const T* grad_TW, const T* x_TW, const T* weight_W,
                                const T* cos_TR, const T* sin_TR, const float* rstd_T, T* dx_TW, float* d_sum_squares_T, float* part_PW) {
  const int64_t begin = blockIdx.x * tokens_per_part, end = min(begin + tokens_per_part, s.tokens);
  const int head_dim = static_cast<int>(s.head_dim);
  float* d_weight_W = part_PW + blockIdx.x * s.width;
  for (int64_t t = begin; t < end; ++t) {
    const T *grad_W = grad_TW + t * s.width, *x_W = x_TW + t * s.width;
    const float rstd = rstd_T[t];
    const auto turned_back = [&](int64_t i) {
      const int d = static_cast<int>(i) % head_dim, pair = d < s.half ? d : d - static_cast<int>(s.half);
      const float here = static_cast<float>(grad_W[i]);
      if (d >= 2 * s.half) return here;
      const float cos = static_cast<float>(cos_TR[t * s.half + pair]), sin = static_cast<float>(sin_TR[t * s.half + pair]);
      return here * cos + (d < s.half ? static_cast<float>(grad_W[i + s.half]) : -static_cast<float>(grad_W[i - s.half])) * sin;
    };
    float inner = 0;
    for (int64_t i = threadIdx.x; i < s.width; i += kThreads) {
      const float y = turned_back(i), n = static_cast<float>(x_W[i]) * rstd;
      inner += y * static_cast<float>(weight_W[i]) * n;
      d_weight_W[i] += y * n;
    }
    const float mean = block_sum<kThreads>(inner) / full_width;
    const float back = d_sum_squares_T ? 0.0f : mean;
    if (d_sum_squares_T && threadIdx.x == 0) d_sum_squares_T[t] = -0.5f * mean * rstd * rstd;
    for (int64_t i = threadIdx.x; i < s.width; i += kThreads) {
      const float d_n = turned_back(i) * static_cast<float>(weight_W[i]);
      dx_TW[t * s.width + i] = static_cast<T>(rstd * (d_n - static_cast<float>(x_W[i]) * rstd * back));
    }
  }
}

// ---- host -------------------------------------------------------------------------------------------------------------------------

template <typename T>
const T* data(const OptionalTensor& x) {
  return x ? x->const_data_ptr<T>() : nullptr;
}

at::Tensor row_sum_squares(const at::Tensor& x_in) {
  check_rows(x_in);
  const c10::cuda::CUDAGuard guard(x_in.device());
  const at::Tensor x = x_in.contiguous();
  at::Tensor out = at::empty({x.size(0)}, x.options().dtype(at::kFloat));
  if (x.size(0) == 0) return out;
  const auto run = [&]<typename T>(const T* x_TW) {
    sum_squares_kernel<T><<<x.size(0), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(x_TW, x.size(1), out.mutable_data_ptr<float>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  };
  if (x.scalar_type() == at::kFloat) run(x.const_data_ptr<float>());
  else run(x.const_data_ptr<at::BFloat16>());
  return out;
}

std::tuple<at::Tensor, at::Tensor> rms_norm_rope(const at::Tensor& x_in, const at::Tensor& weight_in, double eps, int64_t heads,
                                                 const OptionalTensor& cos_in, const OptionalTensor& sin_in,
                                                 const OptionalTensor& sum_squares_in, int64_t full_width) {
  const Sizes s = check(x_in, weight_in, heads, cos_in, sin_in);
  check_split(x_in, sum_squares_in, full_width);
  const c10::cuda::CUDAGuard guard(x_in.device());
  const at::Tensor x = x_in.contiguous(), weight = weight_in.contiguous();
  const OptionalTensor cos = contiguous(cos_in), sin = contiguous(sin_in), sum_squares = contiguous(sum_squares_in);
  at::Tensor out = at::empty_like(x), rstd = at::empty({s.tokens}, x.options().dtype(at::kFloat));
  if (s.tokens == 0) return {out, rstd};
  const auto run = [&]<typename T>(T* out_TW) {
    forward_kernel<T><<<s.tokens, kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
        s, static_cast<float>(full_width), static_cast<float>(eps), x.const_data_ptr<T>(), weight.const_data_ptr<T>(), data<T>(cos),
        data<T>(sin), data<float>(sum_squares), out_TW, rstd.mutable_data_ptr<float>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  };
  if (x.scalar_type() == at::kFloat) run(out.mutable_data_ptr<float>());
  else run(out.mutable_data_ptr<at::BFloat16>());
  return {out, rstd};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> rms_norm_rope_backward(const at::Tensor& grad_in, const at::Tensor& x_in,
                                                                      const at::Tensor& weight_in, const at::Tensor& rstd_in, int64_t heads,
                                                                      const OptionalTensor& cos_in, const OptionalTensor& sin_in,
                                                                      bool split, int64_t full_width) {
  const Sizes s = check(x_in, weight_in, heads, cos_in, sin_in);
  check_tensor("grad", grad_in, x_in.scalar_type(), x_in.sizes(), x_in.device());
  check_tensor("rstd", rstd_in, at::kFloat, {s.tokens}, x_in.device());
  const c10::cuda::CUDAGuard guard(x_in.device());
  const at::Tensor grad = grad_in.contiguous(), x = x_in.contiguous(), weight = weight_in.contiguous(), rstd = rstd_in.contiguous();
  const OptionalTensor cos = contiguous(cos_in), sin = contiguous(sin_in);
  at::Tensor dx = at::empty_like(x), d_sum_squares = at::empty({split ? s.tokens : 0}, rstd.options());
  if (s.tokens == 0) return {dx, at::zeros({s.width}, weight.options()), d_sum_squares};
  // from the number of tokens alone, so that sums do not depend on the GPU
  const int64_t tokens_per_part = std::max<int64_t>(8, (s.tokens + kMostParts - 1) / kMostParts),
                parts = (s.tokens + tokens_per_part - 1) / tokens_per_part;
  at::Tensor part = at::zeros({parts, s.width}, rstd.options());
  const auto run = [&]<typename T>(T* dx_TW) {
    backward_kernel<T><<<parts, kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
        s, static_cast<float>(full_width), tokens_per_part, grad.const_data_ptr<T>(), x.const_data_ptr<T>(), weight.const_data_ptr<T>(),
        data<T>(cos), data<T>(sin), rstd.const_data_ptr<float>(), dx_TW, split ? d_sum_squares.mutable_data_ptr<float>() : nullptr,
        part.mutable_data_ptr<float>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  };
  if (x.scalar_type() == at::kFloat) run(dx.mutable_data_ptr<float>());
  else run(dx.mutable_data_ptr<at::BFloat16>());
  return {dx, part.sum(0).to(weight.scalar_type()), d_sum_squares};
}

}  // namespace

TORCH_LIBRARY_IMPL(m2_ops, CUDA, m) {
  m.impl("row_sum_squares", &row_sum_squares);
  m.impl("rms_norm_rope", &rms_norm_rope);
  m.impl("rms_norm_rope_backward", &rms_norm_rope_backward);
}

}  // namespace m2::norm_rope

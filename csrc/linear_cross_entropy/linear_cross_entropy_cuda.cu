// Linear + cross-entropy on the GPU: cuBLAS makes the fp32 logits of one chunk of the vocabulary, one pass over them keeps each row's
// running softmax; the backward makes them again and turns them into their bf16 gradients in one pass.
// Shape suffixes: N predictions, C entries of a chunk.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <limits>

#include "../common/warp.cuh"
#include "linear_cross_entropy.h"

namespace m2::linear_cross_entropy {
namespace {

using bf16 = c10::BFloat16;

constexpr int kThreads = 512;
constexpr int64_t kChunkElements = 1 << 25;  // logits that exist at one time: 128 MB, and half as much for their gradients

// ---- device -----------------------------------------------------------------------------------------------------------------------

// Softmax of a row seen piece by piece: the maximum, and relative to it the sum of exponentials and of exponentials times logits.
struct Running {
  float max = -INFINITY, sum = 0, weighted = 0;

  __device__ void add(float other_max, float other_sum, float other_weighted) {
    const float to = fmaxf(max, other_max);
    if (to == -INFINITY) return;
    const float mine = expf(max - to), its = expf(other_max - to);
    sum = sum * mine + other_sum * its, weighted = weighted * mine + other_weighted * its, max = to;
  }
  __device__ void add(float logit) {
    if (logit > max) {
      const float shrink = expf(max - logit);
      sum *= shrink, weighted *= shrink, max = logit;
    }
    const float e = logit == -INFINITY ? 0.0f : expf(logit - max);  // a NaN logit makes the sum NaN
    sum += e, weighted += logit == -INFINITY ? 0.0f : e * logit;
  }
};

// A block per row. state [3, N] goes on from chunk to chunk; the last chunk ends in lse and mean.
__global__ void __launch_bounds__(kThreads)
    softmax_kernel(const float* logits_NC, const int64_t* targets_N, int64_t first_entry, int entries, int64_t count, bool last,
                   float* state_3N, float* target_N, float* lse_N, float* mean_N) {
  __shared__ Running part[kThreads / kWarpSize];
  const int64_t row = blockIdx.x;
  const float* logits_C = logits_NC + row * entries;
  Running mine;
  for (int i = threadIdx.x; i < entries; i += kThreads) mine.add(logits_C[i]);
  for (int lane = kWarpSize / 2; lane > 0; lane /= 2) {
    const float max = __shfl_xor_sync(0xffffffffu, mine.max, lane), sum = __shfl_xor_sync(0xffffffffu, mine.sum, lane),
                weighted = __shfl_xor_sync(0xffffffffu, mine.weighted, lane);
    mine.add(max, sum, weighted);
  }
  if (threadIdx.x % kWarpSize == 0) part[threadIdx.x / kWarpSize] = mine;
  __syncthreads();
  if (threadIdx.x != 0) return;
  Running all;
  all.max = state_3N[row], all.sum = state_3N[count + row], all.weighted = state_3N[2 * count + row];
  for (const Running& other : part) all.add(other.max, other.sum, other.weighted);
  const int64_t place = targets_N[row] - first_entry;
  if (place >= 0 && place < entries) target_N[row] = logits_C[place];
  if (last) {
    lse_N[row] = all.max + logf(all.sum);
    if (mean_N) mean_N[row] = all.weighted / all.sum;
  } else {
    state_3N[row] = all.max, state_3N[count + row] = all.sum, state_3N[2 * count + row] = all.weighted;
  }
}

// With p = exp(z - lse): d target/dz = [z is the target], d lse/dz = p, d mean/dz = p (1 + z - mean). A block per row.
__global__ void __launch_bounds__(kThreads)
    gradient_kernel(const float* logits_NC, const int64_t* targets_N, int64_t first_entry, int entries, const float* grad_target_N,
                    const float* grad_lse_N, const float* grad_mean_N, const float* lse_N, const float* mean_N, bf16* d_logits_NC) {
  const int64_t row = blockIdx.x, place = targets_N[row] - first_entry;
  const float grad_lse = grad_lse_N[row], grad_mean = mean_N ? grad_mean_N[row] : 0.0f, lse = lse_N[row],
              mean = mean_N ? mean_N[row] : 0.0f;
  for (int i = threadIdx.x; i < entries; i += kThreads) {
    const float logit = logits_NC[row * entries + i];
    float grad = expf(logit - lse) * (grad_lse + grad_mean * (1.0f + logit - mean));
    if (i == place) grad += grad_target_N[row];
    d_logits_NC[row * entries + i] = grad;
  }
}

// ---- host -------------------------------------------------------------------------------------------------------------------------

struct Operands {
  at::Tensor rows, weight, targets;  // rows: of hidden, one per prediction
  int64_t count, vocab, chunk;
};

Operands operands(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets, const OptionalTensor& sources) {
  check(hidden, weight, targets, sources);
  const int64_t count = targets.size(0), vocab = weight.size(0), fitting = kChunkElements / std::max<int64_t>(1, count);
  return {(sources ? hidden.index_select(0, *sources) : hidden).contiguous(), weight.contiguous(), targets.contiguous(), count, vocab,
          std::min(vocab, std::max<int64_t>(256, fitting / 256 * 256))};
}

// run(first entry, number of entries, logits fp32 [N, C]) for one chunk of the vocabulary after the other.
template <typename Run>
void each_chunk(const Operands& o, Run run) {
  for (int64_t first = 0; first < o.vocab; first += o.chunk) {
    const int64_t entries = std::min(o.chunk, o.vocab - first);
    run(first, entries, at::mm(o.rows, o.weight.narrow(0, first, entries).t(), at::kFloat));
  }
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_cross_entropy(const at::Tensor& hidden, const at::Tensor& weight,
                                                                    const at::Tensor& targets, const OptionalTensor& sources,
                                                                    int64_t vocab_start, bool with_mean) {
  const c10::cuda::CUDAGuard guard(hidden.device());
  const Operands o = operands(hidden, weight, targets, sources);
  const auto fp32 = hidden.options().dtype(at::kFloat);
  at::Tensor target = at::zeros({o.count}, fp32), lse = at::empty({o.count}, fp32), mean = at::empty({with_mean ? o.count : 0}, fp32);
  if (o.count == 0) return {target, lse, mean};
  at::Tensor state = at::zeros({3, o.count}, fp32);
  state.select(0, 0).fill_(-std::numeric_limits<float>::infinity());
  each_chunk(o, [&](int64_t first, int64_t entries, const at::Tensor& logits) {
    softmax_kernel<<<static_cast<unsigned>(o.count), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
        logits.const_data_ptr<float>(), o.targets.const_data_ptr<int64_t>(), vocab_start + first, static_cast<int>(entries), o.count,
        first + entries == o.vocab, state.mutable_data_ptr<float>(), target.mutable_data_ptr<float>(), lse.mutable_data_ptr<float>(),
        with_mean ? mean.mutable_data_ptr<float>() : nullptr);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {target, lse, mean};
}

std::tuple<at::Tensor, at::Tensor> linear_cross_entropy_backward(const at::Tensor& grad_target_in, const at::Tensor& grad_lse_in,
                                                                 const at::Tensor& grad_mean_in, const at::Tensor& hidden,
                                                                 const at::Tensor& weight, const at::Tensor& targets,
                                                                 const OptionalTensor& sources, const at::Tensor& lse_in,
                                                                 const at::Tensor& mean_in, int64_t vocab_start) {
  const c10::cuda::CUDAGuard guard(hidden.device());
  const Operands o = operands(hidden, weight, targets, sources);
  check_gradients(grad_target_in, grad_lse_in, grad_mean_in, lse_in, mean_in, o.count, hidden.device());
  if (o.count == 0) return {at::zeros_like(hidden), at::zeros_like(weight)};
  const bool with_mean = mean_in.numel() > 0;
  const at::Tensor grad_target = grad_target_in.contiguous(), grad_lse = grad_lse_in.contiguous(), grad_mean = grad_mean_in.contiguous();
  const at::Tensor lse = lse_in.contiguous(), mean = mean_in.contiguous();
  at::Tensor d_weight = at::empty_like(o.weight), d_rows = at::zeros(o.rows.sizes(), lse.options());
  each_chunk(o, [&](int64_t first, int64_t entries, const at::Tensor& logits) {
    at::Tensor d_logits = at::empty({o.count, entries}, o.rows.options());
    gradient_kernel<<<static_cast<unsigned>(o.count), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
        logits.const_data_ptr<float>(), o.targets.const_data_ptr<int64_t>(), vocab_start + first, static_cast<int>(entries),
        grad_target.const_data_ptr<float>(), grad_lse.const_data_ptr<float>(), with_mean ? grad_mean.const_data_ptr<float>() : nullptr,
        lse.const_data_ptr<float>(), with_mean ? mean.const_data_ptr<float>() : nullptr, d_logits.mutable_data_ptr<bf16>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    at::Tensor d_weight_chunk = d_weight.narrow(0, first, entries);
    at::mm_out(d_weight_chunk, d_logits.t(), o.rows);
    d_rows.add_(at::mm(d_logits, o.weight.narrow(0, first, entries), at::kFloat));
  });
  if (!sources) return {d_rows.to(at::kBFloat16), d_weight};
  // by sorted index, so that sums repeat; index_add_ adds atomically
  at::Tensor d_hidden = at::zeros(hidden.sizes(), lse.options());
  return {d_hidden.index_put_({*sources}, d_rows, true).to(at::kBFloat16), d_weight};
}

}  // namespace

TORCH_LIBRARY_IMPL(m2_ops, CUDA, m) {
  m.impl("linear_cross_entropy", &linear_cross_entropy);
  m.impl("linear_cross_entropy_backward", &linear_cross_entropy_backward);
}

}  // namespace m2::linear_cross_entropy

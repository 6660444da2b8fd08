// Sigmoid router on the GPU: a warp per token, the logits read once in 16-byte pieces, top-k by warp reductions on integer keys.
// Shape suffixes: T tokens, E experts, K experts per token.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>

#include "router.h"

namespace m2::router {
namespace {

// ---- device -----------------------------------------------------------------------------------------------------------------------

constexpr unsigned kWarp = 0xffffffffu;
constexpr int kLanes = 32;
constexpr int kThreads = 512;
constexpr int kTokensPerBlock = kThreads / kLanes;  // at one time

// Within 3 ulp: exp is accurate, the quotient is the hardware's reciprocal. 0 for x < -88, as IEEE division gives.
__device__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + expf(-x)); }

// Unsigned integers in the order of the floats, NaN of either sign on top as in torch.topk; 0 is below the key of every float.
__device__ unsigned sort_key(float x) {
  const unsigned bits = __float_as_uint(x);
  const unsigned sign = static_cast<int>(bits) >> 31;
  return isnan(x) ? ~0u : bits ^ (sign | 0x80000000u);
}

__device__ float warp_sum(float x) {
  for (int lane = kLanes / 2; lane > 0; lane /= 2) x += __shfl_xor_sync(kWarp, x, lane);
  return x;
}

// A lane holds experts 128 g + 4 lane + r at place 4 g + r, so that each group of 4 is one coalesced 16-byte read.
__device__ int expert_at(int place, int lane) { return place / 4 * 128 + lane * 4 + place % 4; }

// Four floats of a row of E from 4-aligned e on; `fill` beyond the row. `wide` when every row starts at 16 bytes (then 4 divides E).
__device__ float4 load4(const float* row_E, int e, int num_experts, bool wide, float fill) {
  if (wide) return e < num_experts ? *reinterpret_cast<const float4*>(row_E + e) : make_float4(fill, fill, fill, fill);
  return make_float4(e < num_experts ? row_E[e] : fill, e + 1 < num_experts ? row_E[e + 1] : fill,
                     e + 2 < num_experts ? row_E[e + 2] : fill, e + 3 < num_experts ? row_E[e + 3] : fill);
}

// A candidate of a lane: key 0 when there is none.
struct Best {
  unsigned key;
  int place;
};

// The best two of a lane's keys that come after `last` in the order (key descending, place ascending).
template <int N>
__device__ void next_two(const unsigned (&keys)[N], Best last, Best& first, Best& second) {
  first = second = {0u, 0};
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const unsigned key = keys[i] < last.key || (keys[i] == last.key && i > last.place) ? keys[i] : 0u;
    if (key > first.key) {
      second = first;
      first = {key, i};
    } else if (key > second.key) {
      second = {key, i};
    }
  }
}

// Choices of a block's tokens, added to the shared counts when it ends; integers, so that the order of additions does not show.
class BlockCounts {
 public:
  __device__ BlockCounts(unsigned long long* shared_E, int num_experts) : shared_(shared_E), num_experts_(num_experts) {
    for (int e = threadIdx.x; e < num_experts_; e += kThreads) shared_[e] = 0;
    __syncthreads();
  }
  __device__ void add(int expert, int multiplicity) { atomicAdd(shared_ + expert, static_cast<unsigned long long>(multiplicity)); }
  __device__ void flush(unsigned long long* counts_E) const {
    __syncthreads();
    for (int e = threadIdx.x; e < num_experts_; e += kThreads)
      if (shared_[e]) atomicAdd(counts_E + e, shared_[e]);
  }

 private:
  unsigned long long* shared_;
  int num_experts_;
};

struct Shape {
  int64_t num_tokens;
  int num_experts;
  int top_k;
};

// Lane j < K holds the token's j-th expert: its weight and counts.
__device__ void write_weights(const float* logits_E, int expert, float* weights_K, int multiplicity, int top_k, int lane,
                              BlockCounts& counts) {
  const float score = lane < top_k ? sigmoid(logits_E[expert]) : 0.0f;
  const float sum = warp_sum(score);
  if (lane < top_k) {
    weights_K[lane] = score / sum;
    counts.add(expert, multiplicity);
  }
}

// The route's j-th expert in lane j < K, after the checks that the CPU makes too.
__device__ int load_route(const int* experts_K, int top_k, int num_experts, int lane) {
  const int expert = lane < top_k ? experts_K[lane] : -1 - lane;
  CUDA_KERNEL_ASSERT((lane >= top_k || (expert >= 0 && expert < num_experts)) && "router: experts out of range");
  CUDA_KERNEL_ASSERT(__match_any_sync(kWarp, expert) == 1u << lane && "router: experts names one twice");
  return expert;
}

// N keys per lane. The register caps let one wave of blocks hold a large batch: 64 warps per multiprocessor up to 256 experts.
template <int N>
__global__ void __launch_bounds__(kThreads, N <= 8    ? 4
                                            : N <= 16 ? 2
                                                      : 1)
    topk_kernel(const float* __restrict__ logits_TE, const float* __restrict__ bias_E, const int* __restrict__ multiplicity_T,
                float* __restrict__ weights_TK, int* __restrict__ experts_TK, unsigned long long* counts_E, Shape shape, bool wide) {
  __shared__ unsigned long long block_counts[kMaxExperts];
  BlockCounts counts(block_counts, shape.num_experts);
  const int lane = threadIdx.x % kLanes;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kTokensPerBlock;
  for (int64_t t = static_cast<int64_t>(blockIdx.x) * kTokensPerBlock + threadIdx.x / kLanes; t < shape.num_tokens; t += stride) {
    const float* logits_E = logits_TE + t * shape.num_experts;
    float4 logits[N / 4];
#pragma unroll
    for (int g = 0; g < N / 4; ++g) logits[g] = load4(logits_E, expert_at(4 * g, lane), shape.num_experts, wide, 0.0f);
    unsigned keys[N];
#pragma unroll
    for (int g = 0; g < N / 4; ++g) {
      const int e = expert_at(4 * g, lane);
      const float4 bias = load4(bias_E, e, shape.num_experts, wide, 0.0f);
      keys[4 * g + 0] = e + 0 < shape.num_experts ? sort_key(sigmoid(logits[g].x) + bias.x) : 0u;
      keys[4 * g + 1] = e + 1 < shape.num_experts ? sort_key(sigmoid(logits[g].y) + bias.y) : 0u;
      keys[4 * g + 2] = e + 2 < shape.num_experts ? sort_key(sigmoid(logits[g].z) + bias.z) : 0u;
      keys[4 * g + 3] = e + 3 < shape.num_experts ? sort_key(sigmoid(logits[g].w) + bias.w) : 0u;
    }
    // Few tokens take more than two experts from one lane, so a lane looks for its next ones only then.
    Best first, second;
    next_two(keys, {~0u, -1}, first, second);
    int mine = 0;  // lane j: the j-th choice
    for (int j = 0; j < shape.top_k; ++j) {
      const unsigned best = __reduce_max_sync(kWarp, first.key);
      const int expert = expert_at(first.place, lane);
      const int winner = static_cast<int>(__reduce_min_sync(kWarp, first.key == best ? static_cast<unsigned>(expert) : ~0u));
      if (lane == j) mine = winner;
      if (expert == winner && first.key == best) {
        const Best last = first;
        first = second;
        second.key = 0;
        if (first.key == 0) next_two(keys, last, first, second);
      }
    }
    if (lane < shape.top_k) experts_TK[t * shape.top_k + lane] = mine;
    write_weights(logits_E, mine, weights_TK + t * shape.top_k, multiplicity_T ? multiplicity_T[t] : 1, shape.top_k, lane, counts);
  }
  counts.flush(counts_E);
}

__global__ void __launch_bounds__(kThreads)
    replay_kernel(const float* __restrict__ logits_TE, const int* __restrict__ experts_TK, const int* __restrict__ multiplicity_T,
                  float* __restrict__ weights_TK, unsigned long long* counts_E, Shape shape) {
  __shared__ unsigned long long block_counts[kMaxExperts];
  BlockCounts counts(block_counts, shape.num_experts);
  const int lane = threadIdx.x % kLanes;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kTokensPerBlock;
  for (int64_t t = static_cast<int64_t>(blockIdx.x) * kTokensPerBlock + threadIdx.x / kLanes; t < shape.num_tokens; t += stride) {
    const int expert = load_route(experts_TK + t * shape.top_k, shape.top_k, shape.num_experts, lane);
    write_weights(logits_TE + t * shape.num_experts, expert, weights_TK + t * shape.top_k, multiplicity_T ? multiplicity_T[t] : 1,
                  shape.top_k, lane, counts);
  }
  counts.flush(counts_E);
}

// dL/dlogit_j = w_j (1 - s_j) (g_j - sum_i g_i w_i); 1 - s is sigmoid(-logit), which keeps its digits near s = 1.
__global__ void __launch_bounds__(kThreads)
    backward_kernel(const float* __restrict__ grad_TK, const float* __restrict__ logits_TE, const float* __restrict__ weights_TK,
                    const int* __restrict__ experts_TK, float* grad_logits_TE, Shape shape, bool wide) {
  const int lane = threadIdx.x % kLanes;
  const int64_t t = static_cast<int64_t>(blockIdx.x) * kTokensPerBlock + threadIdx.x / kLanes;
  if (t >= shape.num_tokens) return;  // the same for a whole warp
  const int expert = load_route(experts_TK + t * shape.top_k, shape.top_k, shape.num_experts, lane);
  float grad = 0, weight = 0, rest = 0;
  if (lane < shape.top_k) {
    grad = grad_TK[t * shape.top_k + lane];
    weight = weights_TK[t * shape.top_k + lane];
    rest = sigmoid(-logits_TE[t * shape.num_experts + expert]);
  }
  float* out_E = grad_logits_TE + t * shape.num_experts;
  if (wide) {
    for (int e = lane * 4; e < shape.num_experts; e += kLanes * 4) *reinterpret_cast<float4*>(out_E + e) = make_float4(0, 0, 0, 0);
  } else {
    for (int e = lane; e < shape.num_experts; e += kLanes) out_E[e] = 0;
  }
  const float mean = warp_sum(grad * weight);
  __syncwarp();  // orders the zeros of other lanes before the few values written over them
  if (lane < shape.top_k) out_E[expert] = weight * rest * (grad - mean);
}

__global__ void __launch_bounds__(kThreads)
    bias_update_kernel(float* bias_E, const int64_t* __restrict__ counts_E, int64_t num_experts, float rate) {
  __shared__ unsigned long long total;
  if (threadIdx.x == 0) total = 0;
  __syncthreads();
  for (int64_t e = threadIdx.x; e < num_experts; e += kThreads) atomicAdd(&total, static_cast<unsigned long long>(counts_E[e]));
  __syncthreads();
  for (int64_t e = threadIdx.x; e < num_experts; e += kThreads) {
    const int64_t below_mean = static_cast<int64_t>(total) - counts_E[e] * num_experts;
    bias_E[e] += rate * static_cast<float>((below_mean > 0) - (below_mean < 0));
  }
}

// ---- launch -----------------------------------------------------------------------------------------------------------------------

bool wide_rows(const at::Tensor& x, int64_t num_experts) {
  return num_experts % 4 == 0 && reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
}

// As many blocks as run at one time, so that each adds its counts once.
unsigned num_blocks(int64_t num_tokens, int per_multiprocessor) {
  int multiprocessors = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, c10::cuda::current_device()));
  const int64_t resident = static_cast<int64_t>(multiprocessors) * per_multiprocessor;
  return static_cast<unsigned>(std::min((num_tokens + kTokensPerBlock - 1) / kTokensPerBlock, resident));
}

const int* optional_data(const std::optional<at::Tensor>& x) { return x ? x->const_data_ptr<int>() : nullptr; }

std::optional<at::Tensor> contiguous(const std::optional<at::Tensor>& x) { return x ? std::optional(x->contiguous()) : std::nullopt; }

unsigned long long* counts_data(at::Tensor& counts) { return reinterpret_cast<unsigned long long*>(counts.mutable_data_ptr<int64_t>()); }

std::tuple<at::Tensor, at::Tensor, at::Tensor> router_topk(const at::Tensor& logits_in, const at::Tensor& bias_in, int64_t top_k,
                                                           const std::optional<at::Tensor>& multiplicity_in) {
  check_logits(logits_in);
  const int64_t num_tokens = logits_in.size(0), num_experts = logits_in.size(1);
  check_tensor("bias", bias_in, at::kFloat, {num_experts}, logits_in.device());
  check_top_k(top_k, num_experts);
  check_multiplicity(multiplicity_in, logits_in);
  const c10::cuda::CUDAGuard guard(logits_in.device());
  const at::Tensor logits = logits_in.contiguous(), bias = bias_in.contiguous();
  const auto multiplicity = contiguous(multiplicity_in);
  at::Tensor weights = at::empty({num_tokens, top_k}, logits.options());
  at::Tensor experts = at::empty({num_tokens, top_k}, logits.options().dtype(at::kInt));
  at::Tensor counts = at::zeros({num_experts}, logits.options().dtype(at::kLong));
  if (num_tokens == 0) return {weights, experts, counts};
  const Shape shape{num_tokens, static_cast<int>(num_experts), static_cast<int>(top_k)};
  const bool wide = wide_rows(logits, num_experts) && wide_rows(bias, num_experts);
  const auto launch = [&](auto kernel, int per_multiprocessor) {
    kernel<<<num_blocks(num_tokens, per_multiprocessor), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
        logits.const_data_ptr<float>(), bias.const_data_ptr<float>(), optional_data(multiplicity), weights.mutable_data_ptr<float>(),
        experts.mutable_data_ptr<int>(), counts_data(counts), shape, wide);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  };
  if (num_experts <= 128) launch(topk_kernel<4>, 4);
  else if (num_experts <= 256) launch(topk_kernel<8>, 4);
  else if (num_experts <= 512) launch(topk_kernel<16>, 2);
  else launch(topk_kernel<32>, 1);
  return {weights, experts, counts};
}

std::tuple<at::Tensor, at::Tensor> router_replay(const at::Tensor& logits_in, const at::Tensor& experts_in,
                                                 const std::optional<at::Tensor>& multiplicity_in) {
  check_logits(logits_in);
  check_routes(experts_in, logits_in);
  check_multiplicity(multiplicity_in, logits_in);
  const int64_t num_tokens = logits_in.size(0), num_experts = logits_in.size(1), top_k = experts_in.size(1);
  const c10::cuda::CUDAGuard guard(logits_in.device());
  const at::Tensor logits = logits_in.contiguous(), experts = experts_in.contiguous();
  const auto multiplicity = contiguous(multiplicity_in);
  at::Tensor weights = at::empty({num_tokens, top_k}, logits.options());
  at::Tensor counts = at::zeros({num_experts}, logits.options().dtype(at::kLong));
  if (num_tokens == 0) return {weights, counts};
  replay_kernel<<<num_blocks(num_tokens, 4), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
      logits.const_data_ptr<float>(), experts.const_data_ptr<int>(), optional_data(multiplicity), weights.mutable_data_ptr<float>(),
      counts_data(counts), Shape{num_tokens, static_cast<int>(num_experts), static_cast<int>(top_k)});
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {weights, counts};
}

at::Tensor router_backward(const at::Tensor& grad_in, const at::Tensor& logits_in, const at::Tensor& weights_in,
                           const at::Tensor& experts_in) {
  check_backward(grad_in, logits_in, weights_in, experts_in);
  const int64_t num_tokens = logits_in.size(0), num_experts = logits_in.size(1), top_k = experts_in.size(1);
  const c10::cuda::CUDAGuard guard(logits_in.device());
  const at::Tensor grad = grad_in.contiguous(), logits = logits_in.contiguous();
  const at::Tensor weights = weights_in.contiguous(), experts = experts_in.contiguous();
  at::Tensor grad_logits = at::empty_like(logits);
  if (num_tokens == 0) return grad_logits;
  const auto blocks = static_cast<unsigned>((num_tokens + kTokensPerBlock - 1) / kTokensPerBlock);
  backward_kernel<<<blocks, kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
      grad.const_data_ptr<float>(), logits.const_data_ptr<float>(), weights.const_data_ptr<float>(), experts.const_data_ptr<int>(),
      grad_logits.mutable_data_ptr<float>(), Shape{num_tokens, static_cast<int>(num_experts), static_cast<int>(top_k)},
      wide_rows(grad_logits, num_experts));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return grad_logits;
}

void router_bias_update(at::Tensor& bias, const at::Tensor& counts_in, double rate) {
  check_bias_update(bias, counts_in);
  if (bias.numel() == 0) return;
  const c10::cuda::CUDAGuard guard(bias.device());
  const at::Tensor counts = counts_in.contiguous();
  bias_update_kernel<<<1, kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
      bias.mutable_data_ptr<float>(), counts.const_data_ptr<int64_t>(), bias.numel(), static_cast<float>(rate));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

TORCH_LIBRARY_IMPL(m2_ops, CUDA, m) {
  m.impl("router_topk", &router_topk);
  m.impl("router_replay", &router_replay);
  m.impl("router_backward", &router_backward);
  m.impl("router_bias_update", &router_bias_update);
}

}  // namespace m2::router

// Tokens to rows grouped by expert and back, on the GPU. The layout is a stable counting sort by chunks of slots, which needs no atomics
// and so repeats; rows move in pieces of 16 bytes where their width allows. Shape suffixes: T tokens, K experts per token, E experts, C
// chunks of slots, R rows, W width.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <torch/library.h>

#include "../common/warp.cuh"
#include "permute.h"

namespace m2::permute {
namespace {

constexpr int kThreads = 256;
constexpr int kScanThreads = 1024;
constexpr int64_t kMostChunks = 1024;    // and no less than 512 slots each
constexpr int64_t kMostExperts = 12288;  // a count of each in 48 KB of shared memory

// ---- device -----------------------------------------------------------------------------------------------------------------------

// A chunk of the routed slots is one warp's, 32 at a time in order; `mine[e]` is what the warp knows of expert e. visit(slot, expert, rank
// among the lanes of that expert) runs before mine[expert] grows by the lanes of that expert.
template <typename Visit>
__device__ void each_slot(const int32_t* experts, int64_t routed, int64_t per_chunk, int32_t* mine, Visit visit) {
  const int64_t begin = blockIdx.x * per_chunk, end = min(begin + per_chunk, routed);
  const unsigned lane = threadIdx.x, below = (1u << lane) - 1;
  for (int64_t first = begin; first < end; first += kWarpSize) {
    const int64_t i = first + lane;
    const int32_t expert = i < end ? experts[i] : -1;
    const unsigned same = __match_any_sync(0xffffffffu, expert);
    if (i < end) visit(i, expert, __popc(same & below));
    __syncwarp();  // all have read what grows now
    if (expert >= 0 && (same & below) == 0) mine[expert] += __popc(same);
    __syncwarp();
  }
}

// counts_CE: of each chunk.
__global__ void count_kernel(const int32_t* experts, int64_t routed, int64_t per_chunk, int num_experts, int32_t* counts_CE) {
  extern __shared__ __align__(16) char memory[];
  int32_t* counts_E = reinterpret_cast<int32_t*>(memory);
  for (int e = threadIdx.x; e < num_experts; e += kWarpSize) counts_E[e] = 0;
  __syncwarp();
  each_slot(experts, routed, per_chunk, counts_E, [&](int64_t, int32_t expert, int) {
    CUDA_KERNEL_ASSERT(expert >= -1 && expert < num_experts && "permute: experts out of range");
  });
  for (int e = threadIdx.x; e < num_experts; e += kWarpSize) counts_CE[blockIdx.x * int64_t{num_experts} + e] = counts_E[e];
}

// Counts of a chunk become the first row of that chunk and expert: experts one after the other, each padded to whole blocks.
__global__ void __launch_bounds__(kScanThreads)
    start_kernel(int chunks, int num_experts, int64_t block, int32_t* counts_CE, int32_t* ends_E) {
  __shared__ int64_t sums[kScanThreads];
  int64_t before = 0;  // rows of the experts of earlier rounds
  for (int first = 0; first < num_experts; first += kScanThreads) {
    const int e = first + threadIdx.x;
    int32_t count = 0;
    if (e < num_experts) {
#pragma unroll 8
      for (int c = 0; c < chunks; ++c) count += counts_CE[c * int64_t{num_experts} + e];
    }
    sums[threadIdx.x] = (count + block - 1) / block * block;
    __syncthreads();
    for (int step = 1; step < kScanThreads; step *= 2) {  // inclusive sums
      const int64_t left = static_cast<int>(threadIdx.x) >= step ? sums[threadIdx.x - step] : 0;
      __syncthreads();
      sums[threadIdx.x] += left;
      __syncthreads();
    }
    if (e < num_experts) {
      ends_E[e] = static_cast<int32_t>(before + sums[threadIdx.x]);
      int32_t next = static_cast<int32_t>(before + (threadIdx.x ? sums[threadIdx.x - 1] : 0));
      constexpr int kTogether = 8;  // reads under way: none of them waits for a write
      for (int c = 0; c < chunks; c += kTogether) {
        int32_t mine[kTogether];
#pragma unroll
        for (int i = 0; i < kTogether; ++i) mine[i] = c + i < chunks ? counts_CE[(c + i) * int64_t{num_experts} + e] : 0;
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
          if (c + i < chunks) counts_CE[(c + i) * int64_t{num_experts} + e] = next;
          next += mine[i];
        }
      }
    }
    before += sums[kScanThreads - 1];
    __syncthreads();  // before the sums are written again
  }
}

__global__ void place_kernel(const int32_t* experts, int64_t routed, int64_t per_chunk, int64_t top_k, int num_experts, int64_t rows,
                             const int32_t* starts_CE, int32_t* token_R, int32_t* row_TK) {
  extern __shared__ __align__(16) char memory[];
  int32_t* next_E = reinterpret_cast<int32_t*>(memory);
  for (int e = threadIdx.x; e < num_experts; e += kWarpSize) next_E[e] = starts_CE[blockIdx.x * int64_t{num_experts} + e];
  __syncwarp();
  each_slot(experts, routed, per_chunk, next_E, [&](int64_t i, int32_t expert, int rank) {
    const int32_t row = expert < 0 ? -1 : next_E[expert] + rank;
    row_TK[i] = row;
    CUDA_KERNEL_ASSERT(row < rows && "permute: more slots have an expert than routed says");
    if (row >= 0) token_R[row] = static_cast<int32_t>(i / top_k);
  });
}

template <typename Piece>
__global__ void permute_kernel(const Piece* x_TW, int64_t stride, const int32_t* token_R, int64_t tokens, int64_t pieces, Piece* out_RW) {
  const int64_t r = blockIdx.x;
  const int32_t token = token_R[r];
  CUDA_KERNEL_ASSERT(token >= -1 && token < tokens);
  for (int64_t i = threadIdx.x; i < pieces; i += blockDim.x) out_RW[r * pieces + i] = token < 0 ? Piece{} : x_TW[token * stride + i];
}

// A piece of a row as floats.
template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
  T value[N];
};

template <typename T, int N>
__global__ void combine_kernel(const Pack<T, N>* rows_RW, const int32_t* row_TK, const float* weights_TK, int64_t top_k, int64_t rows,
                               int64_t pieces, Pack<T, N>* out_TW) {
  const int64_t t = blockIdx.x;
  for (int64_t i = threadIdx.x; i < pieces; i += blockDim.x) {
    float total[N] = {};
    for (int64_t k = 0; k < top_k; ++k) {
      const int32_t row = row_TK[t * top_k + k];
      CUDA_KERNEL_ASSERT(row >= -1 && row < rows);
      if (row < 0) continue;
      const float weight = weights_TK ? weights_TK[t * top_k + k] : 1.0f;
      const Pack<T, N> piece = rows_RW[row * pieces + i];
#pragma unroll
      for (int n = 0; n < N; ++n) total[n] += weight * static_cast<float>(piece.value[n]);
    }
    Pack<T, N> out;
#pragma unroll
    for (int n = 0; n < N; ++n) out.value[n] = static_cast<T>(total[n]);
    out_TW[t * pieces + i] = out;
  }
}

// A block per (token, slot), and one per row of padding.
template <typename T, int N>
__global__ void combine_backward_kernel(const Pack<T, N>* grad_TW, const Pack<T, N>* rows_RW, const int32_t* row_TK,
                                        const float* weights_TK, int64_t top_k, int64_t rows, int64_t pieces, Pack<T, N>* d_rows_RW,
                                        float* d_weights_TK) {
  const int64_t slot = blockIdx.x, t = slot / top_k;
  const int32_t row = row_TK[slot];
  CUDA_KERNEL_ASSERT(row >= -1 && row < rows);
  if (row < 0) {  // the same for a whole block
    if (threadIdx.x == 0) d_weights_TK[slot] = 0;
    return;
  }
  const float weight = weights_TK[slot];
  float dot = 0;
  for (int64_t i = threadIdx.x; i < pieces; i += kThreads) {
    const Pack<T, N> grad = grad_TW[t * pieces + i], piece = rows_RW[row * pieces + i];
    Pack<T, N> out;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      dot += static_cast<float>(grad.value[n]) * static_cast<float>(piece.value[n]);
      out.value[n] = static_cast<T>(static_cast<float>(grad.value[n]) * weight);
    }
    d_rows_RW[row * pieces + i] = out;
  }
  dot = block_sum<kThreads>(dot);
  if (threadIdx.x == 0) d_weights_TK[slot] = dot;
}

template <typename T, int N>
__global__ void clear_padding_kernel(const int32_t* token_R, int64_t pieces, Pack<T, N>* rows_RW) {
  if (token_R[blockIdx.x] >= 0) return;
  for (int64_t i = threadIdx.x; i < pieces; i += blockDim.x) rows_RW[blockIdx.x * pieces + i] = Pack<T, N>{};
}

// ---- host -------------------------------------------------------------------------------------------------------------------------

bool in_pieces_of_16(const at::Tensor& x) {
  return x.size(1) * x.element_size() % 16 == 0 && x.stride(0) * x.element_size() % 16 == 0 &&
         reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> permute_layout(const at::Tensor& experts_in, int64_t num_experts, int64_t block,
                                                              std::optional<int64_t> routed_in) {
  check_layout(experts_in, num_experts, block, routed_in);
  TORCH_CHECK_VALUE(num_experts <= kMostExperts, "num_experts: ", num_experts, ", need at most ", kMostExperts, " on a GPU");
  const c10::cuda::CUDAGuard guard(experts_in.device());
  const at::Tensor experts = experts_in.contiguous();
  const int64_t routed = experts.numel();  // slots, some of which may go nowhere
  at::Tensor token = at::full({most_rows(routed_in.value_or(routed), num_experts, block)}, -1, experts.options());
  at::Tensor row = at::empty_like(experts), ends = at::empty({num_experts}, experts.options());
  const int64_t per_chunk = std::max<int64_t>(512, (routed / kMostChunks + kWarpSize) / kWarpSize * kWarpSize),
                chunks = (routed + per_chunk - 1) / per_chunk;
  at::Tensor counts = at::empty({chunks, num_experts}, experts.options());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const int shared = static_cast<int>(num_experts * static_cast<int64_t>(sizeof(int32_t))), groups = static_cast<int>(num_experts);
  const int32_t* experts_TK = experts.const_data_ptr<int32_t>();
  int32_t* counts_CE = counts.mutable_data_ptr<int32_t>();
  if (chunks > 0) {
    count_kernel<<<chunks, kWarpSize, shared, stream>>>(experts_TK, routed, per_chunk, groups, counts_CE);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  start_kernel<<<1, kScanThreads, 0, stream>>>(static_cast<int>(chunks), groups, block, counts_CE, ends.mutable_data_ptr<int32_t>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  if (chunks > 0) {
    place_kernel<<<chunks, kWarpSize, shared, stream>>>(experts_TK, routed, per_chunk, experts.size(1), groups, token.size(0), counts_CE,
                                                        token.mutable_data_ptr<int32_t>(), row.mutable_data_ptr<int32_t>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return {ends, token, row};
}

// Calls run with a null pointer to the piece that fits the rows.
template <typename Run>
void by_piece(const at::Tensor& x, bool wide, Run run) {
  if (x.scalar_type() == at::kFloat) wide ? run(static_cast<Pack<float, 4>*>(nullptr)) : run(static_cast<Pack<float, 1>*>(nullptr));
  else wide ? run(static_cast<Pack<at::BFloat16, 8>*>(nullptr)) : run(static_cast<Pack<at::BFloat16, 1>*>(nullptr));
}

at::Tensor permute(const at::Tensor& x_in, const at::Tensor& token_in, const at::Tensor& row_in) {
  check_rows("x", x_in);
  check_index("token", token_in, 1, x_in);
  check_index("row", row_in, 2, x_in);
  const c10::cuda::CUDAGuard guard(x_in.device());
  const at::Tensor x = with_rows(x_in), token = token_in.contiguous();
  at::Tensor out = at::empty({token.size(0), x.size(1)}, x.options());
  if (out.numel() == 0) return out;
  by_piece(x, in_pieces_of_16(x), [&]<typename Piece>(Piece*) {
    const int64_t per_piece = static_cast<int64_t>(sizeof(Piece) / x.element_size()), pieces = x.size(1) / per_piece;
    permute_kernel<<<token.size(0), std::min<int64_t>(kThreads, (pieces + 31) / 32 * 32), 0, c10::cuda::getCurrentCUDAStream()>>>(
        static_cast<const Piece*>(x.const_data_ptr()), x.stride(0) / per_piece, token.const_data_ptr<int32_t>(), x.size(0), pieces,
        static_cast<Piece*>(out.mutable_data_ptr()));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return out;
}

at::Tensor unpermute(const at::Tensor& rows_in, const at::Tensor& token_in, const at::Tensor& row_in, const OptionalTensor& weights_in) {
  check_rows("rows", rows_in);
  check_index("token", token_in, 1, rows_in);
  check_index("row", row_in, 2, rows_in);
  check_weights(weights_in, row_in);
  const c10::cuda::CUDAGuard guard(rows_in.device());
  const at::Tensor rows = rows_in.contiguous(), row = row_in.contiguous(), weights = weights_in ? weights_in->contiguous() : at::Tensor();
  at::Tensor out = at::empty({row.size(0), rows.size(1)}, rows.options());
  if (out.numel() == 0) return out;
  by_piece(rows, in_pieces_of_16(rows), [&]<typename T, int N>(Pack<T, N>*) {
    const int64_t pieces = rows.size(1) / N;
    combine_kernel<T, N><<<row.size(0), std::min<int64_t>(kThreads, (pieces + 31) / 32 * 32), 0, c10::cuda::getCurrentCUDAStream()>>>(
        static_cast<const Pack<T, N>*>(rows.const_data_ptr()), row.const_data_ptr<int32_t>(),
        weights_in ? weights.const_data_ptr<float>() : nullptr, row.size(1), rows.size(0), pieces,
        static_cast<Pack<T, N>*>(out.mutable_data_ptr()));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor> unpermute_backward(const at::Tensor& grad_in, const at::Tensor& rows_in, const at::Tensor& token_in,
                                                      const at::Tensor& row_in, const at::Tensor& weights_in) {
  check_backward(grad_in, rows_in, token_in, row_in, weights_in);
  const c10::cuda::CUDAGuard guard(rows_in.device());
  const at::Tensor grad = grad_in.contiguous(), rows = rows_in.contiguous(), token = token_in.contiguous(), row = row_in.contiguous();
  const at::Tensor weights = weights_in.contiguous();
  at::Tensor d_rows = at::empty_like(rows), d_weights = at::empty_like(weights);
  if (rows.numel() == 0) return {d_rows, d_weights};
  const auto stream = c10::cuda::getCurrentCUDAStream();
  by_piece(rows, in_pieces_of_16(rows) && in_pieces_of_16(grad), [&]<typename T, int N>(Pack<T, N>*) {
    const int64_t pieces = rows.size(1) / N;
    auto* out = static_cast<Pack<T, N>*>(d_rows.mutable_data_ptr());
    clear_padding_kernel<T, N><<<rows.size(0), kThreads, 0, stream>>>(token.const_data_ptr<int32_t>(), pieces, out);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    if (row.numel() == 0) return;
    combine_backward_kernel<T, N><<<row.numel(), kThreads, 0, stream>>>(
        static_cast<const Pack<T, N>*>(grad.const_data_ptr()), static_cast<const Pack<T, N>*>(rows.const_data_ptr()),
        row.const_data_ptr<int32_t>(), weights.const_data_ptr<float>(), row.size(1), rows.size(0), pieces, out,
        d_weights.mutable_data_ptr<float>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {d_rows, d_weights};
}

}  // namespace

TORCH_LIBRARY_IMPL(m2_ops, CUDA, m) {
  m.impl("permute_layout", &permute_layout);
  m.impl("permute", &permute);
  m.impl("unpermute", &unpermute);
  m.impl("unpermute_backward", &unpermute_backward);
}

}  // namespace m2::permute

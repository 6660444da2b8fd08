// Tokens to rows grouped by expert and back, on the GPU. The layout is a stable counting sort with a block per expert, which needs no
// atomics and so repeats; rows move in pieces of 16 bytes where their width allows.
// Shape suffixes: T tokens, K experts per token, E experts, R rows, W width.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <torch/library.h>

#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>

#include "../common/warp.cuh"
#include "permute.h"

namespace m2::permute {
namespace {

constexpr int kThreads = 256;
constexpr int kSortThreads = 512;

// ---- device -----------------------------------------------------------------------------------------------------------------------

__global__ void count_kernel(const int32_t* experts, int64_t routed, int64_t num_experts, int32_t* counts_E) {
  using Reduce = cub::BlockReduce<int, kSortThreads>;
  __shared__ typename Reduce::TempStorage storage;
  int count = 0;
  for (int64_t i = threadIdx.x; i < routed; i += kSortThreads) {
    CUDA_KERNEL_ASSERT(experts[i] >= -1 && experts[i] < num_experts);
    count += experts[i] == static_cast<int32_t>(blockIdx.x);
  }
  const int total = Reduce(storage).Sum(count);
  if (threadIdx.x == 0) counts_E[blockIdx.x] = total;
}

// Each expert finds where its rows begin by adding up those before it: E is at most some hundreds.
__global__ void place_kernel(const int32_t* experts, int64_t routed, int64_t top_k, int64_t block, int64_t rows, const int32_t* counts_E,
                             int32_t* ends_E, int32_t* token_R, int32_t* row_TK) {
  using Scan = cub::BlockScan<int, kSortThreads>;
  using Reduce = cub::BlockReduce<int64_t, kSortThreads>;
  __shared__ typename Scan::TempStorage scan_storage;
  __shared__ typename Reduce::TempStorage reduce_storage;
  __shared__ int64_t start;
  const int expert = blockIdx.x;
  int64_t before = 0;
  for (int e = threadIdx.x; e < expert; e += kSortThreads) before += (counts_E[e] + block - 1) / block * block;
  before = Reduce(reduce_storage).Sum(before);
  if (threadIdx.x == 0) {
    start = before;
    ends_E[expert] = static_cast<int32_t>(before + (counts_E[expert] + block - 1) / block * block);
  }
  __syncthreads();
  int64_t next = start;
  for (int64_t first = 0; first < routed; first += kSortThreads) {
    const int64_t i = first + threadIdx.x;
    const int mine = i < routed && experts[i] == expert;
    int rank, total;
    Scan(scan_storage).ExclusiveSum(mine, rank, total);
    if (mine) {
      CUDA_KERNEL_ASSERT(next + rank < rows);
      row_TK[i] = static_cast<int32_t>(next + rank);
      token_R[next + rank] = static_cast<int32_t>(i / top_k);
    }
    next += total;
    __syncthreads();  // before the storage is used again
  }
  if (expert == 0) {  // the first block also marks what goes nowhere
    for (int64_t i = threadIdx.x; i < routed; i += kSortThreads)
      if (experts[i] < 0) row_TK[i] = -1;
  }
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
  const c10::cuda::CUDAGuard guard(experts_in.device());
  const at::Tensor experts = experts_in.contiguous();
  const int64_t routed = experts.numel();  // slots, some of which may go nowhere
  at::Tensor token = at::full({most_rows(routed_in.value_or(routed), num_experts, block)}, -1, experts.options());
  at::Tensor row = at::empty_like(experts), ends = at::empty({num_experts}, experts.options()), counts = at::empty_like(ends);
  const auto stream = c10::cuda::getCurrentCUDAStream();
  count_kernel<<<num_experts, kSortThreads, 0, stream>>>(experts.const_data_ptr<int32_t>(), routed, num_experts,
                                                         counts.mutable_data_ptr<int32_t>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  place_kernel<<<num_experts, kSortThreads, 0, stream>>>(experts.const_data_ptr<int32_t>(), routed, std::max<int64_t>(1, experts.size(1)),
                                                         block, token.size(0), counts.const_data_ptr<int32_t>(),
                                                         ends.mutable_data_ptr<int32_t>(), token.mutable_data_ptr<int32_t>(),
                                                         row.mutable_data_ptr<int32_t>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
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

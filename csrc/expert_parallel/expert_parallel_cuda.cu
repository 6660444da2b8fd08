// Dispatch and combine on the GPU: a block per token copies its bytes to, and adds its rows up from, the ranks that have one of its
// experts. The rows to write may be another GPU's memory.
// Shape suffixes: T tokens, K experts per token, R ranks, W width, M rows of messages, P blocks of 128 values.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/Float8_e4m3fn.h>
#include <torch/library.h>

#include <cub/block/block_scan.cuh>
#include <vector>

#include "../common/warp.cuh"
#include "expert_parallel.h"

namespace m2::expert_parallel {
namespace {

constexpr int kThreads = 256;
constexpr int kPlanThreads = 512;

// The rows of each rank.
template <typename Byte>
struct Rows {
  Byte* data[kMaxRanks];
  int32_t count[kMaxRanks];
};

// ---- device -----------------------------------------------------------------------------------------------------------------------

// A block per rank goes over all tokens and counts those that have an expert there.
__global__ void plan_kernel(const int32_t* experts_TK, int64_t tokens, int64_t top_k, int64_t num_experts, int32_t* counts_R2,
                            int32_t* row_TR) {
  using Scan = cub::BlockScan<int, kPlanThreads>;
  __shared__ typename Scan::TempStorage storage;
  const int64_t rank = blockIdx.x, ranks = gridDim.x, per_rank = num_experts / ranks;
  int rows = 0, choices = 0;
  for (int64_t first = 0; first < tokens; first += kPlanThreads) {
    const int64_t t = first + threadIdx.x;
    int mine = 0;
    for (int64_t k = 0; t < tokens && k < top_k; ++k) {
      const int32_t expert = experts_TK[t * top_k + k];
      CUDA_KERNEL_ASSERT(expert >= -1 && expert < num_experts);
      mine += expert >= 0 && expert / per_rank == rank;
    }
    int before, total;
    Scan(storage).ExclusiveSum(mine > 0, before, total);
    if (t < tokens) row_TR[t * ranks + rank] = mine ? rows + before : -1;
    rows += total;
    __syncthreads();  // before the storage is used again
    Scan(storage).ExclusiveSum(mine, before, total);
    choices += total;
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    counts_R2[2 * rank] = rows;
    counts_R2[2 * rank + 1] = choices;
  }
}

// A part of a row in pieces of one size, read once and written to every rank.
template <typename Piece>
__device__ void copy_part(const Part& part, const Rows<char>& out, const int32_t* row_R, int ranks, int64_t bytes) {
  const Piece* from = reinterpret_cast<const Piece*>(part.data + blockIdx.x * part.stride);
  for (int64_t i = threadIdx.x; i < part.bytes / static_cast<int64_t>(sizeof(Piece)); i += blockDim.x) {
    const Piece piece = from[i];
    for (int r = 0; r < ranks; ++r)
      if (row_R[r] >= 0 && out.count[r] > 0) reinterpret_cast<Piece*>(out.data[r] + row_R[r] * bytes + part.at)[i] = piece;
  }
}

// `pieces`: bytes of each part's pieces.
struct Pieces {
  int bytes[kMaxParts];
};

__global__ void pack_kernel(const __grid_constant__ Parts parts, const __grid_constant__ Pieces pieces, const int32_t* experts_TK,
                            int64_t top_k, int64_t experts_at, int64_t per_rank, const int32_t* row_TR, int ranks,
                            const __grid_constant__ Rows<char> out, int64_t bytes) {
  const int32_t* row_R = row_TR + blockIdx.x * static_cast<int64_t>(ranks);
  for (int r = threadIdx.x; r < ranks; r += blockDim.x) CUDA_KERNEL_ASSERT(row_R[r] < out.count[r] || out.count[r] == 0);
  for (int i = 0; i < parts.count; ++i) {
    if (pieces.bytes[i] == 16) copy_part<uint4>(parts.part[i], out, row_R, ranks, bytes);
    else if (pieces.bytes[i] == 4) copy_part<uint32_t>(parts.part[i], out, row_R, ranks, bytes);
    else copy_part<char>(parts.part[i], out, row_R, ranks, bytes);
  }
  for (int64_t i = threadIdx.x; i < ranks * top_k; i += blockDim.x) {
    const int64_t r = i / top_k, k = i % top_k, here = experts_TK[blockIdx.x * top_k + k] - r * per_rank;
    if (row_R[r] < 0 || out.count[r] == 0) continue;
    reinterpret_cast<int32_t*>(out.data[r] + row_R[r] * bytes + experts_at)[k] =
        here >= 0 && here < per_rank ? static_cast<int32_t>(here) : -1;
  }
}

template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
  T value[N];
};

template <typename T, int N>
__global__ void combine_kernel(const __grid_constant__ Rows<const char> rows, const int32_t* row_TR, int ranks, int64_t pieces,
                               Pack<T, N>* out_TW) {
  using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const int32_t* row_R = row_TR + blockIdx.x * static_cast<int64_t>(ranks);
  for (int64_t i = threadIdx.x; i < pieces; i += blockDim.x) {
    Wide total[N] = {};
    for (int r = 0; r < ranks; ++r) {
      CUDA_KERNEL_ASSERT(row_R[r] >= -1 && row_R[r] < rows.count[r]);
      if (row_R[r] < 0) continue;
      const Pack<T, N> piece = reinterpret_cast<const Pack<T, N>*>(rows.data[r])[row_R[r] * pieces + i];
#pragma unroll
      for (int n = 0; n < N; ++n) total[n] += static_cast<Wide>(piece.value[n]);
    }
    Pack<T, N> out;
#pragma unroll
    for (int n = 0; n < N; ++n) out.value[n] = static_cast<T>(total[n]);
    out_TW[blockIdx.x * pieces + i] = out;
  }
}

template <int N>
__global__ void dequantize_kernel(const uint8_t* codes, int64_t stride, const float* scales, int64_t scale_stride, int64_t pieces,
                                  Pack<c10::BFloat16, N>* out_MW) {
  const Pack<uint8_t, N>* codes_W = reinterpret_cast<const Pack<uint8_t, N>*>(codes + blockIdx.x * stride);
  for (int64_t i = threadIdx.x; i < pieces; i += blockDim.x) {
    const Pack<uint8_t, N> code = codes_W[i];
    const float scale = scales[blockIdx.x * scale_stride + i * N / kScaleBlock];
    Pack<c10::BFloat16, N> out;
#pragma unroll
    for (int n = 0; n < N; ++n) out.value[n] = static_cast<float>(e4m3(code.value[n], e4m3::from_bits())) * scale;
    out_MW[blockIdx.x * pieces + i] = out;
  }
}

// ---- host -------------------------------------------------------------------------------------------------------------------------

int threads_for(int64_t pieces) { return static_cast<int>(std::clamp<int64_t>((pieces + 31) / 32 * 32, 32, kThreads)); }

int64_t address(const void* pointer) { return reinterpret_cast<int64_t>(pointer); }

std::tuple<at::Tensor, at::Tensor> ep_plan(const at::Tensor& experts_in, int64_t num_experts, int64_t ranks) {
  check_plan(experts_in, num_experts, ranks);
  const c10::cuda::CUDAGuard guard(experts_in.device());
  const at::Tensor experts = experts_in.contiguous();
  at::Tensor counts = at::empty({ranks, 2}, experts.options()), row = at::empty({experts.size(0), ranks}, experts.options());
  plan_kernel<<<ranks, kPlanThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
      experts.const_data_ptr<int32_t>(), experts.size(0), experts.size(1), num_experts, counts.mutable_data_ptr<int32_t>(),
      row.mutable_data_ptr<int32_t>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {counts, row};
}

// The widest pieces that the part's rows here and there are made of.
int piece_bytes(const Part& part, int64_t out_alignment) {
  const int64_t all = address(part.data) | part.stride | part.bytes | part.at | out_alignment;
  return all % 16 == 0 ? 16 : all % 4 == 0 ? 4 : 1;
}

void ep_pack(at::TensorList parts_in, const OptionalTensor& experts_in, const at::Tensor& row_in, int64_t per_rank, at::IntArrayRef at,
             at::TensorList out) {
  check_pack(parts_in, experts_in, row_in, per_rank, at, out);
  const c10::cuda::CUDAGuard guard(row_in.device());
  std::vector<at::Tensor> kept;
  for (const at::Tensor& x : parts_in) kept.push_back(with_rows(x));
  const Parts parts = parts_of(kept, at);
  const at::Tensor row = row_in.contiguous(), experts = experts_in ? experts_in->contiguous() : at::Tensor();
  const int64_t bytes = out[0].size(1);
  if (row.size(0) == 0) return;
  Rows<char> to{};
  int64_t alignment = bytes;
  for (size_t r = 0; r < out.size(); ++r) {
    to.data[r] = static_cast<char*>(out[r].mutable_data_ptr());
    to.count[r] = static_cast<int32_t>(out[r].size(0));
    if (to.count[r]) alignment |= address(to.data[r]);
  }
  Pieces pieces{};
  for (int i = 0; i < parts.count; ++i) pieces.bytes[i] = piece_bytes(parts.part[i], alignment);
  pack_kernel<<<row.size(0), threads_for(parts.part[0].bytes / pieces.bytes[0]), 0, c10::cuda::getCurrentCUDAStream()>>>(
      parts, pieces, experts_in ? experts.const_data_ptr<int32_t>() : nullptr, experts_in ? experts.size(1) : 0, at.back(), per_rank,
      row.const_data_ptr<int32_t>(), static_cast<int>(row.size(1)), to, bytes);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

at::Tensor ep_combine(at::TensorList rows, const at::Tensor& row_in) {
  check_combine(rows, row_in);
  const c10::cuda::CUDAGuard guard(row_in.device());
  const at::Tensor row = row_in.contiguous();
  at::Tensor out = at::empty({row.size(0), rows[0].size(1)}, rows[0].options());
  if (out.numel() == 0) return out;
  Rows<const char> from{};
  int64_t alignment = out.size(1) * static_cast<int64_t>(out.element_size());
  for (size_t r = 0; r < rows.size(); ++r) {
    from.data[r] = static_cast<const char*>(rows[r].const_data_ptr());
    from.count[r] = static_cast<int32_t>(rows[r].size(0));
    if (from.count[r]) alignment |= address(from.data[r]);
  }
  const auto run = [&]<typename T, int N>(Pack<T, N>*) {
    const int64_t pieces = out.size(1) / N;
    combine_kernel<T, N><<<row.size(0), threads_for(pieces), 0, c10::cuda::getCurrentCUDAStream()>>>(
        from, row.const_data_ptr<int32_t>(), static_cast<int>(row.size(1)), pieces, static_cast<Pack<T, N>*>(out.mutable_data_ptr()));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  };
  const auto of = [&]<typename T>(T*) {
    if (alignment % 16 == 0) run(static_cast<Pack<T, 16 / sizeof(T)>*>(nullptr));
    else run(static_cast<Pack<T, 1>*>(nullptr));
  };
  if (out.scalar_type() == at::kDouble) of(static_cast<double*>(nullptr));
  else if (out.scalar_type() == at::kFloat) of(static_cast<float*>(nullptr));
  else of(static_cast<c10::BFloat16*>(nullptr));
  return out;
}

at::Tensor ep_dequantize(const at::Tensor& codes_in, const at::Tensor& scales_in) {
  check_dequantize(codes_in, scales_in);
  const c10::cuda::CUDAGuard guard(codes_in.device());
  const at::Tensor codes = with_rows(codes_in), scales = with_rows(scales_in);
  at::Tensor out = at::empty(codes.sizes(), codes.options().dtype(at::kBFloat16));
  if (out.numel() == 0) return out;
  const uint8_t* from = static_cast<const uint8_t*>(codes.const_data_ptr());
  const auto run = [&]<int N>(Pack<c10::BFloat16, N>*) {
    const int64_t pieces = codes.size(1) / N;
    dequantize_kernel<N><<<codes.size(0), threads_for(pieces), 0, c10::cuda::getCurrentCUDAStream()>>>(
        from, codes.stride(0), scales.const_data_ptr<float>(), scales.stride(0), pieces,
        static_cast<Pack<c10::BFloat16, N>*>(out.mutable_data_ptr()));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  };
  if ((codes.size(1) | codes.stride(0) | address(from)) % 8 == 0) run(static_cast<Pack<c10::BFloat16, 8>*>(nullptr));
  else run(static_cast<Pack<c10::BFloat16, 1>*>(nullptr));
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(m2_ops, CUDA, m) {
  m.impl("ep_plan", &ep_plan);
  m.impl("ep_pack", &ep_pack);
  m.impl("ep_combine", &ep_combine);
  m.impl("ep_dequantize", &ep_dequantize);
}

}  // namespace m2::expert_parallel

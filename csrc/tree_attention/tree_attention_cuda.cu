// Prefix-tree attention on the GPU: tiles of 64 queries by 64 keys, products by WMMA, tiles that nobody sees skipped. The backward makes
// its probabilities twice, once per query tile for dQ and once per key tile for dK and dV, so that nothing is added atomically and
// results repeat bit for bit.
// Shape suffixes: Q queries, T keys, H query heads, G key/value heads, D head_dim.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cuda_bf16.h>
#include <mma.h>

#include "../common/warp.cuh"
#include "tree_attention.h"

namespace m2::tree_attention {
namespace {

using half_t = __nv_bfloat16;
using namespace nvcuda;

constexpr int kTile = 64;      // queries, and keys
constexpr int kThreads = 128;  // a warp per 16 rows of a tile; two threads per row in what is done row by row
constexpr int kScoreLd = kTile + 4, kProbLd = kTile + 8;
constexpr float kLog2e = 1.4426950408889634f;

// ---- device -----------------------------------------------------------------------------------------------------------------------

// Rows of [n, heads, D] with any stride of the first two dimensions.
struct Rows {
  const half_t* data;
  int64_t row, head;
  __device__ const half_t* at(int64_t r, int64_t h) const { return data + r * row + h * head; }
};

struct Problem {
  Rows q, k, v;
  const int32_t *ends, *most;  // most: greatest end of each key tile
  int queries, keys, query_start, heads, share;
  float scale;
  __device__ bool sees(int token, int key) const { return key <= token && key < keys && ends[key] > token; }
};

// The greatest end of each tile of keys, a warp each.
__global__ void most_kernel(const int32_t* ends_T, int tokens, int32_t* most) {
  const int tile = blockIdx.x * (kThreads / kWarpSize) + threadIdx.x / kWarpSize, first = tile * kTile + threadIdx.x % kWarpSize;
  if (tile * kTile >= tokens) return;  // the same for a whole warp
  unsigned end = 0;
  for (int i = first; i < min(tokens, (tile + 1) * kTile); i += kWarpSize) end = max(end, static_cast<unsigned>(max(ends_T[i], 0)));
  end = __reduce_max_sync(0xffffffffu, end);
  if (threadIdx.x % kWarpSize == 0) most[tile] = static_cast<int32_t>(end);
}

// Subtrees nest when each ends within the nearest one before it that is still open; tiles in which none is open are passed over.
__global__ void check_forest_kernel(const int32_t* ends_T, const int32_t* most, int tokens) {
  const int t = blockIdx.x * blockDim.x + threadIdx.x;
  if (t >= tokens) return;
  int before = t - 1;
  while (before >= 0 && ends_T[before] <= t) {
    --before;
    while (before >= 0 && before % kTile == kTile - 1 && most[before / kTile] <= t) before -= kTile;
  }
  const int open = before < 0 ? tokens : ends_T[before];
  CUDA_KERNEL_ASSERT(ends_T[t] > t && ends_T[t] <= open && "subtree_end: no forest in depth-first preorder");
}

template <int D>
constexpr int kLd = D + 8;  // of a tile of rows in shared memory: no two rows of a fragment in the same banks

// Rows first .. first + 63 of one head, zeros from `count` on.
template <int D>
__device__ void load_tile(half_t* to, const Rows& from, int64_t first, int64_t head, int count) {
  for (int i = threadIdx.x; i < kTile * D / 8; i += kThreads) {
    const int r = i / (D / 8), c = i % (D / 8) * 8;
    *reinterpret_cast<uint4*>(to + r * kLd<D> + c) = r < count ? *reinterpret_cast<const uint4*>(from.at(first + r, head) + c) : uint4{};
  }
}

using Sums = wmma::fragment<wmma::accumulator, 16, 16, 16, float>;

// This warp's 16 rows of a b^T, both [64, D], to scores [64, 64].
template <int D>
__device__ void rows_by_rows(const half_t* a, const half_t* b, float* scores) {
  const int row = threadIdx.x / kWarpSize * 16;
  wmma::fragment<wmma::matrix_a, 16, 16, 16, half_t, wmma::row_major> left;
  wmma::fragment<wmma::matrix_b, 16, 16, 16, half_t, wmma::col_major> right;
  for (int n = 0; n < kTile; n += 16) {
    Sums sums;
    wmma::fill_fragment(sums, 0.0f);
#pragma unroll
    for (int k = 0; k < D; k += 16) {
      wmma::load_matrix_sync(left, a + row * kLd<D> + k, kLd<D>);
      wmma::load_matrix_sync(right, b + n * kLd<D> + k, kLd<D>);
      wmma::mma_sync(sums, left, right, sums);
    }
    wmma::store_matrix_sync(scores + row * kScoreLd + n, sums, kScoreLd, wmma::mem_row_major);
  }
}

// sums[i] += this warp's 16 rows of p [64, 64] times columns 16 i .. of b [64, D].
template <int D>
__device__ void add_product(const half_t* p, const half_t* b, Sums (&sums)[D / 16]) {
  const int row = threadIdx.x / kWarpSize * 16;
  wmma::fragment<wmma::matrix_a, 16, 16, 16, half_t, wmma::row_major> left;
  wmma::fragment<wmma::matrix_b, 16, 16, 16, half_t, wmma::row_major> right;
  for (int k = 0; k < kTile; k += 16) {
    wmma::load_matrix_sync(left, p + row * kProbLd + k, kProbLd);
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
      wmma::load_matrix_sync(right, b + k * kLd<D> + 16 * i, kLd<D>);
      wmma::mma_sync(sums[i], left, right, sums[i]);
    }
  }
}

// This warp's rows of sums to bf16 rows of a contiguous [n, heads, D], by way of 16 x D floats of its own in shared memory.
template <int D>
__device__ void write_rows(const Sums (&sums)[D / 16], float* scratch, half_t* out, int64_t first, int count, int64_t heads, int64_t head) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  float* mine = scratch + warp * 16 * D;
#pragma unroll
  for (int i = 0; i < D / 16; ++i) wmma::store_matrix_sync(mine + 16 * i, sums[i], D, wmma::mem_row_major);
  __syncwarp();
  for (int i = lane; i < 16 * D; i += kWarpSize) {
    const int r = warp * 16 + i / D;
    if (r < count) out[((first + r) * heads + head) * D + i % D] = __float2bfloat16(mine[i]);
  }
}

// FlashAttention's forward. The running sums of the output live in shared memory, since the layout of a fragment is not told.
template <int D>
__global__ void __launch_bounds__(kThreads) forward_kernel(Problem p, half_t* out_QHD, float* lse_QH) {
  extern __shared__ __align__(128) char memory[];
  half_t *q = reinterpret_cast<half_t*>(memory), *k = q + kTile * kLd<D>, *v = k + kTile * kLd<D>, *probs = v + kTile * kLd<D>;
  float *scores = reinterpret_cast<float*>(probs + kTile * kProbLd), *out = scores + kTile * kScoreLd;
  constexpr int kOutLd = D + 4;
  const int tile = gridDim.x - 1 - blockIdx.x, head = blockIdx.y, first = tile * kTile, count = min(kTile, p.queries - first);
  const int row = threadIdx.x / 2, part = threadIdx.x % 2, first_token = p.query_start + first, token = first_token + row,
            warp_row = threadIdx.x / kWarpSize * 16;
  float top = -INFINITY, total = 0;
  load_tile<D>(q, p.q, first, head, count);
  for (int i = threadIdx.x; i < kTile * kOutLd; i += kThreads) out[i] = 0;
  for (int j = 0; j <= (first_token + count - 1) / kTile; ++j) {
    if (p.most[j] <= first_token) continue;
    __syncthreads();  // the last tile has been used
    load_tile<D>(k, p.k, j * kTile, head / p.share, p.keys - j * kTile);
    load_tile<D>(v, p.v, j * kTile, head / p.share, p.keys - j * kTile);
    __syncthreads();
    rows_by_rows<D>(q, k, scores);
    __syncwarp();  // from here on a warp works on its own 16 rows
    float best = top;
    for (int c = part; c < kTile; c += 2) {
      float& score = scores[row * kScoreLd + c];
      score = row < count && p.sees(token, j * kTile + c) ? score * p.scale * kLog2e : -INFINITY;
      best = fmaxf(best, score);
    }
    best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, 1));
    const float base = best == -INFINITY ? 0.0f : best, shrink = exp2f(top - base);
    float sum = 0;
    for (int c = part; c < kTile; c += 2) {
      const float prob = exp2f(scores[row * kScoreLd + c] - base);
      sum += prob;
      probs[row * kProbLd + c] = __float2bfloat16(prob);
    }
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    total = total * shrink + sum, top = best;
    for (int d = part; d < D; d += 2) out[row * kOutLd + d] *= shrink;
    __syncwarp();
    Sums sums[D / 16];
#pragma unroll
    for (int i = 0; i < D / 16; ++i) wmma::load_matrix_sync(sums[i], out + warp_row * kOutLd + 16 * i, kOutLd, wmma::mem_row_major);
    add_product<D>(probs, v, sums);
#pragma unroll
    for (int i = 0; i < D / 16; ++i) wmma::store_matrix_sync(out + warp_row * kOutLd + 16 * i, sums[i], kOutLd, wmma::mem_row_major);
    __syncwarp();
  }
  if (row >= count) return;
  for (int d = part; d < D; d += 2)
    out_QHD[(static_cast<int64_t>(first + row) * p.heads + head) * D + d] = __float2bfloat16(out[row * kOutLd + d] / total);
  if (part == 0) lse_QH[static_cast<int64_t>(first + row) * p.heads + head] = top / kLog2e + logf(total);
}

// delta = <grad_out, out> - grad_lse of each (query, head), a warp each.
template <int D>
__global__ void delta_kernel(Rows grad, Rows out, const float* grad_lse_QH, int64_t count, int heads, float* delta_QH) {
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarpSize;
  if (i >= count) return;
  float total = 0;
  for (int d = threadIdx.x % kWarpSize; d < D; d += kWarpSize) {
    total += __bfloat162float(grad.at(i / heads, i % heads)[d]) * __bfloat162float(out.at(i / heads, i % heads)[d]);
  }
  total = warp_sum(total);
  if (threadIdx.x % kWarpSize == 0) delta_QH[i] = total - (grad_lse_QH ? grad_lse_QH[i] : 0.0f);
}

struct Upstream {
  Rows grad;
  const float *lse_QH, *delta_QH;
};

template <int D>
__global__ void __launch_bounds__(kThreads) dq_kernel(Problem p, Upstream up, half_t* dq_QHD) {
  extern __shared__ __align__(128) char memory[];
  half_t *q = reinterpret_cast<half_t*>(memory), *grad = q + kTile * kLd<D>, *k = grad + kTile * kLd<D>, *v = k + kTile * kLd<D>,
         *ds = v + kTile * kLd<D>;
  float *scores = reinterpret_cast<float*>(ds + kTile * kProbLd), *d_probs = scores + kTile * kScoreLd;
  const int tile = gridDim.x - 1 - blockIdx.x, head = blockIdx.y, first = tile * kTile, count = min(kTile, p.queries - first);
  const int row = threadIdx.x / 2, part = threadIdx.x % 2, first_token = p.query_start + first, token = first_token + row;
  const int64_t at = static_cast<int64_t>(first + row) * p.heads + head;
  const float lse = row < count ? up.lse_QH[at] * kLog2e : 0.0f, delta = row < count ? up.delta_QH[at] : 0.0f;
  load_tile<D>(q, p.q, first, head, count);
  load_tile<D>(grad, up.grad, first, head, count);
  Sums sums[D / 16];
#pragma unroll
  for (int i = 0; i < D / 16; ++i) wmma::fill_fragment(sums[i], 0.0f);
  for (int j = 0; j <= (first_token + count - 1) / kTile; ++j) {
    if (p.most[j] <= first_token) continue;
    __syncthreads();
    load_tile<D>(k, p.k, j * kTile, head / p.share, p.keys - j * kTile);
    load_tile<D>(v, p.v, j * kTile, head / p.share, p.keys - j * kTile);
    __syncthreads();
    rows_by_rows<D>(q, k, scores);
    rows_by_rows<D>(grad, v, d_probs);
    __syncwarp();
    for (int c = part; c < kTile; c += 2) {
      const bool seen = row < count && p.sees(token, j * kTile + c);
      const float prob = seen ? exp2f(scores[row * kScoreLd + c] * p.scale * kLog2e - lse) : 0.0f;
      ds[row * kProbLd + c] = __float2bfloat16(seen ? prob * (d_probs[row * kScoreLd + c] - delta) * p.scale : 0.0f);
    }
    __syncwarp();
    add_product<D>(ds, k, sums);
  }
  __syncthreads();  // the scores' memory, and more, becomes scratch
  write_rows<D>(sums, reinterpret_cast<float*>(memory), dq_QHD, first, count, p.heads, head);
}

// Keys as rows: P^T and dS^T are left-hand sides as they are.
template <int D>
__global__ void __launch_bounds__(kThreads) dkv_kernel(Problem p, Upstream up, half_t* dk_TGD, half_t* dv_TGD) {
  extern __shared__ __align__(128) char memory[];
  half_t *k = reinterpret_cast<half_t*>(memory), *v = k + kTile * kLd<D>, *q = v + kTile * kLd<D>, *grad = q + kTile * kLd<D>;
  half_t *probs = grad + kTile * kLd<D>, *ds = probs + kTile * kProbLd;
  float *scores = reinterpret_cast<float*>(ds + kTile * kProbLd), *d_probs = scores + kTile * kScoreLd;
  const int first_key = blockIdx.x * kTile, kv_head = blockIdx.y, count = min(kTile, p.keys - first_key), kv_heads = p.heads / p.share;
  const int row = threadIdx.x / 2, part = threadIdx.x % 2, key = first_key + row;
  load_tile<D>(k, p.k, first_key, kv_head, count);
  load_tile<D>(v, p.v, first_key, kv_head, count);
  Sums d_keys[D / 16], d_values[D / 16];
#pragma unroll
  for (int i = 0; i < D / 16; ++i) {
    wmma::fill_fragment(d_keys[i], 0.0f);
    wmma::fill_fragment(d_values[i], 0.0f);
  }
  // queries from the first key on until the last subtree of the tile ends
  const int begin = max(0, first_key - p.query_start), end = min(p.queries, p.most[blockIdx.x] - p.query_start);
  for (int first = begin / kTile * kTile; first < end; first += kTile) {
    const int queries = min(kTile, p.queries - first);
    for (int head = kv_head * p.share; head < (kv_head + 1) * p.share; ++head) {
      __syncthreads();
      load_tile<D>(q, p.q, first, head, queries);
      load_tile<D>(grad, up.grad, first, head, queries);
      __syncthreads();
      rows_by_rows<D>(k, q, scores);
      rows_by_rows<D>(v, grad, d_probs);
      __syncwarp();
      for (int c = part; c < kTile; c += 2) {
        const bool seen = c < queries && row < count && p.sees(p.query_start + first + c, key);
        const int64_t at = static_cast<int64_t>(first + c) * p.heads + head;
        const float prob = seen ? exp2f((scores[row * kScoreLd + c] * p.scale - up.lse_QH[at]) * kLog2e) : 0.0f;
        probs[row * kProbLd + c] = __float2bfloat16(prob);
        ds[row * kProbLd + c] = __float2bfloat16(seen ? prob * (d_probs[row * kScoreLd + c] - up.delta_QH[at]) * p.scale : 0.0f);
      }
      __syncwarp();
      add_product<D>(probs, grad, d_values);
      add_product<D>(ds, q, d_keys);
    }
  }
  __syncthreads();
  float* scratch = reinterpret_cast<float*>(memory);
  write_rows<D>(d_keys, scratch, dk_TGD, first_key, count, kv_heads, kv_head);
  __syncwarp();
  write_rows<D>(d_values, scratch, dv_TGD, first_key, count, kv_heads, kv_head);
}

// ---- host -------------------------------------------------------------------------------------------------------------------------

// Rows that can be read in pieces of 16 bytes.
at::Tensor readable(const at::Tensor& x) {
  const bool fits =
      x.stride(2) == 1 && x.stride(0) % 8 == 0 && x.stride(1) % 8 == 0 && reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
  return fits ? x : x.clone(at::MemoryFormat::Contiguous);
}

Rows rows(const at::Tensor& x) { return {reinterpret_cast<const half_t*>(x.const_data_ptr<at::BFloat16>()), x.stride(0), x.stride(1)}; }

half_t* out_data(at::Tensor& x) { return reinterpret_cast<half_t*>(x.mutable_data_ptr<at::BFloat16>()); }

// Shared memory of `tiles` tiles of rows, `probs` of probabilities, `scores` of scores, and more floats; at least what write_rows takes.
template <int D>
int shared_bytes(int tiles, int probs, int scores, int floats) {
  const int bytes = 2 * kTile * (tiles * kLd<D> + probs * kProbLd) + 4 * (scores * kTile * kScoreLd + floats);
  return std::max(bytes, static_cast<int>(sizeof(float)) * kTile * D);
}

template <typename Kernel>
void allow_shared(Kernel kernel, int bytes) {
  C10_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
}

// The tensors that a Problem points into.
struct Held {
  at::Tensor q, k, v, ends, most;

  Held(const Shape& s, const at::Tensor& q_in, const at::Tensor& k_in, const at::Tensor& v_in, const at::Tensor& subtree_end)
      : q(readable(q_in)),
        k(readable(k_in)),
        v(readable(v_in)),
        ends(subtree_end.contiguous()),
        most(at::empty({(s.keys + kTile - 1) / kTile}, ends.options())) {
    const int64_t per_block = kThreads / kWarpSize, tiles = most.numel();
    most_kernel<<<(tiles + per_block - 1) / per_block, kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
        ends.const_data_ptr<int32_t>(), static_cast<int>(s.keys), most.mutable_data_ptr<int32_t>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  void assert_forest() const {
    const int64_t tokens = ends.numel();
    check_forest_kernel<<<(tokens + kThreads - 1) / kThreads, kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
        ends.const_data_ptr<int32_t>(), most.const_data_ptr<int32_t>(), static_cast<int>(tokens));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  Problem problem(const Shape& s) const {
    return {rows(q),
            rows(k),
            rows(v),
            ends.const_data_ptr<int32_t>(),
            most.const_data_ptr<int32_t>(),
            static_cast<int>(s.queries),
            static_cast<int>(s.keys),
            static_cast<int>(s.query_start),
            static_cast<int>(s.heads),
            static_cast<int>(s.share()),
            1.0f / std::sqrt(static_cast<float>(s.head_dim))};
  }
};

// Calls run with the head dimension as a constant.
template <typename Run>
void by_head_dim(int64_t head_dim, Run run) {
  TORCH_CHECK_VALUE(head_dim == 64 || head_dim == 128, "q: head_dim ", head_dim, ", need 64 or 128 on a GPU");
  if (head_dim == 64) run(std::integral_constant<int, 64>());
  else run(std::integral_constant<int, 128>());
}

std::tuple<at::Tensor, at::Tensor> tree_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                                  const at::Tensor& subtree_end, int64_t query_start) {
  const Shape s = check_inputs(q, k, v, subtree_end, query_start);
  const c10::cuda::CUDAGuard guard(q.device());
  at::Tensor out = at::empty({s.queries, s.heads, s.head_dim}, q.options()),
             lse = at::empty({s.queries, s.heads}, q.options().dtype(at::kFloat));
  if (s.queries == 0) return {out, lse};
  const Held held(s, q, k, v, subtree_end);
  held.assert_forest();
  by_head_dim(s.head_dim, [&](auto dim) {
    constexpr int D = decltype(dim)::value;
    const int bytes = shared_bytes<D>(3, 1, 1, kTile * (D + 4));
    allow_shared(forward_kernel<D>, bytes);
    const dim3 grid((s.queries + kTile - 1) / kTile, s.heads);
    forward_kernel<D>
        <<<grid, kThreads, bytes, c10::cuda::getCurrentCUDAStream()>>>(held.problem(s), out_data(out), lse.mutable_data_ptr<float>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {out, lse};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> tree_attention_backward(const at::Tensor& grad_out,
                                                                       const std::optional<at::Tensor>& grad_lse, const at::Tensor& q,
                                                                       const at::Tensor& k, const at::Tensor& v, const at::Tensor& out,
                                                                       const at::Tensor& lse_in, const at::Tensor& subtree_end,
                                                                       int64_t query_start) {
  const Shape s = check_inputs(q, k, v, subtree_end, query_start);
  check_backward(grad_out, q, out, lse_in, grad_lse);
  const c10::cuda::CUDAGuard guard(q.device());
  at::Tensor dq = at::empty(q.sizes(), q.options());
  if (s.queries == 0) return {dq, at::zeros(k.sizes(), k.options()), at::zeros(v.sizes(), v.options())};
  at::Tensor dk = at::empty(k.sizes(), k.options()), dv = at::empty(v.sizes(), v.options());
  const Held held(s, q, k, v, subtree_end);
  const at::Tensor grad = readable(grad_out), forward_out = readable(out), lse = lse_in.contiguous();
  const at::Tensor lse_gradient = grad_lse ? grad_lse->contiguous() : at::Tensor();
  at::Tensor delta = at::empty({s.queries, s.heads}, lse.options());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  by_head_dim(s.head_dim, [&](auto dim) {
    constexpr int D = decltype(dim)::value;
    const int64_t count = s.queries * s.heads, per_block = kThreads / kWarpSize;
    delta_kernel<D><<<(count + per_block - 1) / per_block, kThreads, 0, stream>>>(
        rows(grad), rows(forward_out), grad_lse ? lse_gradient.const_data_ptr<float>() : nullptr, count, static_cast<int>(s.heads),
        delta.mutable_data_ptr<float>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    const Upstream up{rows(grad), lse.const_data_ptr<float>(), delta.const_data_ptr<float>()};
    const int dq_bytes = shared_bytes<D>(4, 1, 2, 0), dkv_bytes = shared_bytes<D>(4, 2, 2, 0);
    allow_shared(dq_kernel<D>, dq_bytes);
    allow_shared(dkv_kernel<D>, dkv_bytes);
    dq_kernel<D><<<dim3((s.queries + kTile - 1) / kTile, s.heads), kThreads, dq_bytes, stream>>>(held.problem(s), up, out_data(dq));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    dkv_kernel<D>
        <<<dim3((s.keys + kTile - 1) / kTile, s.kv_heads), kThreads, dkv_bytes, stream>>>(held.problem(s), up, out_data(dk), out_data(dv));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {dq, dk, dv};
}

}  // namespace

TORCH_LIBRARY_IMPL(m2_ops, CUDA, m) {
  m.impl("tree_attention", &tree_attention);
  m.impl("tree_attention_backward", &tree_attention_backward);
}

}  // namespace m2::tree_attention

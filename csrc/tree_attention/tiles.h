// Tiles of the attention matrix on the CPU: which of them exist, and how threads share them.
//
// A query tile holds the rows of all query heads that read one key/value head, so that a product has many rows where few tokens are
// left: row r is head r % share of token r / share. Keys come in tiles of kKeys.
#pragma once

#include "../common/brgemm.h"
#include "../common/lanes.h"

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "tree_attention.h"

namespace m2::tree_attention {

constexpr int64_t kKeys = 128;
constexpr float kLog2e = 1.4426950408889634f;

class Plan {
 public:
  Plan(const Shape& s, const int32_t* subtree_end_T, int64_t rows_per_tile)
      : shape(s),
        tile_tokens(std::max<int64_t>(1, rows_per_tile / s.share())),
        query_tiles((s.queries + tile_tokens - 1) / tile_tokens),
        key_tiles((s.query_start + s.queries + kKeys - 1) / kKeys),
        ends_(key_tiles * kKeys, 0),
        least_(key_tiles),
        most_(key_tiles) {
    const int64_t keys = s.query_start + s.queries;  // later ones are seen by no query
    std::copy_n(subtree_end_T, keys, ends_.begin());
    for (int64_t j = 0; j < key_tiles; ++j) {
      const auto [least, most] = std::minmax_element(ends_.begin() + j * kKeys, ends_.begin() + (j + 1) * kKeys);
      least_[j] = *least, most_[j] = *most;
    }
  }

  // Tokens of a query tile, counted as keys are, and its rows.
  int64_t first(int64_t tile) const { return shape.query_start + tile * tile_tokens; }
  int64_t tokens(int64_t tile) const { return std::min(tile_tokens, shape.queries - tile * tile_tokens); }
  int64_t rows(int64_t tile) const { return tokens(tile) * shape.share(); }
  int64_t most_rows() const { return round_up(tile_tokens * shape.share(), 32); }
  // As many as a product takes: multiples of 32, so that few shapes occur.
  int64_t padded_rows(int64_t tile) const { return round_up(rows(tile), 32); }

  int64_t last_key_tile(int64_t query_tile) const { return (first(query_tile) + tokens(query_tile) - 1) / kKeys; }
  // Whether any query of the tile sees any of the keys; whether all see all.
  bool visible(int64_t query_tile, int64_t key_tile) const {
    return key_tile <= last_key_tile(query_tile) && most_[key_tile] > first(query_tile);
  }
  bool full(int64_t query_tile, int64_t key_tile) const {
    return (key_tile + 1) * kKeys - 1 <= first(query_tile) && least_[key_tile] >= first(query_tile) + tokens(query_tile);
  }
  const int32_t* ends(int64_t key_tile) const { return ends_.data() + key_tile * kKeys; }
  int64_t keys_of(int64_t key_tile) const { return std::min(kKeys, shape.query_start + shape.queries - key_tile * kKeys); }

  Shape shape;
  int64_t tile_tokens, query_tiles, key_tiles;

 private:
  std::vector<int32_t> ends_;  // padded by keys that nothing sees
  std::vector<int32_t> least_, most_;
};

// 2^x to about 1e-7, 0 for -inf.
inline Lanes exp2(Lanes x) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m512 bounded = _mm512_max_ps(_mm512_set1_ps(-200.0f), x);  // of a NaN, the second operand is kept
  const __m512 whole = _mm512_roundscale_ps(bounded, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 r = _mm512_sub_ps(bounded, whole);
  __m512 p = _mm512_set1_ps(1.535336188319500e-4f);  // Cephes' exp2f, for |r| <= 1/2
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.339887440266574e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.618437357674640e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.550332471162809e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.402264791363012e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.931472028550421e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, whole);
#else
  return x.exp2();
#endif
}

// The rows of a query tile and one key/value head of a [Q, H, D] tensor, contiguous; rows up to `padded` are 0.
inline void gather_rows(const at::Tensor& x_QHD, const Plan& plan, int64_t tile, int64_t kv_head, int64_t padded, bf16* rows_MD) {
  const int64_t share = plan.shape.share(), dim = plan.shape.head_dim;
  const bf16* from = x_QHD.const_data_ptr<bf16>() + tile * plan.tile_tokens * x_QHD.stride(0) + kv_head * share * x_QHD.stride(1);
  bf16* to = rows_MD;
  for (int64_t t = 0; t < plan.tokens(tile); ++t) {
    for (int64_t h = 0; h < share; ++h, to += dim)
      std::memcpy(static_cast<void*>(to), from + t * x_QHD.stride(0) + h * x_QHD.stride(1), dim * sizeof(bf16));
  }
  std::memset(static_cast<void*>(to), 0, (rows_MD + padded * dim - to) * sizeof(bf16));
}

// The same rows back, to a contiguous [Q, H, D].
template <typename RowFactor>
void scatter_rows(const float* rows_MD, const Plan& plan, int64_t tile, int64_t kv_head, RowFactor factor, bf16* x_QHD) {
  const int64_t share = plan.shape.share(), dim = plan.shape.head_dim;
  for (int64_t r = 0; r < plan.rows(tile); ++r) {
    const Lanes scale(factor(r));
    bf16* to = x_QHD + ((tile * plan.tile_tokens + r / share) * plan.shape.heads + kv_head * share + r % share) * dim;
    for (int64_t d = 0; d < dim; d += kLanes)
      store(to + d, load(rows_MD + r * dim + d, std::min(kLanes, dim - d)) * scale, std::min(kLanes, dim - d));
  }
}

// Rows of one tensor whose last dimension is dense; the others may have any stride.
inline at::Tensor dense_rows(const at::Tensor& x) { return x.stride(2) == 1 || x.numel() == 0 ? x : x.contiguous(); }

// Runs work(state of the thread, task) for 0, 1, ...: whoever is free takes the next, since causal tiles differ in cost. A task may wait
// for lower ones, which have begun; `failed` ends its wait.
template <typename MakeState, typename Work>
void run_in_order(int64_t count, std::atomic<bool>& failed, MakeState make_state, Work work) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(count, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    auto state = make_state();
    try {
      for (int64_t i = next++; i < count && !failed; i = next++) work(state, i);
    } catch (...) {
      failed = true;
      throw;
    }
    brgemm_done();
  });
}

}  // namespace m2::tree_attention

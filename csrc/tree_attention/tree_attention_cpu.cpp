// Prefix-tree attention on the CPU, forward: online softmax over the visible key tiles of each query tile (FlashAttention-2).
// Shape suffixes: Q queries, T keys, H query heads, G key/value heads, D head_dim, M rows of a query tile, N keys of a key tile.
#include "tiles.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <limits>

namespace m2::tree_attention {
namespace {

constexpr int64_t kRows = 256;  // of a query tile
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Keys as the right-hand side of Q K^T and values as that of P V, each tile packed once for all query tiles.
struct PackedKeys {
  std::vector<bf16> keys, values;
  int64_t tiles, size;

  PackedKeys(const Plan& plan, const at::Tensor& k, const at::Tensor& v)
      : keys(plan.shape.kv_heads * plan.key_tiles * kKeys * plan.shape.head_dim),
        values(keys.size()),
        tiles(plan.key_tiles),
        size(kKeys * plan.shape.head_dim) {
    const int64_t dim = plan.shape.head_dim;
    at::parallel_for(0, plan.shape.kv_heads * tiles, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t g = i / tiles, tile = i % tiles, count = plan.keys_of(tile);
        pack_nk(k.const_data_ptr<bf16>() + tile * kKeys * k.stride(0) + g * k.stride(1), k.stride(0), dim, count, keys.data() + i * size,
                kKeys);
        pack_kn(v.const_data_ptr<bf16>() + tile * kKeys * v.stride(0) + g * v.stride(1), v.stride(0), count, dim, values.data() + i * size,
                dim);
      }
    });
  }
  const bf16* key_tile(int64_t g, int64_t tile) const { return keys.data() + (g * tiles + tile) * size; }
  const bf16* value_tile(int64_t g, int64_t tile) const { return values.data() + (g * tiles + tile) * size; }
};

// One query tile under way.
class QueryTile {
 public:
  QueryTile(const Plan& plan, float scale)
      : plan_(plan),
        scale_(scale * kLog2e),
        q_(plan.most_rows() * plan.shape.head_dim),
        p_(plan.most_rows() * kKeys),
        scores_(plan.most_rows() * kKeys),
        out_(plan.most_rows() * plan.shape.head_dim),
        max_(plan.most_rows()),
        sum_(plan.most_rows()) {}

  void begin(const at::Tensor& q, int64_t tile, int64_t kv_head) {
    tile_ = tile, padded_ = plan_.padded_rows(tile);
    gather_rows(q, plan_, tile, kv_head, padded_, q_.data());
    std::fill_n(max_.begin(), padded_, -kInfinity);
    std::fill_n(sum_.begin(), padded_, 0.0f);
    std::fill_n(out_.begin(), padded_ * plan_.shape.head_dim, 0.0f);
  }

  void add(int64_t key_tile, const bf16* keys_DN, const bf16* values_ND) {
    const int64_t dim = plan_.shape.head_dim;
    brgemm(padded_, kKeys, dim, q_.data(), dim, keys_DN, kKeys, scores_.data(), kKeys, false);
    if (!plan_.full(tile_, key_tile)) mask(key_tile);
    for (int64_t r = 0; r < padded_; ++r) soften(r);
    brgemm(padded_, dim, kKeys, p_.data(), kKeys, values_ND, dim, out_.data(), dim, true);
  }

  void end(int64_t kv_head, bf16* out_QHD, float* lse_QH) const {
    const int64_t share = plan_.shape.share();
    scatter_rows(out_.data(), plan_, tile_, kv_head, [&](int64_t r) { return 1.0f / sum_[r]; }, out_QHD);
    for (int64_t r = 0; r < plan_.rows(tile_); ++r) {
      lse_QH[(tile_ * plan_.tile_tokens + r / share) * plan_.shape.heads + kv_head * share + r % share] =
          max_[r] / kLog2e + std::log(sum_[r]);
    }
  }

 private:
  // Row r of token t sees key j when j <= t < ends[j]. Rows of padding see nothing that matters.
  void mask(int64_t key_tile) {
    const int64_t share = plan_.shape.share(), first_key = key_tile * kKeys;
    const int32_t* ends = plan_.ends(key_tile);
    for (int64_t r = 0; r < padded_; ++r) {
      const int32_t token = static_cast<int32_t>(plan_.first(tile_) + r / share);
      const int64_t causal = std::clamp<int64_t>(token - first_key + 1, 0, kKeys);
      float* row = scores_.data() + r * kKeys;
      for (int64_t n = 0; n < causal; ++n) row[n] = ends[n] > token ? row[n] : -kInfinity;
      std::fill(row + causal, row + kKeys, -kInfinity);
    }
  }

  // Scores of one row to probabilities over the running maximum, which is kept in units of log2.
  void soften(int64_t r) {
    const int64_t dim = plan_.shape.head_dim;
    const float* row = scores_.data() + r * kKeys;
    Lanes top = load(row);
    for (int64_t n = kLanes; n < kKeys; n += kLanes) top = at::vec::maximum(top, load(row + n));
    const float best = std::max(max_[r], m2::max(top) * scale_);
    const float base = best == -kInfinity ? 0.0f : best;  // a row that has seen nothing yet
    const Lanes scale(scale_), shift(-base);
    Lanes total(0.0f);
    for (int64_t n = 0; n < kKeys; n += kLanes) {
      const Lanes p = exp2(at::vec::fmadd(load(row + n), scale, shift));
      total = total + p;
      store(p_.data() + r * kKeys + n, p);
    }
    if (best > max_[r]) {
      const float shrink = std::exp2(max_[r] - base);
      sum_[r] *= shrink;
      for (int64_t d = 0; d < dim; d += kLanes) store(out_.data() + r * dim + d, load(out_.data() + r * dim + d) * Lanes(shrink));
      max_[r] = best;
    }
    sum_[r] += sum(total);
  }

  const Plan& plan_;
  float scale_;
  int64_t tile_ = 0, padded_ = 0;
  std::vector<bf16> q_, p_;
  std::vector<float> scores_, out_, max_, sum_;
};

std::tuple<at::Tensor, at::Tensor> tree_attention(const at::Tensor& q_in, const at::Tensor& k_in, const at::Tensor& v_in,
                                                  const at::Tensor& subtree_end_in, int64_t query_start) {
  const Shape shape = check_inputs(q_in, k_in, v_in, subtree_end_in, query_start);
  const at::Tensor q = dense_rows(q_in), k = dense_rows(k_in), v = dense_rows(v_in), subtree_end = subtree_end_in.contiguous();
  check_forest(subtree_end.const_data_ptr<int32_t>(), shape.keys);
  at::Tensor out = at::empty({shape.queries, shape.heads, shape.head_dim}, q.options());
  at::Tensor lse = at::empty({shape.queries, shape.heads}, q.options().dtype(at::kFloat));
  if (shape.queries == 0) return {out, lse};
  const Plan plan(shape, subtree_end.const_data_ptr<int32_t>(), kRows);
  const PackedKeys packed(plan, k, v);
  const float scale = 1.0f / std::sqrt(static_cast<float>(shape.head_dim));
  bf16* out_QHD = out.mutable_data_ptr<bf16>();
  float* lse_QH = lse.mutable_data_ptr<float>();
  std::atomic<bool> failed{false};
  run_in_order(
      shape.kv_heads * plan.query_tiles, failed, [&] { return QueryTile(plan, scale); },
      [&](QueryTile& work, int64_t task) {
        const int64_t g = task % shape.kv_heads, tile = plan.query_tiles - 1 - task / shape.kv_heads;  // the longest first
        work.begin(q, tile, g);
        for (int64_t j = 0; j <= plan.last_key_tile(tile); ++j) {
          if (plan.visible(tile, j)) work.add(j, packed.key_tile(g, j), packed.value_tile(g, j));
        }
        work.end(g, out_QHD, lse_QH);
      });
  return {out, lse};
}

}  // namespace

TORCH_LIBRARY_IMPL(m2_ops, CPU, m) { m.impl("tree_attention", &tree_attention); }

}  // namespace m2::tree_attention

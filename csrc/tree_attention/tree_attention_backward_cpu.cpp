// Prefix-tree attention on the CPU, backward. A task owns a query tile and its dQ; what it adds to dK and dV of a key tile waits for its
// turn, the later query tiles first, so that sums do not depend on who runs when.
//
// Scores are made transposed, keys as rows: P^T and dS^T are then left-hand sides of dV and dK as they are, and a key's visible
// queries are one interval of its row. Shape suffixes as in the forward.
#include "tiles.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cmath>

namespace m2::tree_attention {
namespace {

constexpr int64_t kRows = 256;  // of a query tile

// Keys and values of each tile as rows, padded with zeros, and keys as the right-hand side of dS K; sums of dK and dV.
struct KeyTiles {
  std::vector<bf16> keys, values, packed_keys;
  std::vector<float> d_keys, d_values;
  int64_t tiles, size;

  KeyTiles(const Plan& plan, const at::Tensor& k, const at::Tensor& v)
      : keys(plan.shape.kv_heads * plan.key_tiles * kKeys * plan.shape.head_dim),
        values(keys.size()),
        packed_keys(keys.size()),
        d_keys(keys.size()),
        d_values(keys.size()),
        tiles(plan.key_tiles),
        size(kKeys * plan.shape.head_dim) {
    const int64_t dim = plan.shape.head_dim;
    at::parallel_for(0, plan.shape.kv_heads * tiles, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t g = i / tiles, first = i % tiles * kKeys;
        for (int64_t n = 0; n < plan.keys_of(i % tiles); ++n) {
          const bf16* key = k.const_data_ptr<bf16>() + (first + n) * k.stride(0) + g * k.stride(1);
          const bf16* value = v.const_data_ptr<bf16>() + (first + n) * v.stride(0) + g * v.stride(1);
          std::memcpy(static_cast<void*>(keys.data() + i * size + n * dim), key, dim * sizeof(bf16));
          std::memcpy(static_cast<void*>(values.data() + i * size + n * dim), value, dim * sizeof(bf16));
        }
        pack_kn(keys.data() + i * size, dim, kKeys, dim, packed_keys.data() + i * size, dim);
      }
    });
  }

  // To contiguous [T, G, D]; keys that no query sees get 0.
  void write(const Plan& plan, bf16* dk_TGD, bf16* dv_TGD) const {
    const int64_t dim = plan.shape.head_dim, kv_heads = plan.shape.kv_heads, seen = plan.shape.query_start + plan.shape.queries;
    at::parallel_for(0, plan.shape.keys * kv_heads, 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t key = i / kv_heads, from = (i % kv_heads * tiles + key / kKeys) * size + key % kKeys * dim;
        for (int64_t d = 0; d < dim; d += kLanes) {
          const int64_t n = std::min(kLanes, dim - d);
          store(dk_TGD + i * dim + d, key < seen ? load(d_keys.data() + from + d, n) : Lanes(0.0f), n);
          store(dv_TGD + i * dim + d, key < seen ? load(d_values.data() + from + d, n) : Lanes(0.0f), n);
        }
      }
    });
  }
};

// Whose turn it is to add to each key tile: the later query tiles first.
class Turns {
 public:
  Turns(const Plan& plan, std::atomic<bool>& failed) : plan_(plan), failed_(failed), turn_(plan.shape.kv_heads * plan.key_tiles) {
    for (int64_t i = 0; i < static_cast<int64_t>(turn_.size()); ++i) turn_[i] = next(plan.query_tiles, i % plan.key_tiles);
  }

  void wait(int64_t kv_head, int64_t key_tile, int64_t query_tile) const {
    const std::atomic<int64_t>& turn = turn_[kv_head * plan_.key_tiles + key_tile];
    for (int spins = 0; turn.load(std::memory_order_acquire) != query_tile && !failed_; ++spins) {
      if (spins > 1000) std::this_thread::yield();
    }
  }

  void pass_on(int64_t kv_head, int64_t key_tile, int64_t query_tile) {
    turn_[kv_head * plan_.key_tiles + key_tile].store(next(query_tile, key_tile), std::memory_order_release);
  }

 private:
  // The last query tile before `tile` that sees the key tile, -1 if none.
  int64_t next(int64_t tile, int64_t key_tile) const {
    do --tile;
    while (tile >= 0 && !plan_.visible(tile, key_tile));
    return tile;
  }

  const Plan& plan_;
  const std::atomic<bool>& failed_;
  std::vector<std::atomic<int64_t>> turn_;
};

struct Inputs {
  at::Tensor grad_out, q, out, lse, grad_lse;  // grad_lse undefined: none
};

class QueryTile {
 public:
  QueryTile(const Plan& plan, float scale)
      : plan_(plan),
        scale_(scale),
        rows_(plan.most_rows() * plan.shape.head_dim),
        other_(rows_.size()),
        q_across_(rows_.size()),
        q_down_(rows_.size()),
        grad_across_(rows_.size()),
        grad_down_(rows_.size()),
        p_(plan.most_rows() * kKeys),
        ds_(p_.size()),
        ds_across_(p_.size()),
        scores_(p_.size()),
        d_p_(p_.size()),
        dq_(rows_.size()),
        lse_(plan.most_rows()),
        delta_(plan.most_rows()) {}

  void begin(const Inputs& in, int64_t tile, int64_t kv_head) {
    tile_ = tile, kv_head_ = kv_head, padded_ = plan_.padded_rows(tile);
    const int64_t dim = plan_.shape.head_dim;
    gather_rows(in.out, plan_, tile, kv_head, padded_, other_.data());
    gather_rows(in.grad_out, plan_, tile, kv_head, padded_, rows_.data());
    pack_nk(rows_.data(), dim, dim, padded_, grad_across_.data(), padded_);
    pack_kn(rows_.data(), dim, padded_, dim, grad_down_.data(), dim);
    statistics(in);
    gather_rows(in.q, plan_, tile, kv_head, padded_, rows_.data());
    pack_nk(rows_.data(), dim, dim, padded_, q_across_.data(), padded_);
    pack_kn(rows_.data(), dim, padded_, dim, q_down_.data(), dim);
    std::fill_n(dq_.begin(), padded_ * dim, 0.0f);
  }

  void add(int64_t key_tile, KeyTiles& keys, Turns& turns) {
    const int64_t dim = plan_.shape.head_dim, at = (kv_head_ * keys.tiles + key_tile) * keys.size;
    brgemm(kKeys, padded_, dim, keys.keys.data() + at, dim, q_across_.data(), padded_, scores_.data(), padded_, false);
    brgemm(kKeys, padded_, dim, keys.values.data() + at, dim, grad_across_.data(), padded_, d_p_.data(), padded_, false);
    const bool full = plan_.full(tile_, key_tile);
    for (int64_t n = 0; n < kKeys; ++n) differentiate(n, full ? Interval{0, padded_} : seen_by(key_tile, n));
    transpose(ds_.data(), padded_, kKeys, padded_, ds_across_.data(), kKeys);
    brgemm(padded_, dim, kKeys, ds_across_.data(), kKeys, keys.packed_keys.data() + at, dim, dq_.data(), dim, true);
    turns.wait(kv_head_, key_tile, tile_);
    brgemm(kKeys, dim, padded_, p_.data(), padded_, grad_down_.data(), dim, keys.d_values.data() + at, dim, true);
    brgemm(kKeys, dim, padded_, ds_.data(), padded_, q_down_.data(), dim, keys.d_keys.data() + at, dim, true);
    turns.pass_on(kv_head_, key_tile, tile_);
  }

  void end(bf16* dq_QHD) const {
    scatter_rows(dq_.data(), plan_, tile_, kv_head_, [](int64_t) { return 1.0f; }, dq_QHD);
  }

 private:
  struct Interval {
    int64_t begin, end;
  };

  // Rows of the tile that see key n of a key tile.
  Interval seen_by(int64_t key_tile, int64_t n) const {
    const int64_t share = plan_.shape.share(), first = plan_.first(tile_), tokens = plan_.tokens(tile_);
    const int64_t from = std::clamp<int64_t>(key_tile * kKeys + n - first, 0, tokens),
                  to = std::clamp<int64_t>(plan_.ends(key_tile)[n] - first, 0, tokens);
    return {from * share, std::max(from, to) * share};
  }

  // lse in units of log2, and delta = <grad_out, out> - grad_lse, of each row; rows of padding get probability 0.
  void statistics(const Inputs& in) {
    const int64_t share = plan_.shape.share(), dim = plan_.shape.head_dim;
    for (int64_t r = 0; r < padded_; ++r) {
      lse_[r] = std::numeric_limits<float>::infinity(), delta_[r] = 0;
      if (r >= plan_.rows(tile_)) continue;
      const int64_t at = (tile_ * plan_.tile_tokens + r / share) * plan_.shape.heads + kv_head_ * share + r % share;
      Lanes total(0.0f);
      for (int64_t d = 0; d < dim; d += kLanes) {
        const int64_t n = std::min(kLanes, dim - d);
        total = at::vec::fmadd(load(rows_.data() + r * dim + d, n), load(other_.data() + r * dim + d, n), total);
      }
      lse_[r] = in.lse.const_data_ptr<float>()[at] * kLog2e;
      delta_[r] = sum(total) - (in.grad_lse.defined() ? in.grad_lse.const_data_ptr<float>()[at] : 0.0f);
    }
  }

  // One key's row of P^T and dS^T from those of scores and dP^T.
  void differentiate(int64_t n, Interval seen) {
    const float *scores = scores_.data() + n * padded_, *d_p = d_p_.data() + n * padded_;
    bf16 *p_row = p_.data() + n * padded_, *ds_row = ds_.data() + n * padded_;
    const Lanes to_log2(scale_ * kLog2e), scale(scale_);
    const int64_t begin = seen.begin / kLanes * kLanes, end = std::min(padded_, round_up(seen.end, kLanes));
    for (int64_t c = begin; c < end; c += kLanes) {
      const Lanes p = exp2(at::vec::fmsub(load(scores + c), to_log2, load(lse_.data() + c)));
      store(p_row + c, p);
      store(ds_row + c, p * scale * (load(d_p + c) - load(delta_.data() + c)));
    }
    for (bf16* row : {p_row, ds_row}) {
      std::memset(static_cast<void*>(row), 0, seen.begin * sizeof(bf16));
      std::memset(static_cast<void*>(row + seen.end), 0, (padded_ - seen.end) * sizeof(bf16));
    }
  }

  const Plan& plan_;
  float scale_;
  int64_t tile_ = 0, kv_head_ = 0, padded_ = 0;
  // "across": packed with the tile's rows as columns of the product; "down": as its depth.
  std::vector<bf16> rows_, other_, q_across_, q_down_, grad_across_, grad_down_, p_, ds_, ds_across_;
  std::vector<float> scores_, d_p_, dq_, lse_, delta_;
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> tree_attention_backward(const at::Tensor& grad_out,
                                                                       const std::optional<at::Tensor>& grad_lse, const at::Tensor& q_in,
                                                                       const at::Tensor& k_in, const at::Tensor& v_in,
                                                                       const at::Tensor& out, const at::Tensor& lse,
                                                                       const at::Tensor& subtree_end_in, int64_t query_start) {
  const Shape shape = check_inputs(q_in, k_in, v_in, subtree_end_in, query_start);
  check_backward(grad_out, q_in, out, lse, grad_lse);
  const at::Tensor k = dense_rows(k_in), v = dense_rows(v_in), subtree_end = subtree_end_in.contiguous();
  const Inputs in{dense_rows(grad_out), dense_rows(q_in), dense_rows(out), lse.contiguous(),
                  grad_lse ? grad_lse->contiguous() : at::Tensor()};
  at::Tensor dq = at::empty(q_in.sizes(), q_in.options());
  if (shape.queries == 0) return {dq, at::zeros(k.sizes(), k.options()), at::zeros(v.sizes(), v.options())};
  at::Tensor dk = at::empty(k.sizes(), k.options()), dv = at::empty(v.sizes(), v.options());
  const Plan plan(shape, subtree_end.const_data_ptr<int32_t>(), kRows);
  KeyTiles keys(plan, k, v);
  std::atomic<bool> failed{false};
  Turns turns(plan, failed);
  const float scale = 1.0f / std::sqrt(static_cast<float>(shape.head_dim));
  bf16* dq_QHD = dq.mutable_data_ptr<bf16>();
  run_in_order(
      shape.kv_heads * plan.query_tiles, failed, [&] { return QueryTile(plan, scale); },
      [&](QueryTile& work, int64_t task) {
        const int64_t g = task % shape.kv_heads, tile = plan.query_tiles - 1 - task / shape.kv_heads;
        work.begin(in, tile, g);
        for (int64_t j = 0; j <= plan.last_key_tile(tile); ++j) {
          if (plan.visible(tile, j)) work.add(j, keys, turns);
        }
        work.end(dq_QHD);
      });
  keys.write(plan, dk.mutable_data_ptr<bf16>(), dv.mutable_data_ptr<bf16>());
  return {dq, dk, dv};
}

}  // namespace

TORCH_LIBRARY_IMPL(m2_ops, CPU, m) { m.impl("tree_attention_backward", &tree_attention_backward); }

}  // namespace m2::tree_attention

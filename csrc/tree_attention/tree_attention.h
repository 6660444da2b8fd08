// What the CPU and the CUDA kernel agree on: limits, shapes and argument checks.
// Shape suffixes: Q queries, T keys, H query heads, G key/value heads, D head_dim.
#pragma once

#include "../common/check.h"

#include <limits>
#include <vector>

namespace m2::tree_attention {

constexpr int64_t kMaxHeadDim = 256;

struct Shape {
  int64_t queries, keys, heads, kv_heads, head_dim, query_start;
  int64_t share() const { return heads / kv_heads; }  // query heads that read one key/value head
};

inline Shape check_inputs(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& subtree_end,
                          int64_t query_start) {
  TORCH_CHECK_VALUE(q.scalar_type() == at::kBFloat16, "q: ", q.scalar_type(), ", need ", at::kBFloat16);
  TORCH_CHECK_VALUE(q.dim() == 3, "q: shape ", q.sizes(), ", need [queries, heads, head_dim]");
  TORCH_CHECK_VALUE(k.dim() == 3, "k: shape ", k.sizes(), ", need [tokens, kv_heads, head_dim]");
  const Shape s{q.size(0), k.size(0), q.size(1), k.size(1), q.size(2), query_start};
  TORCH_CHECK_VALUE(s.head_dim >= 16 && s.head_dim <= kMaxHeadDim && s.head_dim % 16 == 0, "q: head_dim ", s.head_dim,
                    ", need a multiple of 16 up to ", kMaxHeadDim);
  TORCH_CHECK_VALUE(s.keys < std::numeric_limits<int32_t>::max(), "k: ", s.keys, " tokens, need less than 2^31 - 1");
  TORCH_CHECK_VALUE(s.kv_heads >= 1 && s.heads >= 1 && s.heads % s.kv_heads == 0, "k: ", s.kv_heads, " heads, need a divisor of q's ",
                    s.heads);
  check_tensor("k", k, at::kBFloat16, {s.keys, s.kv_heads, s.head_dim}, q.device());
  check_tensor("v", v, at::kBFloat16, {s.keys, s.kv_heads, s.head_dim}, q.device());
  check_tensor("subtree_end", subtree_end, at::kInt, {s.keys}, q.device());
  TORCH_CHECK_VALUE(query_start >= 0 && query_start + s.queries <= s.keys, "query_start: ", query_start, ", need 0 to ", s.keys - s.queries,
                    " for ", s.queries, " queries of ", s.keys, " tokens");
  return s;
}

inline void check_backward(const at::Tensor& grad_out, const at::Tensor& q, const at::Tensor& out, const at::Tensor& lse,
                           const std::optional<at::Tensor>& grad_lse) {
  check_tensor("grad_out", grad_out, at::kBFloat16, q.sizes(), q.device());
  check_tensor("out", out, at::kBFloat16, q.sizes(), q.device());
  check_tensor("lse", lse, at::kFloat, {q.size(0), q.size(1)}, q.device());
  if (grad_lse) check_tensor("grad_lse", *grad_lse, at::kFloat, {q.size(0), q.size(1)}, q.device());
}

// Subtrees are intervals [t, subtree_end[t]) that nest. Tiles are skipped on the strength of it.
inline void check_forest(const int32_t* subtree_end_T, int64_t tokens) {
  std::vector<int32_t> open;  // ends of the subtrees that hold token t, the innermost last
  for (int64_t t = 0; t < tokens; ++t) {
    while (!open.empty() && open.back() <= t) open.pop_back();
    const int64_t end = subtree_end_T[t], most = open.empty() ? tokens : open.back();
    TORCH_CHECK_VALUE(end > t && end <= most, "subtree_end[", t, "] = ", end, ": must lie in (", t, ", ", most, "]");
    if (end != most || open.empty()) open.push_back(static_cast<int32_t>(end));
  }
}

}  // namespace m2::tree_attention

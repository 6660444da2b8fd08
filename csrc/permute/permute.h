// What every device's permutation agrees on: argument checks.
#pragma once

#include "../common/check.h"

#include <algorithm>
#include <limits>

namespace m2::permute {

inline void check_rows(const char* name, const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kFloat, name, ": ", x.scalar_type(),
                    ", need BFloat16 or Float");
  TORCH_CHECK_VALUE(x.dim() == 2, name, ": shape ", x.sizes(), ", need two dimensions");
}

inline void check_index(const char* name, const at::Tensor& x, int64_t dim, const at::Tensor& other) {
  TORCH_CHECK_VALUE(x.scalar_type() == at::kInt, name, ": ", x.scalar_type(), ", need Int");
  TORCH_CHECK_VALUE(x.dim() == dim, name, ": shape ", x.sizes(), ", need ", dim, dim == 1 ? " dimension" : " dimensions");
  TORCH_CHECK_VALUE(x.device() == other.device(), name, ": on ", x.device(), ", need ", other.device());
}

inline void check_weights(const OptionalTensor& weights, const at::Tensor& row_TK) {
  if (weights) check_tensor("weights", *weights, at::kFloat, row_TK.sizes(), row_TK.device());
}

inline void check_backward(const at::Tensor& grad, const at::Tensor& rows, const at::Tensor& token, const at::Tensor& row,
                           const at::Tensor& weights) {
  check_rows("rows", rows);
  check_index("token", token, 1, rows);
  check_index("row", row, 2, rows);
  check_weights(weights, row);
  TORCH_CHECK_VALUE(token.size(0) == rows.size(0), "token: shape ", token.sizes(), ", need [", rows.size(0), "]");
  TORCH_CHECK_VALUE(
      grad.scalar_type() == rows.scalar_type() && grad.dim() == 2 && grad.size(0) == row.size(0) && grad.size(1) == rows.size(1),
      "grad: ", grad.scalar_type(), " ", grad.sizes(), " does not fit rows ", rows.scalar_type(), " ", rows.sizes());
}

// Rows that any routing fits into: static, so that shapes do not depend on the data.
inline int64_t most_rows(int64_t routed, int64_t num_experts, int64_t block) {
  return (routed + std::min(routed, num_experts) * (block - 1) + block - 1) / block * block;
}

inline void check_layout(const at::Tensor& experts, int64_t num_experts, int64_t block, std::optional<int64_t> routed) {
  check_index("experts", experts, 2, experts);
  TORCH_CHECK_VALUE(num_experts >= 1, "num_experts: ", num_experts, ", need 1 or more");
  TORCH_CHECK_VALUE(block >= 1, "block: ", block, ", need 1 or more");
  TORCH_CHECK_VALUE(!routed || (*routed >= 0 && *routed <= experts.numel()), "routed: ", routed.value_or(0), ", need 0 to ",
                    experts.numel());
  const int64_t rows = most_rows(routed.value_or(experts.numel()), num_experts, block);
  TORCH_CHECK_VALUE(rows <= std::numeric_limits<int32_t>::max(), "experts: ", rows, " rows with their padding, need less than 2^31");
}

}  // namespace m2::permute

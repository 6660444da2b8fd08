// What the CPU and the CUDA router agree on: limits and argument checks.
#pragma once

#include "../common/check.h"

namespace m2::router {

constexpr int64_t kMaxExperts = 1024;
constexpr int64_t kMaxTopK = 32;

inline void check_logits(const at::Tensor& logits) {
  TORCH_CHECK_VALUE(logits.scalar_type() == at::kFloat, "logits: ", logits.scalar_type(), ", need ", at::kFloat);
  TORCH_CHECK_VALUE(logits.dim() == 2, "logits: shape ", logits.sizes(), ", need [tokens, experts]");
  TORCH_CHECK_VALUE(logits.size(1) >= 1 && logits.size(1) <= kMaxExperts, "logits: ", logits.size(1), " experts, need 1 to ", kMaxExperts);
}

inline void check_top_k(int64_t top_k, int64_t num_experts) {
  const int64_t most = std::min(num_experts, kMaxTopK);
  TORCH_CHECK_VALUE(top_k >= 1 && top_k <= most, "top_k: ", top_k, ", need 1 to ", most, " for ", num_experts, " experts");
}

inline void check_routes(const at::Tensor& experts, const at::Tensor& logits) {
  TORCH_CHECK_VALUE(experts.dim() == 2, "experts: shape ", experts.sizes(), ", need [tokens, top_k]");
  check_top_k(experts.size(1), logits.size(1));
  check_tensor("experts", experts, at::kInt, {logits.size(0), experts.size(1)}, logits.device());
}

inline void check_multiplicity(const std::optional<at::Tensor>& multiplicity, const at::Tensor& logits) {
  if (multiplicity) check_tensor("multiplicity", *multiplicity, at::kInt, {logits.size(0)}, logits.device());
}

inline void check_backward(const at::Tensor& grad_weights, const at::Tensor& logits, const at::Tensor& weights, const at::Tensor& experts) {
  check_logits(logits);
  check_routes(experts, logits);
  check_tensor("weights", weights, at::kFloat, experts.sizes(), logits.device());
  check_tensor("grad_weights", grad_weights, at::kFloat, experts.sizes(), logits.device());
}

inline void check_bias_update(const at::Tensor& bias, const at::Tensor& counts) {
  TORCH_CHECK_VALUE(bias.dim() == 1 && bias.is_contiguous(), "bias: shape ", bias.sizes(), ", need a contiguous [experts]");
  check_tensor("bias", bias, at::kFloat, bias.sizes(), bias.device());
  check_tensor("counts", counts, at::kLong, bias.sizes(), bias.device());
}

}  // namespace m2::router

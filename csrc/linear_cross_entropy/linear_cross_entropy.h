// What every device's linear + cross-entropy agrees on: argument checks.
#pragma once

#include "../common/check.h"

namespace m2::linear_cross_entropy {

// hidden bf16 [T, H], weight bf16 [V, H], targets int64 [N], sources int64 [N] (none: N = T).
inline void check(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets, const OptionalTensor& sources) {
  TORCH_CHECK_VALUE(hidden.scalar_type() == at::kBFloat16, "hidden: ", hidden.scalar_type(), ", need BFloat16");
  TORCH_CHECK_VALUE(hidden.dim() == 2 && hidden.size(1) > 0 && hidden.size(1) % 2 == 0, "hidden: shape ", hidden.sizes(),
                    ", need [tokens, hidden] with an even hidden");
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.size(0) > 0, "weight: shape ", weight.sizes(), ", need [vocabulary, hidden]");
  check_tensor("weight", weight, at::kBFloat16, {weight.size(0), hidden.size(1)}, hidden.device());
  TORCH_CHECK_VALUE(targets.dim() == 1, "targets: shape ", targets.sizes(), ", need [N]");
  check_tensor("targets", targets, at::kLong, {sources ? targets.size(0) : hidden.size(0)}, hidden.device());
  if (sources) check_tensor("sources", *sources, at::kLong, targets.sizes(), hidden.device());
}

inline void check_gradients(const at::Tensor& grad_target, const at::Tensor& grad_lse, const at::Tensor& grad_mean, const at::Tensor& lse,
                            const at::Tensor& mean, int64_t count, c10::Device device) {
  check_tensor("grad_target", grad_target, at::kFloat, {count}, device);
  check_tensor("grad_lse", grad_lse, at::kFloat, {count}, device);
  check_tensor("lse", lse, at::kFloat, {count}, device);
  check_tensor("mean", mean, at::kFloat, {mean.numel() ? count : 0}, device);
  check_tensor("grad_mean", grad_mean, at::kFloat, mean.sizes(), device);
}

}  // namespace m2::linear_cross_entropy

// What every device's linear + cross-entropy agrees on: argument checks.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <optional>

namespace m2::linear_cross_entropy {

using OptionalTensor = std::optional<at::Tensor>;

inline void check_like(const char* name, const at::Tensor& x, c10::ScalarType dtype, c10::IntArrayRef shape, const at::Tensor& other) {
  TORCH_CHECK_VALUE(x.scalar_type() == dtype, name, ": ", x.scalar_type(), ", need ", dtype);
  TORCH_CHECK_VALUE(x.sizes() == shape, name, ": shape ", x.sizes(), ", need ", shape);
  TORCH_CHECK_VALUE(x.device() == other.device(), name, ": on ", x.device(), ", need ", other.device());
}

// hidden bf16 [T, H], weight bf16 [V, H], targets int64 [N], sources int64 [N] (none: N = T).
inline void check(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets, const OptionalTensor& sources) {
  TORCH_CHECK_VALUE(hidden.scalar_type() == at::kBFloat16, "hidden: ", hidden.scalar_type(), ", need BFloat16");
  TORCH_CHECK_VALUE(hidden.dim() == 2 && hidden.size(1) > 0 && hidden.size(1) % 2 == 0,
                    "hidden: shape ", hidden.sizes(), ", need [tokens, hidden] with an even hidden");
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.size(0) > 0, "weight: shape ", weight.sizes(), ", need [vocabulary, hidden]");
  check_like("weight", weight, at::kBFloat16, {weight.size(0), hidden.size(1)}, hidden);
  TORCH_CHECK_VALUE(targets.dim() == 1, "targets: shape ", targets.sizes(), ", need [N]");
  check_like("targets", targets, at::kLong, {sources ? targets.size(0) : hidden.size(0)}, hidden);
  if (sources) check_like("sources", *sources, at::kLong, targets.sizes(), hidden);
}

}  // namespace m2::linear_cross_entropy

// What every device's blockwise e4m3 agrees on: argument checks.
#pragma once

#include "../common/check.h"
#include "../common/e4m3.h"

namespace m2::quantize {

inline void check(const char* name, const at::Tensor& x, int64_t dim) {
  TORCH_CHECK_VALUE(x.scalar_type() == at::kBFloat16, name, ": ", x.scalar_type(), ", need BFloat16");
  TORCH_CHECK_VALUE(x.dim() == dim, name, ": shape ", x.sizes(), ", need ", dim, " dimensions");
}

inline void check_hidden(const at::Tensor& hidden) {
  check("hidden", hidden, 2);
  TORCH_CHECK_VALUE(hidden.size(1) % 2 == 0, "hidden: width ", hidden.size(1), ", need an even one");
}

inline void check_token(const at::Tensor& token, const at::Tensor& x) {
  TORCH_CHECK_VALUE(token.dim() == 1, "token: shape ", token.sizes(), ", need [rows]");
  check_tensor("token", token, at::kInt, token.sizes(), x.device());
}

}  // namespace m2::quantize

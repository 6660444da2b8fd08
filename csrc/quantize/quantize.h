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

inline void check_swiglu_gradient(const at::Tensor& d_act, const at::Tensor& hidden) {
  check_hidden(hidden);
  check_tensor("d_act", d_act, at::kBFloat16, {hidden.size(0), hidden.size(1) / 2}, hidden.device());
}

// Codes by rows.
inline void check_codes(const at::Tensor& codes, const at::Tensor& scales) {
  TORCH_CHECK_VALUE(codes.scalar_type() == at::kFloat8_e4m3fn, "codes: ", codes.scalar_type(), ", need Float8_e4m3fn");
  TORCH_CHECK_VALUE(codes.dim() == 2, "codes: shape ", codes.sizes(), ", need [rows, width]");
  check_tensor("scales", scales, at::kFloat, {codes.size(0), blocks_of(codes.size(1))}, codes.device());
}

inline void check_token(const at::Tensor& token, const at::Tensor& x) {
  TORCH_CHECK_VALUE(token.dim() == 1, "token: shape ", token.sizes(), ", need [rows]");
  check_tensor("token", token, at::kInt, token.sizes(), x.device());
}

}  // namespace m2::quantize

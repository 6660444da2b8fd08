// What the CPU and the CUDA kernels of norm_rope agree on: argument checks and sizes.
#pragma once

#include "../common/check.h"

#include <limits>

namespace m2::norm_rope {

constexpr int64_t kTokensPerPartial = 128;  // tokens whose part of the weight's gradient is summed before the parts are

struct Sizes {
  int64_t tokens, width, heads, head_dim, half;  // half: rotated pairs of a head, 0 without rotation
};

inline void check_rows(const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kFloat, "x: ", x.scalar_type(), ", need BFloat16 or Float");
  TORCH_CHECK_VALUE(x.dim() == 2, "x: shape ", x.sizes(), ", need [tokens, width]");
  TORCH_CHECK_VALUE(x.size(1) <= std::numeric_limits<int32_t>::max(), "x: width ", x.size(1), ", need less than 2^31");
}

inline Sizes check(const at::Tensor& x, const at::Tensor& weight, int64_t heads, const OptionalTensor& cos, const OptionalTensor& sin) {
  check_rows(x);
  const int64_t tokens = x.size(0), width = x.size(1);
  check_tensor("weight", weight, x.scalar_type(), {width}, x.device());
  TORCH_CHECK_VALUE(heads >= 1 && width % heads == 0, "heads: ", heads, ", need a divisor of the width ", width);
  TORCH_CHECK_VALUE(cos.has_value() == sin.has_value(), "sin: need cos and sin, or neither");
  if (!cos) return {tokens, width, heads, width / heads, 0};
  TORCH_CHECK_VALUE(cos->dim() == 2 && 2 * cos->size(1) <= width / heads, "cos: shape ", cos->sizes(),
                    ", need [tokens, R] with 2 R <= head_dim = ", width / heads);
  check_tensor("cos", *cos, x.scalar_type(), {tokens, cos->size(1)}, x.device());
  check_tensor("sin", *sin, x.scalar_type(), {tokens, cos->size(1)}, x.device());
  return {tokens, width, heads, width / heads, cos->size(1)};
}

// sum_squares of the whole vector, of which x is a part when full_width > width.
inline void check_split(const at::Tensor& x, const OptionalTensor& sum_squares, int64_t full_width) {
  if (sum_squares) check_tensor("sum_squares", *sum_squares, at::kFloat, {x.size(0)}, x.device());
  TORCH_CHECK_VALUE(full_width == x.size(1) || (sum_squares && full_width > x.size(1)), "full_width: ", full_width, ", need ", x.size(1),
                    sum_squares ? " or more" : " without sum_squares");
}

}  // namespace m2::norm_rope

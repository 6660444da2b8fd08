// What every device's dispatch and combine agree on: argument checks, and where the bytes of a message row come from.
// Shape suffixes: T tokens, K experts per token, R ranks, W width.
#pragma once

#include "../common/check.h"
#include "../common/e4m3.h"

namespace m2::expert_parallel {

constexpr int64_t kMaxRanks = 256;
constexpr size_t kMaxParts = 4;

// Bytes [at, at + bytes) of every message row are a row of a tensor.
struct Part {
  const char* data;
  int64_t stride, bytes, at;
};

struct Parts {
  Part part[kMaxParts];
  int count = 0;
};

inline void check_table(const char* name, const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.scalar_type() == at::kInt, name, ": ", x.scalar_type(), ", need Int");
  TORCH_CHECK_VALUE(x.dim() == 2, name, ": shape ", x.sizes(), ", need two dimensions");
}

inline void check_ranks(int64_t ranks) { TORCH_CHECK_VALUE(ranks >= 1 && ranks <= kMaxRanks, "ranks: ", ranks, ", need 1 to ", kMaxRanks); }

inline void check_plan(const at::Tensor& experts, int64_t num_experts, int64_t ranks) {
  check_table("experts", experts);
  check_ranks(ranks);
  TORCH_CHECK_VALUE(num_experts >= ranks && num_experts % ranks == 0, "num_experts: ", num_experts, ", need a multiple of the ", ranks,
                    " ranks");
}

inline void check_pack(at::TensorList parts, const OptionalTensor& experts, const at::Tensor& row, int64_t per_rank, at::IntArrayRef at,
                       at::TensorList out) {
  check_table("row", row);
  check_ranks(row.size(1));
  TORCH_CHECK_VALUE(static_cast<int64_t>(out.size()) == row.size(1), "out: ", out.size(), " tensors, need one for each of ", row.size(1),
                    " ranks");
  TORCH_CHECK_VALUE(!parts.empty() && parts.size() <= kMaxParts, "parts: ", parts.size(), ", need 1 to ", kMaxParts);
  TORCH_CHECK_VALUE(at.size() == parts.size() + experts.has_value(), "at: ", at.size(), " offsets, need ",
                    parts.size() + experts.has_value());
  const int64_t bytes = out[0].dim() == 2 ? out[0].size(1) : 0;
  for (const at::Tensor& x : out) {
    TORCH_CHECK_VALUE(x.scalar_type() == at::kByte && x.dim() == 2 && x.size(1) == bytes && x.is_contiguous(), "out: ", x.scalar_type(),
                      " ", x.sizes(), ", need contiguous Byte [rows, ", bytes, "]");
    TORCH_CHECK_VALUE(x.device() == row.device(), "out: on ", x.device(), ", need ", row.device());
  }
  const auto fits = [&](const char* name, const at::Tensor& x, int64_t from) {
    TORCH_CHECK_VALUE(x.dim() == 2 && x.size(0) == row.size(0), name, ": shape ", x.sizes(), ", need [", row.size(0), ", width]");
    TORCH_CHECK_VALUE(x.device() == row.device(), name, ": on ", x.device(), ", need ", row.device());
    const int64_t width = x.size(1) * static_cast<int64_t>(x.element_size());
    TORCH_CHECK_VALUE(from >= 0 && from + width <= bytes, "at: ", from, ", but ", name, " of ", width, " bytes must end within ", bytes);
  };
  for (size_t i = 0; i < parts.size(); ++i) fits("parts", parts[i], at[i]);
  if (!experts) return;
  check_table("experts", *experts);
  fits("experts", *experts, at.back());
  TORCH_CHECK_VALUE(at.back() % 4 == 0 && bytes % 4 == 0, "at: ", at.back(), " in rows of ", bytes, " bytes, need multiples of 4");
  TORCH_CHECK_VALUE(per_rank >= 1, "per_rank: ", per_rank, ", need 1 or more");
}

// kept: what with_rows made of the parts.
inline Parts parts_of(at::TensorList kept, at::IntArrayRef at) {
  Parts result;
  for (const at::Tensor& x : kept) {
    const int64_t size = static_cast<int64_t>(x.element_size());
    result.part[result.count] = {static_cast<const char*>(x.const_data_ptr()), x.stride(0) * size, x.size(1) * size, at[result.count]};
    ++result.count;
  }
  return result;
}

inline void check_combine(at::TensorList rows, const at::Tensor& row) {
  check_table("row", row);
  check_ranks(row.size(1));
  TORCH_CHECK_VALUE(static_cast<int64_t>(rows.size()) == row.size(1), "rows: ", rows.size(), " tensors, need one for each of ", row.size(1),
                    " ranks");
  const at::ScalarType type = rows[0].scalar_type();
  TORCH_CHECK_VALUE(type == at::kBFloat16 || type == at::kFloat || type == at::kDouble, "rows: ", type, ", need BFloat16, Float or Double");
  for (const at::Tensor& x : rows) {
    TORCH_CHECK_VALUE(x.dim() == 2 && x.size(1) == rows[0].size(1) && x.scalar_type() == type && x.is_contiguous(),
                      "rows: ", x.scalar_type(), " ", x.sizes(), ", need contiguous ", type, " [rows, ", rows[0].sizes().back(), "]");
    TORCH_CHECK_VALUE(x.device() == row.device(), "rows: on ", x.device(), ", need ", row.device());
  }
}

inline void check_dequantize(const at::Tensor& codes, const at::Tensor& scales) {
  TORCH_CHECK_VALUE(codes.scalar_type() == at::kFloat8_e4m3fn && codes.dim() == 2, "codes: ", codes.scalar_type(), " ", codes.sizes(),
                    ", need Float8_e4m3fn [rows, width]");
  check_tensor("scales", scales, at::kFloat, {codes.size(0), blocks_of(codes.size(1))}, codes.device());
}

}  // namespace m2::expert_parallel

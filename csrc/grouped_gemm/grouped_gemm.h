// What every device's grouped products agree on: argument checks.
#pragma once

#include "../common/check.h"

namespace m2::grouped_gemm {

inline void check_bf16(const char* name, const at::Tensor& x, std::initializer_list<int64_t> shape, const at::Tensor& other) {
  check_tensor(name, x, at::kBFloat16, c10::IntArrayRef(shape), other.device());
}

inline void check_dim(const char* name, const at::Tensor& x, int64_t dim) {
  TORCH_CHECK_VALUE(x.dim() == dim, name, ": shape ", x.sizes(), ", need ", dim, " dimensions");
}

inline void check_even(const char* name, int64_t width) {
  TORCH_CHECK_VALUE(width > 0 && width % 2 == 0, name, ": width ", width, ", need an even one from 2 on");
}

// ends int32 [E], not descending, the last at most the number of rows.
inline void check_ends(const at::Tensor& ends, int64_t groups, int64_t rows) {
  TORCH_CHECK_VALUE(ends.scalar_type() == at::kInt, "ends: ", ends.scalar_type(), ", need Int");
  TORCH_CHECK_VALUE(ends.dim() == 1 && ends.size(0) == groups && ends.is_contiguous(), "ends: shape ", ends.sizes(),
                    ", need a contiguous [", groups, "]");
  if (!ends.is_cpu()) return;
  const int32_t* end = ends.const_data_ptr<int32_t>();
  for (int64_t e = 0; e < groups; ++e) {
    const int64_t least = e ? end[e - 1] : 0;
    TORCH_CHECK_VALUE(end[e] >= least && end[e] <= rows, "ends[", e, "]: ", end[e], ", need ", least, " to ", rows);
  }
}

}  // namespace m2::grouped_gemm

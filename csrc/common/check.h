// Argument checks that every op shares; each names the argument.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <initializer_list>
#include <optional>

namespace m2 {

using OptionalTensor = std::optional<at::Tensor>;

inline void check_tensor(const char* name, const at::Tensor& x, c10::ScalarType dtype, c10::IntArrayRef shape, c10::Device device) {
  TORCH_CHECK_VALUE(x.scalar_type() == dtype, name, ": ", x.scalar_type(), ", need ", dtype);
  TORCH_CHECK_VALUE(x.sizes() == shape, name, ": shape ", x.sizes(), ", need ", shape);
  TORCH_CHECK_VALUE(x.device() == device, name, ": on ", x.device(), ", need ", device);
}

inline OptionalTensor contiguous(const OptionalTensor& x) { return x ? std::optional(x->contiguous()) : std::nullopt; }

// A matrix whose rows are contiguous, though they may lie apart, as in messages of several parts.
inline at::Tensor with_rows(const at::Tensor& x) { return x.stride(1) == 1 || x.size(1) <= 1 ? x : x.contiguous(); }

}  // namespace m2

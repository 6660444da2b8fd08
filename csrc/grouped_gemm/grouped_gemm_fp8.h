// What every device's grouped FP8 products agree on: argument checks and sizes.
#pragma once

#include "../common/e4m3.h"
#include "grouped_gemm.h"

namespace m2::grouped_gemm {

inline void check_codes(const char* name, const at::Tensor& codes, const char* scale_name, const at::Tensor& scales,
                        std::initializer_list<int64_t> scale_shape) {
  TORCH_CHECK_VALUE(codes.scalar_type() == at::kFloat8_e4m3fn, name, ": ", codes.scalar_type(), ", need Float8_e4m3fn");
  check_tensor(scale_name, scales, at::kFloat, c10::IntArrayRef(scale_shape), codes.device());
}

struct ProductSizes {
  int64_t groups, rows, depth, width;  // [rows, depth] times a [depth, width] per group
};

inline ProductSizes check_product(const at::Tensor& x, const at::Tensor& x_scale, const at::Tensor& w, const at::Tensor& w_scale,
                                  const at::Tensor& ends, bool transposed) {
  check_dim("x", x, 2);
  check_dim("w", w, 3);
  const ProductSizes s{w.size(0), x.size(0), x.size(1), w.size(transposed ? 1 : 2)};
  TORCH_CHECK_VALUE(w.size(transposed ? 2 : 1) == s.depth, "w: shape ", w.sizes(), " does not fit x ", x.sizes());
  check_even("x", s.depth);
  check_codes("x", x, "x_scale", x_scale, {s.rows, blocks_of(s.depth)});
  check_codes("w", w, "w_scale", w_scale, {s.groups, blocks_of(w.size(1)), blocks_of(w.size(2))});
  check_ends(ends, s.groups, s.rows);
  return s;
}

struct SwigluSizes {
  int64_t groups, rows, depth, width;  // [rows, depth] times [2 width, depth]^T per group
};

inline SwigluSizes check_swiglu(const at::Tensor& x, const at::Tensor& x_scale, const at::Tensor& w, const at::Tensor& w_scale,
                                const at::Tensor& ends) {
  const ProductSizes s = check_product(x, x_scale, w, w_scale, ends, true);
  // so that a block of 128 columns has one factor in gate and one in up
  TORCH_CHECK_VALUE(s.width % (2 * kScaleBlock) == 0, "w: ", s.width, " rows, need a multiple of ", 2 * kScaleBlock);
  return {s.groups, s.rows, s.depth, s.width / 2};
}

struct WgradSizes {
  int64_t groups, rows, out_width, in_width;
};

inline WgradSizes check_wgrad(const at::Tensor& dy, const at::Tensor& dy_scale, const at::Tensor& x, const at::Tensor& x_scale,
                              const at::Tensor& ends) {
  check_dim("dy", dy, 2);
  check_dim("x", x, 2);
  const WgradSizes s{ends.numel(), dy.size(0), dy.size(1), x.size(1)};
  TORCH_CHECK_VALUE(x.size(0) == s.rows, "x: shape ", x.sizes(), ", need ", s.rows, " rows as dy");
  check_codes("dy", dy, "dy_scale", dy_scale, {blocks_of(s.rows), s.out_width});
  check_codes("x", x, "x_scale", x_scale, {blocks_of(s.rows), s.in_width});
  check_ends(ends, s.groups, s.rows);
  return s;
}

}  // namespace m2::grouped_gemm

// Blockwise e4m3 on the CPU: factors per row and 128 columns, or per column and 128 rows.
// Shape suffixes: R rows, W width, P blocks of 128 columns, Q blocks of 128 rows.
#include "../common/fp8.h"
#include "quantize.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <vector>

namespace m2::quantize {
namespace {

constexpr int64_t kGrain = 16;

std::tuple<at::Tensor, at::Tensor> quantize_rows(const at::Tensor& x_in) {
  check("x", x_in, 2);
  const at::Tensor x = x_in.contiguous();
  const int64_t rows = x.size(0), width = x.size(1), blocks = blocks_of(width);
  at::Tensor codes = at::empty({rows, width}, x.options().dtype(at::kFloat8_e4m3fn));
  at::Tensor scales = at::empty({rows, blocks}, x.options().dtype(at::kFloat));
  const at::BFloat16* x_RW = x.const_data_ptr<at::BFloat16>();
  e4m3* codes_RW = codes.mutable_data_ptr<e4m3>();
  float* scales_RP = scales.mutable_data_ptr<float>();
  at::parallel_for(0, rows, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) quantize_row(x_RW + r * width, width, codes_RW + r * width, scales_RP + r * blocks);
  });
  return {codes, scales};
}

std::tuple<at::Tensor, at::Tensor> quantize_columns(const at::Tensor& x_in) {
  check("x", x_in, 2);
  const at::Tensor x = x_in.contiguous();
  const int64_t rows = x.size(0), width = x.size(1), blocks = blocks_of(rows);
  at::Tensor codes = at::empty({rows, width}, x.options().dtype(at::kFloat8_e4m3fn));
  at::Tensor scales = at::empty({blocks, width}, x.options().dtype(at::kFloat));
  const at::BFloat16* x_RW = x.const_data_ptr<at::BFloat16>();
  e4m3* codes_RW = codes.mutable_data_ptr<e4m3>();
  float* scales_QW = scales.mutable_data_ptr<float>();
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kScaleBlock, last = std::min(first + kScaleBlock, rows);
      for (int64_t c = 0; c < width; c += kLanes) {
        const int64_t n = std::min(kLanes, width - c);
        Lanes top(0.0f);
        for (int64_t r = first; r < last; ++r) top = at::vec::maximum(top, load(x_RW + r * width + c, n).abs());
        float scale[kLanes];
        top.store(scale);
        for (float& value : scale) value = scale_of(value);
        const Lanes by = Lanes::loadu(scale);
        store(scales_QW + block * width + c, by, n);
        for (int64_t r = first; r < last; ++r) store(codes_RW + r * width + c, load(x_RW + r * width + c, n) / by, n);
      }
    }
  });
  return {codes, scales};
}

// Matrices [E, B, A] in blocks of 128 x 128.
std::tuple<at::Tensor, at::Tensor> quantize_weights(const at::Tensor& w_in) {
  check("w", w_in, 3);
  const at::Tensor w = w_in.contiguous();
  const int64_t matrices = w.size(0), rows = w.size(1), columns = w.size(2);
  const int64_t row_blocks = blocks_of(rows), column_blocks = blocks_of(columns);
  at::Tensor codes = at::empty(w.sizes(), w.options().dtype(at::kFloat8_e4m3fn));
  at::Tensor scales = at::empty({matrices, row_blocks, column_blocks}, w.options().dtype(at::kFloat));
  const at::BFloat16* from = w.const_data_ptr<at::BFloat16>();
  e4m3* to = codes.mutable_data_ptr<e4m3>();
  float* to_scales = scales.mutable_data_ptr<float>();
  at::parallel_for(0, matrices * row_blocks * column_blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first_row = i / column_blocks % row_blocks * kScaleBlock, column = i % column_blocks * kScaleBlock;
      const int64_t height = std::min(kScaleBlock, rows - first_row), width = std::min(kScaleBlock, columns - column);
      const int64_t first = (i / (row_blocks * column_blocks) * rows + first_row) * columns + column;
      float top = 0;
      for (int64_t r = 0; r < height; ++r) top = larger(top, largest(from + first + r * columns, width));
      to_scales[i] = scale_of(top);
      for (int64_t r = 0; r < height; ++r) divide(from + first + r * columns, width, to_scales[i], to + first + r * columns);
    }
  });
  return {codes, scales};
}

// Each token is quantised once and copied to its rows; rows of padding are 0 with factor 1.
std::tuple<at::Tensor, at::Tensor> permute_quantize(const at::Tensor& x, const at::Tensor& token_in) {
  check_token(token_in, x);
  const auto [codes, scales] = quantize_rows(x);
  const at::Tensor token = token_in.contiguous();
  const int64_t rows = token.size(0), tokens = codes.size(0), width = codes.size(1), blocks = scales.size(1);
  at::Tensor out = at::empty({rows, width}, codes.options()), out_scales = at::empty({rows, blocks}, scales.options());
  const int32_t* token_R = token.const_data_ptr<int32_t>();
  const e4m3* from = codes.const_data_ptr<e4m3>();
  const float* from_scales = scales.const_data_ptr<float>();
  e4m3* to = out.mutable_data_ptr<e4m3>();
  float* to_scales = out_scales.mutable_data_ptr<float>();
  at::parallel_for(0, rows, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      TORCH_CHECK_VALUE(token_R[r] >= -1 && token_R[r] < tokens, "token[", r, "]: ", token_R[r], ", need -1 to ", tokens - 1);
      if (token_R[r] < 0) {
        std::memset(static_cast<void*>(to + r * width), 0, width);
        std::fill_n(to_scales + r * blocks, blocks, 1.0f);
      } else {
        std::memcpy(static_cast<void*>(to + r * width), from + token_R[r] * width, width);
        std::copy_n(from_scales + token_R[r] * blocks, blocks, to_scales + r * blocks);
      }
    }
  });
  return {out, out_scales};
}

// silu(gate) * up of hidden = gate | up, quantised as it is made.
std::tuple<at::Tensor, at::Tensor> swiglu_quantize(const at::Tensor& hidden_in) {
  check_hidden(hidden_in);
  const at::Tensor hidden = hidden_in.contiguous();
  const int64_t rows = hidden.size(0), width = hidden.size(1) / 2, blocks = blocks_of(width);
  at::Tensor codes = at::empty({rows, width}, hidden.options().dtype(at::kFloat8_e4m3fn));
  at::Tensor scales = at::empty({rows, blocks}, hidden.options().dtype(at::kFloat));
  const at::BFloat16* hidden_R2W = hidden.const_data_ptr<at::BFloat16>();
  e4m3* codes_RW = codes.mutable_data_ptr<e4m3>();
  float* scales_RP = scales.mutable_data_ptr<float>();
  at::parallel_for(0, rows, kGrain, [&](int64_t begin, int64_t end) {
    std::vector<at::BFloat16> act_W(width);
    for (int64_t r = begin; r < end; ++r) {
      const at::BFloat16* row = hidden_R2W + r * 2 * width;
      for (int64_t i = 0; i < width; i += kLanes) {
        const int64_t n = std::min(kLanes, width - i);
        store(act_W.data() + i, swiglu(load(row + i, n), load(row + width + i, n)), n);
      }
      quantize_row(act_W.data(), width, codes_RW + r * width, scales_RP + r * blocks);
    }
  });
  return {codes, scales};
}

using Both = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Both quantize_rows_columns(const at::Tensor& x) { return std::tuple_cat(quantize_rows(x), quantize_columns(x)); }

// What codes by rows stand for, rounded to bf16 and quantised by columns.
std::tuple<at::Tensor, at::Tensor> requantize_columns(const at::Tensor& codes_in, const at::Tensor& scales_in) {
  check_codes(codes_in, scales_in);
  const at::Tensor codes = codes_in.contiguous(), scales = scales_in.contiguous();
  const int64_t rows = codes.size(0), width = codes.size(1), blocks = scales.size(1);
  at::Tensor values = at::empty({rows, width}, codes.options().dtype(at::kBFloat16));
  const e4m3* codes_RW = codes.const_data_ptr<e4m3>();
  const float* scales_RP = scales.const_data_ptr<float>();
  at::BFloat16* values_RW = values.mutable_data_ptr<at::BFloat16>();
  at::parallel_for(0, rows, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      at::BFloat16* row = values_RW + r * width;
      widen(codes_RW + r * width, width, row);
      for (int64_t i = 0; i < width; i += kLanes) {  // a register lies in one block of 128
        const int64_t n = std::min(kLanes, width - i);
        store(row + i, load(row + i, n) * Lanes(scales_RP[r * blocks + i / kScaleBlock]), n);
      }
    }
  });
  return quantize_columns(values);
}

// The gradient of hidden = gate | up through silu(gate) * up, rounded to bf16 and quantised both ways.
Both swiglu_backward_quantize(const at::Tensor& d_act_in, const at::Tensor& hidden_in) {
  check_swiglu_gradient(d_act_in, hidden_in);
  const at::Tensor d_act = d_act_in.contiguous(), hidden = hidden_in.contiguous();
  const int64_t rows = d_act.size(0), width = d_act.size(1);
  at::Tensor d_hidden = at::empty(hidden.sizes(), hidden.options());
  const at::BFloat16 *d_act_RF = d_act.const_data_ptr<at::BFloat16>(), *hidden_R2F = hidden.const_data_ptr<at::BFloat16>();
  at::BFloat16* out_R2F = d_hidden.mutable_data_ptr<at::BFloat16>();
  at::parallel_for(0, rows, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      for (int64_t i = 0; i < width; i += kLanes) {
        const int64_t n = std::min(kLanes, width - i), at = r * 2 * width + i;
        const Lanes grad = load(d_act_RF + r * width + i, n), gate = load(hidden_R2F + at, n), up = load(hidden_R2F + at + width, n);
        const Lanes share = (Lanes(1.0f) + gate.neg().exp_u20()).reciprocal(), silu = gate * share;
        store(out_R2F + at, grad * up * at::vec::fmadd(silu, Lanes(1.0f) - share, share), n);
        store(out_R2F + at + width, grad * silu, n);
      }
    }
  });
  return quantize_rows_columns(d_hidden);
}

}  // namespace

TORCH_LIBRARY_IMPL(m2_ops, CPU, m) {
  m.impl("quantize_rows", &quantize_rows);
  m.impl("quantize_columns", &quantize_columns);
  m.impl("quantize_weights", &quantize_weights);
  m.impl("permute_quantize", &permute_quantize);
  m.impl("swiglu_quantize", &swiglu_quantize);
  m.impl("quantize_rows_columns", &quantize_rows_columns);
  m.impl("requantize_columns", &requantize_columns);
  m.impl("swiglu_backward_quantize", &swiglu_backward_quantize);
}

}  // namespace m2::quantize

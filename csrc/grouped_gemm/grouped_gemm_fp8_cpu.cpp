// Grouped products of blockwise e4m3 on the CPU. Codes are exact in bf16, so each block of 128 terms is one bf16 product in fp32, which
// is then multiplied by its factors and added: the numerics of the GPU's promotion, at bf16's speed.
// Shape suffixes: R rows grouped by expert, E experts, A and B the widths of a product's input and output, P blocks of 128.
#include "tasks.h"

#include "../common/fp8.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "grouped_gemm_fp8.h"

namespace m2::grouped_gemm {
namespace {

constexpr int64_t kColumns = kScaleBlock;  // of a tile: one factor of the weight per block of terms

struct Scratch {
  std::vector<bf16> packed, wide, rows;
  std::vector<float> product, sums;
  Scratch(int64_t depth, int64_t wide_size)
      : packed(packed_size(round_up(depth, 2), kColumns)),
        wide(wide_size),
        rows(kRows * round_up(depth, 2)),
        product(kRows * kColumns),
        sums(kRows * kColumns) {}
};

// sums += product * row_scale * column_scale
inline void promote(const float* product, float row_scale, float column_scale, bool first, float* sums) {
  const Lanes factor(row_scale * column_scale);
  for (int64_t i = 0; i < kColumns; i += kLanes)
    store(sums + i, first ? load(product + i) * factor : at::vec::fmadd(load(product + i), factor, load(sums + i)));
}

// x times the groups' matrices: what the tasks of a product read.
struct Product {
  at::Tensor x, x_scale, w, w_scale;
  int64_t depth, width, blocks, out_blocks;
  bool transposed;  // w [E, width, depth]; else [E, depth, width]

  Product(const ProductSizes& s, const at::Tensor& x_in, const at::Tensor& x_scale_in, const at::Tensor& w_in, const at::Tensor& w_scale_in,
          bool transposed_in)
      : x(x_in.contiguous()),
        x_scale(x_scale_in.contiguous()),
        w(w_in.contiguous()),
        w_scale(w_scale_in.contiguous()),
        depth(s.depth),
        width(s.width),
        blocks(blocks_of(s.depth)),
        out_blocks(blocks_of(s.width)),
        transposed(transposed_in) {}

  // Up to 128 columns of a group's matrix, ready to be multiplied by.
  void pack(int64_t group, int64_t column, std::vector<bf16>& wide, std::vector<bf16>& packed) const {
    const int64_t n = std::min(kColumns, width - column);
    const e4m3* w_group = w.const_data_ptr<e4m3>() + group * depth * width;
    if (transposed) {
      widen(w_group + column * depth, n * depth, wide.data());
      pack_nk(wide.data(), depth, depth, n, packed.data(), kColumns);
    } else {
      for (int64_t k = 0; k < depth; ++k) widen(w_group + k * width + column, n, wide.data() + k * n);
      pack_kn(wide.data(), n, depth, n, packed.data(), kColumns);
    }
  }

  // count <= kRows rows from `row` on, widened, padded with zeros; returns the padded count.
  int64_t widen_rows(int64_t row, int64_t count, std::vector<bf16>& rows) const {
    const int64_t padded = round_up(count, kRowStep);
    widen(x.const_data_ptr<e4m3>() + row * depth, count * depth, rows.data());
    std::memset(static_cast<void*>(rows.data() + count * depth), 0, (padded - count) * depth * sizeof(bf16));
    return padded;
  }

  // sums [count, kColumns] of those rows times the packed columns.
  void multiply(int64_t group, int64_t column, int64_t row, int64_t count, int64_t padded, const std::vector<bf16>& rows,
                const std::vector<bf16>& packed, std::vector<float>& product, std::vector<float>& sums) const {
    const float* w_scales = w_scale.const_data_ptr<float>() + group * blocks * out_blocks;
    const float* x_scales = x_scale.const_data_ptr<float>() + row * blocks;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t k = block * kScaleBlock, terms = std::min(kScaleBlock, depth - k), out_block = column / kScaleBlock;
      brgemm(padded, kColumns, terms, rows.data() + k, depth, packed.data() + k * kColumns, kColumns, product.data(), kColumns, false);
      const float column_scale = w_scales[transposed ? out_block * blocks + block : block * out_blocks + out_block];
      for (int64_t r = 0; r < count; ++r)
        promote(product.data() + r * kColumns, x_scales[r * blocks + block], column_scale, block == 0, sums.data() + r * kColumns);
    }
  }
};

at::Tensor grouped_mm_fp8(const at::Tensor& x_in, const at::Tensor& x_scale_in, const at::Tensor& w_in, const at::Tensor& w_scale_in,
                          const at::Tensor& ends, bool transposed) {
  const ProductSizes sizes = check_product(x_in, x_scale_in, w_in, w_scale_in, ends, transposed);
  const Product p(sizes, x_in, x_scale_in, w_in, w_scale_in, transposed);
  at::Tensor out = at::empty({sizes.rows, sizes.width}, p.x.options().dtype(at::kBFloat16));
  bf16* out_RB = out.mutable_data_ptr<bf16>();
  std::memset(static_cast<void*>(out_RB + used_rows(ends) * p.width), 0, (sizes.rows - used_rows(ends)) * p.width * sizeof(bf16));
  const std::vector<Task> tasks = tasks_of(ends.const_data_ptr<int32_t>(), sizes.groups, p.width, kColumns);
  each_task(
      tasks.size(), [&] { return Scratch(p.depth, p.depth * kColumns); },
      [&](Scratch& s, int64_t i) {
        const Task& task = tasks[i];
        p.pack(task.group, task.column, s.wide, s.packed);
        for (int64_t row = task.begin; row < task.end; row += kRows) {
          const int64_t count = std::min(kRows, task.end - row), padded = p.widen_rows(row, count, s.rows);
          p.multiply(task.group, task.column, row, count, padded, s.rows, s.packed, s.product, s.sums);
          store_tile(s.sums.data(), kColumns, count, std::min(kColumns, p.width - task.column), out_RB + row * p.width + task.column,
                     p.width);
        }
      });
  return out;
}

// A tile of rows meets the same 128 columns of gate and of up, so that silu(gate) * up is quantised before it leaves the cache.
std::tuple<at::Tensor, at::Tensor, at::Tensor> grouped_swiglu_fp8(const at::Tensor& x_in, const at::Tensor& x_scale_in,
                                                                  const at::Tensor& w_in, const at::Tensor& w_scale_in,
                                                                  const at::Tensor& ends) {
  const SwigluSizes sizes = check_swiglu(x_in, x_scale_in, w_in, w_scale_in, ends);
  const int64_t width = sizes.width, used = used_rows(ends), rows = sizes.rows, scale_blocks = blocks_of(width);
  const Product p({sizes.groups, rows, sizes.depth, 2 * width}, x_in, x_scale_in, w_in, w_scale_in, true);
  at::Tensor hidden = at::empty({rows, 2 * width}, p.x.options().dtype(at::kBFloat16));
  at::Tensor codes = at::empty({rows, width}, p.x.options()), scales = at::empty({rows, scale_blocks}, p.x_scale.options());
  bf16* hidden_R2F = hidden.mutable_data_ptr<bf16>();
  e4m3* codes_RF = codes.mutable_data_ptr<e4m3>();
  float* scales_RP = scales.mutable_data_ptr<float>();
  std::memset(static_cast<void*>(hidden_R2F + used * 2 * width), 0, (rows - used) * 2 * width * sizeof(bf16));
  std::memset(static_cast<void*>(codes_RF + used * width), 0, (rows - used) * width);
  std::fill_n(scales_RP + used * scale_blocks, (rows - used) * scale_blocks, 1.0f);
  const std::vector<Task> tasks = tasks_of(ends.const_data_ptr<int32_t>(), sizes.groups, width, kColumns);
  struct Pair {
    Scratch gate, up;
  };
  each_task(
      tasks.size(), [&] { return Pair{Scratch(p.depth, p.depth * kColumns), Scratch(p.depth, p.depth * kColumns)}; },
      [&](Pair& s, int64_t i) {
        const Task& task = tasks[i];
        p.pack(task.group, task.column, s.gate.wide, s.gate.packed);
        p.pack(task.group, width + task.column, s.up.wide, s.up.packed);
        for (int64_t row = task.begin; row < task.end; row += kRows) {
          const int64_t count = std::min(kRows, task.end - row), padded = p.widen_rows(row, count, s.gate.rows);
          p.multiply(task.group, task.column, row, count, padded, s.gate.rows, s.gate.packed, s.gate.product, s.gate.sums);
          p.multiply(task.group, width + task.column, row, count, padded, s.gate.rows, s.up.packed, s.up.product, s.up.sums);
          bf16* gate = hidden_R2F + row * 2 * width + task.column;
          store_tile(s.gate.sums.data(), kColumns, count, kColumns, gate, 2 * width);
          store_tile(s.up.sums.data(), kColumns, count, kColumns, gate + width, 2 * width);
          for (int64_t r = 0; r < count; ++r, gate += 2 * width) {
            bf16 act[kColumns];
            for (int64_t c = 0; c < kColumns; c += kLanes) store(act + c, swiglu(load(gate + c), load(gate + width + c)));
            quantize_row(act, kColumns, codes_RF + (row + r) * width + task.column,
                         scales_RP + (row + r) * scale_blocks + task.column / kColumns);
          }
        }
      });
  return {codes, scales, hidden};
}

// dy^T x of each group; factors per column and 128 rows, so every group begins and ends on a multiple of 128.
at::Tensor grouped_wgrad_fp8(const at::Tensor& dy_in, const at::Tensor& dy_scale_in, const at::Tensor& x_in, const at::Tensor& x_scale_in,
                             const at::Tensor& ends) {
  const auto [groups, rows, out_width, in_width] = check_wgrad(dy_in, dy_scale_in, x_in, x_scale_in, ends);
  const int32_t* end = ends.const_data_ptr<int32_t>();
  for (int64_t e = 0; e < groups; ++e)
    TORCH_CHECK_VALUE(end[e] % kScaleBlock == 0, "ends[", e, "]: ", end[e], ", need a multiple of ", kScaleBlock);
  const at::Tensor dy = dy_in.contiguous(), dy_scale = dy_scale_in.contiguous(), x = x_in.contiguous(), x_scale = x_scale_in.contiguous();
  at::Tensor out = at::empty({groups, out_width, in_width}, dy.options().dtype(at::kBFloat16));
  const e4m3 *dy_RB = dy.const_data_ptr<e4m3>(), *x_RA = x.const_data_ptr<e4m3>();
  const float *dy_scale_QB = dy_scale.const_data_ptr<float>(), *x_scale_QA = x_scale.const_data_ptr<float>();
  bf16* out_EBA = out.mutable_data_ptr<bf16>();
  int64_t longest = 0;
  for (int64_t e = 0; e < groups; ++e) longest = std::max<int64_t>(longest, end[e] - (e ? end[e - 1] : 0));
  const int64_t per_group = blocks_of(in_width);
  each_task(
      groups * per_group, [&] { return Scratch(std::max<int64_t>(longest, 2), kScaleBlock * kColumns); },
      [&](Scratch& s, int64_t i) {
        const int64_t e = i / per_group, column = i % per_group * kColumns, n = std::min(kColumns, in_width - column);
        const int64_t start = e ? end[e - 1] : 0, blocks = (end[e] - start) / kScaleBlock;
        bf16* out_BA = out_EBA + e * out_width * in_width + column;
        for (int64_t block = 0; block < blocks; ++block) {
          for (int64_t k = 0; k < kScaleBlock; ++k)
            widen(x_RA + (start + block * kScaleBlock + k) * in_width + column, n, s.wide.data() + k * n);
          pack_kn(s.wide.data(), n, kScaleBlock, n, s.packed.data() + block * kScaleBlock * kColumns, kColumns);
        }
        std::vector<bf16>& across = s.rows;  // [kRows, 128] of dy^T
        for (int64_t b = 0; b < out_width; b += kRows) {
          const int64_t tile_rows = std::min(kRows, out_width - b);
          std::fill(s.sums.begin(), s.sums.end(), 0.0f);
          for (int64_t block = 0; block < blocks; ++block) {
            const int64_t first = start + block * kScaleBlock, scale_row = first / kScaleBlock;
            for (int64_t k = 0; k < kScaleBlock; ++k) widen(dy_RB + (first + k) * out_width + b, tile_rows, s.wide.data() + k * tile_rows);
            transpose(s.wide.data(), tile_rows, kScaleBlock, tile_rows, across.data(), kScaleBlock);
            brgemm(tile_rows, kColumns, kScaleBlock, across.data(), kScaleBlock, s.packed.data() + block * kScaleBlock * kColumns, kColumns,
                   s.product.data(), kColumns, false);
            for (int64_t r = 0; r < tile_rows; ++r) {
              const Lanes row_scale(dy_scale_QB[scale_row * out_width + b + r]);
              for (int64_t c = 0; c < n; c += kLanes) {
                const Lanes factor = row_scale * load(x_scale_QA + scale_row * in_width + column + c, std::min(kLanes, n - c));
                float* sum = s.sums.data() + r * kColumns + c;
                store(sum, at::vec::fmadd(load(s.product.data() + r * kColumns + c), factor, load(sum)));
              }
            }
          }
          store_tile(s.sums.data(), kColumns, tile_rows, n, out_BA + b * in_width, in_width);
        }
      });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(m2_ops, CPU, m) {
  m.impl("grouped_mm_fp8", &grouped_mm_fp8);
  m.impl("grouped_swiglu_fp8", &grouped_swiglu_fp8);
  m.impl("grouped_wgrad_fp8", &grouped_wgrad_fp8);
}

}  // namespace m2::grouped_gemm

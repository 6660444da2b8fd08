// Grouped bf16 products on the CPU. Every tile of the output is one task's: a task packs its block of the weight once and runs over the
// rows of its group. Epilogues work on the fp32 tile while it is in the cache.
// Shape suffixes: R rows grouped by expert, E experts, A and B the widths of a product's input and output, F expert width.
#include "tasks.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "grouped_gemm.h"

namespace m2::grouped_gemm {
namespace {

constexpr int64_t kDepth = 512;  // rows of one product of the weight gradient, in multiples of kDepthStep
constexpr int64_t kDepthStep = 32;
constexpr int64_t kPackedBytes = 768 << 10;  // a packed block stays in a core's second-level cache

// Columns of a tile for a packed block of `depth` rows; all tiles of a width are about equal, so that little of the last is wasted.
int64_t tile_columns(int64_t depth, int64_t width) {
  int64_t columns = 256;
  while (columns > 64 && columns * depth * static_cast<int64_t>(sizeof(bf16)) > kPackedBytes) columns /= 2;
  const int64_t tiles = std::max<int64_t>(1, (width + columns - 1) / columns);
  return round_up((width + tiles - 1) / tiles, 16);
}

// One thread's packed block, tile of sums, and rows of a group's ragged end.
struct Scratch {
  std::vector<bf16> packed, ragged;
  std::vector<float> tile;
  Scratch(int64_t depth, int64_t columns) : packed(packed_size(depth, columns)), ragged(kRows * depth), tile(kRows * columns) {}
};

// For each tile of rows of the task: tile = rows_RA packed; then epilogue(first row, rows, tile).
template <typename Epilogue>
void run_rows(const Task& task, const bf16* rows_RA, int64_t depth, int64_t columns, Scratch& scratch, Epilogue epilogue) {
  for (int64_t row = task.begin; row < task.end; row += kRows) {
    const int64_t rows = std::min(kRows, task.end - row), padded = round_up(rows, kRowStep);
    const bf16* from = rows_RA + row * depth;
    if (padded > rows) {
      std::memcpy(static_cast<void*>(scratch.ragged.data()), from, rows * depth * sizeof(bf16));
      std::memset(static_cast<void*>(scratch.ragged.data() + rows * depth), 0, (padded - rows) * depth * sizeof(bf16));
      from = scratch.ragged.data();
    }
    brgemm(padded, columns, depth, from, depth, scratch.packed.data(), columns, scratch.tile.data(), columns, false);
    epilogue(row, rows, scratch.tile.data());
  }
}

// Rows that belong to no group are zero.
at::Tensor rows_like(const at::Tensor& like, int64_t rows, int64_t width, int64_t used) {
  at::Tensor out = at::empty({rows, width}, like.options());
  std::memset(static_cast<char*>(out.mutable_data_ptr()) + used * width * sizeof(bf16), 0, (rows - used) * width * sizeof(bf16));
  return out;
}

// x [R, A] times w[e]^T (w [E, B, A]) or, not transposed, w[e] (w [E, A, B]).
at::Tensor grouped_mm(const at::Tensor& x_in, const at::Tensor& w_in, const at::Tensor& ends, bool transposed) {
  check_dim("x", x_in, 2);
  check_dim("w", w_in, 3);
  const int64_t groups = w_in.size(0), rows = x_in.size(0), depth = x_in.size(1), width = w_in.size(transposed ? 1 : 2);
  check_bf16("x", x_in, {rows, depth}, x_in);
  check_even("x", depth);
  if (transposed) check_bf16("w", w_in, {groups, width, depth}, x_in);
  else check_bf16("w", w_in, {groups, depth, width}, x_in);
  check_ends(ends, groups, rows);
  const at::Tensor x = x_in.contiguous(), w = w_in.contiguous();
  at::Tensor out = rows_like(x, rows, width, used_rows(ends));
  const int64_t columns = tile_columns(depth, width);
  const std::vector<Task> tasks = tasks_of(ends.const_data_ptr<int32_t>(), groups, width, columns);
  const bf16 *x_RA = x.const_data_ptr<bf16>(), *weights = w.const_data_ptr<bf16>();
  bf16* out_RB = out.mutable_data_ptr<bf16>();
  each_task(
      tasks.size(), [&] { return Scratch(depth, columns); },
      [&](Scratch& scratch, int64_t i) {
        const Task& task = tasks[i];
        const int64_t n = std::min(columns, width - task.column);
        const bf16* w_group = weights + task.group * depth * width;
        if (transposed) pack_nk(w_group + task.column * depth, depth, depth, n, scratch.packed.data(), columns);
        else pack_kn(w_group + task.column, width, depth, n, scratch.packed.data(), columns);
        run_rows(task, x_RA, depth, columns, scratch, [&](int64_t row, int64_t count, const float* tile) {
          store_tile(tile, columns, count, n, out_RB + row * width + task.column, width);
        });
      });
  return out;
}

Lanes sigmoid(Lanes x) { return (Lanes(1.0f) + x.neg().exp_u20()).reciprocal(); }

// gate | up of x gate_up[e]^T, rounded to bf16, and silu(gate) * up of those: one tile holds both halves of its columns.
std::tuple<at::Tensor, at::Tensor> grouped_swiglu(const at::Tensor& x_in, const at::Tensor& gate_up_in, const at::Tensor& ends) {
  check_dim("x", x_in, 2);
  check_dim("gate_up", gate_up_in, 3);
  const int64_t groups = gate_up_in.size(0), rows = x_in.size(0), depth = x_in.size(1), width = gate_up_in.size(1) / 2;
  check_bf16("x", x_in, {rows, depth}, x_in);
  check_even("x", depth);
  check_bf16("gate_up", gate_up_in, {groups, 2 * width, depth}, x_in);
  check_ends(ends, groups, rows);
  const at::Tensor x = x_in.contiguous(), gate_up = gate_up_in.contiguous();
  at::Tensor hidden = rows_like(x, rows, 2 * width, used_rows(ends)), act = rows_like(x, rows, width, used_rows(ends));
  const int64_t half = tile_columns(2 * depth, width), columns = 2 * half;  // of gate, of gate and up
  const std::vector<Task> tasks = tasks_of(ends.const_data_ptr<int32_t>(), groups, width, half);
  const bf16 *x_RA = x.const_data_ptr<bf16>(), *weights = gate_up.const_data_ptr<bf16>();
  bf16 *hidden_R2F = hidden.mutable_data_ptr<bf16>(), *act_RF = act.mutable_data_ptr<bf16>();
  each_task(
      tasks.size(), [&] { return Scratch(depth, columns); },
      [&](Scratch& scratch, int64_t i) {
        const Task& task = tasks[i];
        const int64_t n = std::min(half, width - task.column);
        const bf16* gate_rows = weights + (task.group * 2 * width + task.column) * depth;
        pack_nk(gate_rows, depth, depth, n, scratch.packed.data(), columns);
        pack_nk(gate_rows + width * depth, depth, depth, n, scratch.packed.data() + 2 * half, columns);
        run_rows(task, x_RA, depth, columns, scratch, [&](int64_t row, int64_t count, const float* tile) {
          for (int64_t r = 0; r < count; ++r) {
            bf16* gate_out = hidden_R2F + (row + r) * 2 * width + task.column;
            for (int64_t j = 0; j < n; j += kLanes) {
              const int64_t lanes = std::min(kLanes, n - j);
              const Lanes gate = rounded<bf16>(load(tile + r * columns + j, lanes)),
                          up = rounded<bf16>(load(tile + r * columns + half + j, lanes));
              store(gate_out + j, gate, lanes);
              store(gate_out + width + j, up, lanes);
              store(act_RF + (row + r) * width + task.column + j, gate * sigmoid(gate) * up, lanes);
            }
          }
        });
      });
  return {act, hidden};
}

// d_act = dy down[e], and from it, in the same tile, the gradient of gate | up.
at::Tensor grouped_swiglu_backward(const at::Tensor& dy_in, const at::Tensor& down_in, const at::Tensor& hidden_in,
                                   const at::Tensor& ends) {
  check_dim("dy", dy_in, 2);
  check_dim("down", down_in, 3);
  const int64_t groups = down_in.size(0), rows = dy_in.size(0), depth = dy_in.size(1), width = down_in.size(2);
  check_bf16("dy", dy_in, {rows, depth}, dy_in);
  check_even("dy", depth);
  check_bf16("down", down_in, {groups, depth, width}, dy_in);
  check_bf16("hidden", hidden_in, {rows, 2 * width}, dy_in);
  check_ends(ends, groups, rows);
  const at::Tensor dy = dy_in.contiguous(), down = down_in.contiguous(), hidden = hidden_in.contiguous();
  at::Tensor d_hidden = rows_like(dy, rows, 2 * width, used_rows(ends));
  const int64_t columns = tile_columns(depth, width);
  const std::vector<Task> tasks = tasks_of(ends.const_data_ptr<int32_t>(), groups, width, columns);
  const bf16 *dy_RA = dy.const_data_ptr<bf16>(), *weights = down.const_data_ptr<bf16>(), *hidden_R2F = hidden.const_data_ptr<bf16>();
  bf16* out_R2F = d_hidden.mutable_data_ptr<bf16>();
  each_task(
      tasks.size(), [&] { return Scratch(depth, columns); },
      [&](Scratch& scratch, int64_t i) {
        const Task& task = tasks[i];
        const int64_t n = std::min(columns, width - task.column);
        pack_kn(weights + task.group * depth * width + task.column, width, depth, n, scratch.packed.data(), columns);
        run_rows(task, dy_RA, depth, columns, scratch, [&](int64_t row, int64_t count, const float* tile) {
          for (int64_t r = 0; r < count; ++r) {
            const int64_t at = (row + r) * 2 * width + task.column;
            for (int64_t j = 0; j < n; j += kLanes) {
              const int64_t lanes = std::min(kLanes, n - j);
              const Lanes d_act = load(tile + r * columns + j, lanes), gate = load(hidden_R2F + at + j, lanes),
                          up = load(hidden_R2F + at + width + j, lanes);
              const Lanes s = sigmoid(gate), silu = gate * s;
              store(out_R2F + at + j, d_act * up * at::vec::fmadd(silu, Lanes(1.0f) - s, s), lanes);
              store(out_R2F + at + width + j, d_act * silu, lanes);
            }
          }
        });
      });
  return d_hidden;
}

// dy^T of every group in slabs of kDepth rows: slab [B, kDepth], what lies beyond the group's rows zero.
struct Slabs {
  std::vector<int64_t> first;  // of each group, and one past the last
  at::Tensor data;

  Slabs(const bf16* dy_RB, const int32_t* ends, int64_t groups, int64_t width, const at::TensorOptions& options) : first(groups + 1, 0) {
    for (int64_t e = 0; e < groups; ++e) first[e + 1] = first[e] + round_up(ends[e] - (e ? ends[e - 1] : 0), kDepth) / kDepth;
    data = at::empty({first[groups], width, kDepth}, options);
    bf16* to = data.mutable_data_ptr<bf16>();
    at::parallel_for(0, first[groups], 1, [&](int64_t begin, int64_t end) {
      int64_t e = std::upper_bound(first.begin(), first.end(), begin) - first.begin() - 1;
      for (int64_t slab = begin; slab < end; ++slab) {
        while (slab >= first[e + 1]) ++e;
        const int64_t row = (e ? ends[e - 1] : 0) + (slab - first[e]) * kDepth, rows = std::min<int64_t>(kDepth, ends[e] - row);
        bf16* out = to + slab * width * kDepth;
        transpose(dy_RB + row * width, width, rows, width, out, kDepth);
        const int64_t padded = round_up(rows, kDepthStep);
        if (padded > rows) {
          for (int64_t b = 0; b < width; ++b) std::memset(static_cast<void*>(out + b * kDepth + rows), 0, (padded - rows) * sizeof(bf16));
        }
      }
    });
  }
};

// [E, B, A]: dy^T x of each group's rows; a group without rows gets zeros.
at::Tensor grouped_wgrad(const at::Tensor& dy_in, const at::Tensor& x_in, const at::Tensor& ends) {
  check_dim("dy", dy_in, 2);
  check_dim("x", x_in, 2);
  const int64_t groups = ends.numel(), rows = dy_in.size(0), out_width = dy_in.size(1), in_width = x_in.size(1);
  check_bf16("dy", dy_in, {rows, out_width}, dy_in);
  check_bf16("x", x_in, {rows, in_width}, dy_in);
  check_ends(ends, groups, rows);
  const at::Tensor dy = dy_in.contiguous(), x = x_in.contiguous();
  at::Tensor out = at::empty({groups, out_width, in_width}, dy.options());
  if (out.numel() == 0) return out;
  const int32_t* end = ends.const_data_ptr<int32_t>();
  const Slabs slabs(dy.const_data_ptr<bf16>(), end, groups, out_width, dy.options());
  const bf16 *x_RA = x.const_data_ptr<bf16>(), *slab_data = slabs.data.const_data_ptr<bf16>();
  bf16* out_EBA = out.mutable_data_ptr<bf16>();
  int64_t longest = 0;
  for (int64_t e = 0; e < groups; ++e) longest = std::max<int64_t>(longest, end[e] - (e ? end[e - 1] : 0));
  const int64_t depth = round_up(longest, kDepthStep), columns = tile_columns(depth, in_width),
                per_group = (in_width + columns - 1) / columns;
  each_task(
      groups * per_group, [&] { return Scratch(depth, columns); },
      [&](Scratch& scratch, int64_t i) {
        const int64_t e = i / per_group, column = i % per_group * columns, n = std::min(columns, in_width - column);
        const int64_t start = e ? end[e - 1] : 0, count = end[e] - start;
        bf16* out_BA = out_EBA + e * out_width * in_width + column;
        if (count == 0) {
          for (int64_t b = 0; b < out_width; ++b) std::memset(static_cast<void*>(out_BA + b * in_width), 0, n * sizeof(bf16));
          return;
        }
        pack_kn(x_RA + start * in_width + column, in_width, count, n, scratch.packed.data(), columns);
        const int64_t packed_rows = round_up(count, 2), padded = round_up(count, kDepthStep);
        std::memset(static_cast<void*>(scratch.packed.data() + packed_rows * columns), 0, (padded - packed_rows) * columns * sizeof(bf16));
        for (int64_t b = 0; b < out_width; b += kRows) {
          const int64_t tile_rows = std::min(kRows, out_width - b);
          for (int64_t k = 0; k < padded; k += kDepth) {
            const bf16* from = slab_data + ((slabs.first[e] + k / kDepth) * out_width + b) * kDepth;
            brgemm(tile_rows, columns, std::min(kDepth, padded - k), from, kDepth, scratch.packed.data() + k * columns, columns,
                   scratch.tile.data(), columns, k > 0);
          }
          store_tile(scratch.tile.data(), columns, tile_rows, n, out_BA + b * in_width, in_width);
        }
      });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(m2_ops, CPU, m) {
  m.impl("grouped_mm", &grouped_mm);
  m.impl("grouped_wgrad", &grouped_wgrad);
  m.impl("grouped_swiglu", &grouped_swiglu);
  m.impl("grouped_swiglu_backward", &grouped_swiglu_backward);
}

}  // namespace m2::grouped_gemm

// Dispatch and combine on the CPU: a token's bytes are copied to, and its rows added up from, the ranks that have one of its experts.
// Shape suffixes: T tokens, K experts per token, R ranks, W width.
#include "../common/fp8.h"
#include "expert_parallel.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <torch/library.h>

#include <vector>

namespace m2::expert_parallel {
namespace {

constexpr int64_t kGrain = 32;  // rows worth a task of their own

std::tuple<at::Tensor, at::Tensor> ep_plan(const at::Tensor& experts_in, int64_t num_experts, int64_t ranks) {
  check_plan(experts_in, num_experts, ranks);
  const at::Tensor experts = experts_in.contiguous();
  const int64_t tokens = experts.size(0), top_k = experts.size(1), per_rank = num_experts / ranks;
  at::Tensor row = at::full({tokens, ranks}, -1, experts.options()), counts = at::full({ranks, 2}, 0, experts.options());
  const int32_t* experts_TK = experts.const_data_ptr<int32_t>();
  int32_t *row_TR = row.mutable_data_ptr<int32_t>(), *counts_R2 = counts.mutable_data_ptr<int32_t>();
  std::vector<int32_t> rank_of(num_experts);
  for (int64_t e = 0; e < num_experts; ++e) rank_of[e] = static_cast<int32_t>(e / per_rank);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t k = 0; k < top_k; ++k) {
      const int32_t expert = experts_TK[t * top_k + k];
      TORCH_CHECK_VALUE(expert >= -1 && expert < num_experts, "experts[", t, ", ", k, "]: ", expert, ", need -1 to ", num_experts - 1);
      if (expert < 0) continue;
      int32_t &mine = row_TR[t * ranks + rank_of[expert]], *count = counts_R2 + 2 * rank_of[expert];
      if (mine < 0) mine = count[0]++;
      ++count[1];
    }
  }
  return {counts, row};
}

void ep_pack(at::TensorList parts_in, const OptionalTensor& experts_in, const at::Tensor& row_in, int64_t per_rank, at::IntArrayRef at,
             at::TensorList out) {
  check_pack(parts_in, experts_in, row_in, per_rank, at, out);
  std::vector<at::Tensor> kept;
  for (const at::Tensor& x : parts_in) kept.push_back(with_rows(x));
  const Parts parts = parts_of(kept, at);
  const at::Tensor row = row_in.contiguous(), experts = experts_in ? experts_in->contiguous() : at::Tensor();
  const int64_t tokens = row.size(0), ranks = row.size(1), bytes = out[0].size(1), top_k = experts_in ? experts.size(1) : 0;
  const int32_t *row_TR = row.const_data_ptr<int32_t>(), *experts_TK = experts_in ? experts.const_data_ptr<int32_t>() : nullptr;
  std::vector<char*> out_R;
  for (const at::Tensor& x : out) out_R.push_back(static_cast<char*>(x.mutable_data_ptr()));
  at::parallel_for(0, tokens, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t r = 0; r < ranks; ++r) {
        const int32_t mine = row_TR[t * ranks + r];
        if (mine < 0 || out[r].size(0) == 0) continue;
        TORCH_CHECK_VALUE(mine < out[r].size(0), "row[", t, ", ", r, "]: ", mine, ", need -1 to ", out[r].size(0) - 1);
        char* to = out_R[r] + mine * bytes;
        for (int i = 0; i < parts.count; ++i) {
          const Part& part = parts.part[i];
          std::memcpy(to + part.at, part.data + t * part.stride, part.bytes);
        }
        int32_t* to_K = reinterpret_cast<int32_t*>(to + at.back());
        for (int64_t k = 0; k < top_k; ++k) {
          const int64_t here = experts_TK[t * top_k + k] - r * per_rank;
          to_K[k] = here >= 0 && here < per_rank ? static_cast<int32_t>(here) : -1;
        }
      }
    }
  });
}

// to = the rows' sum, each in turn.
template <typename T>
void add_rows(const std::vector<const T*>& rows, int64_t width, T* to_W) {
  if constexpr (std::is_same_v<T, double>) {
    for (int64_t i = 0; i < width; ++i) {
      double total = 0;
      for (const T* row : rows) total += row[i];
      to_W[i] = total;
    }
  } else {
    for (int64_t i = 0; i < width; i += kLanes) {
      const int64_t n = std::min(kLanes, width - i);
      Lanes total(0.0f);
      for (const T* row : rows) total = total + load(row + i, n);
      store(to_W + i, total, n);
    }
  }
}

at::Tensor ep_combine(at::TensorList rows, const at::Tensor& row_in) {
  check_combine(rows, row_in);
  const at::Tensor row = row_in.contiguous();
  const int64_t tokens = row.size(0), ranks = row.size(1), width = rows[0].size(1);
  at::Tensor out = at::empty({tokens, width}, rows[0].options());
  const int32_t* row_TR = row.const_data_ptr<int32_t>();
  const auto run = [&]<typename T>(T* out_TW) {
    std::vector<const T*> rows_R;
    for (const at::Tensor& x : rows) rows_R.push_back(x.const_data_ptr<T>());
    at::parallel_for(0, tokens, kGrain, [&](int64_t begin, int64_t end) {
      std::vector<const T*> mine;
      for (int64_t t = begin; t < end; ++t) {
        mine.clear();
        for (int64_t r = 0; r < ranks; ++r) {
          const int32_t at = row_TR[t * ranks + r];
          TORCH_CHECK_VALUE(at >= -1 && at < rows[r].size(0), "row[", t, ", ", r, "]: ", at, ", need -1 to ", rows[r].size(0) - 1);
          if (at >= 0) mine.push_back(rows_R[r] + at * width);
        }
        add_rows(mine, width, out_TW + t * width);
      }
    });
  };
  if (out.scalar_type() == at::kDouble) run(out.mutable_data_ptr<double>());
  else if (out.scalar_type() == at::kFloat) run(out.mutable_data_ptr<float>());
  else run(out.mutable_data_ptr<at::BFloat16>());
  return out;
}

at::Tensor ep_dequantize(const at::Tensor& codes_in, const at::Tensor& scales_in) {
  check_dequantize(codes_in, scales_in);
  const at::Tensor codes = with_rows(codes_in), scales = with_rows(scales_in);
  const int64_t rows = codes.size(0), width = codes.size(1), stride = codes.stride(0), scale_stride = scales.stride(0);
  at::Tensor out = at::empty({rows, width}, codes.options().dtype(at::kBFloat16));
  const e4m3* codes_RW = codes.const_data_ptr<e4m3>();
  const float* scales_RP = scales.const_data_ptr<float>();
  at::BFloat16* out_RW = out.mutable_data_ptr<at::BFloat16>();
  at::parallel_for(0, rows, kGrain, [&](int64_t begin, int64_t end) {
    at::BFloat16 wide[kScaleBlock];
    for (int64_t r = begin; r < end; ++r) {
      for (int64_t first = 0; first < width; first += kScaleBlock) {
        const int64_t count = std::min(kScaleBlock, width - first);
        widen(codes_RW + r * stride + first, count, wide);
        const Lanes scale(scales_RP[r * scale_stride + first / kScaleBlock]);
        for (int64_t i = 0; i < count; i += kLanes) {
          const int64_t n = std::min(kLanes, count - i);
          store(out_RW + r * width + first + i, load(wide + i, n) * scale, n);
        }
      }
    }
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(m2_ops, CPU, m) {
  m.impl("ep_plan", &ep_plan);
  m.impl("ep_pack", &ep_pack);
  m.impl("ep_combine", &ep_combine);
  m.impl("ep_dequantize", &ep_dequantize);
}

}  // namespace m2::expert_parallel

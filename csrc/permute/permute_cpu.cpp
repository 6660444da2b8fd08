// Tokens to rows grouped by expert and back, on the CPU: whole rows are copied or summed, tokens in parallel.
// Shape suffixes: T tokens, K experts per token, E experts, R rows, W width.
#include "../common/lanes.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <torch/library.h>

#include <vector>

#include "permute.h"

namespace m2::permute {
namespace {

constexpr int64_t kGrain = 32;                       // rows worth a task of their own
constexpr int64_t kStreamBytes = int64_t{32} << 20;  // an output this large has left the cache before anything reads it

// Copies of rows that pass the cache by when told to.
class RowCopy {
 public:
  RowCopy(int64_t bytes, const void* to, int64_t total_bytes)
      : bytes_(bytes), stream_(total_bytes >= kStreamBytes && bytes % 64 == 0 && reinterpret_cast<uintptr_t>(to) % 64 == 0) {}

  void copy(void* to, const void* from) const {
#ifdef CPU_CAPABILITY_AVX512
    if (stream_) {
      for (int64_t i = 0; i < bytes_; i += 64) {
        _mm512_stream_si512(reinterpret_cast<__m512i*>(static_cast<char*>(to) + i), _mm512_loadu_si512(static_cast<const char*>(from) + i));
      }
      return;
    }
#endif
    std::memcpy(to, from, bytes_);
  }

  void done() const {
#ifdef CPU_CAPABILITY_AVX512
    if (stream_) _mm_sfence();
#endif
  }

 private:
  int64_t bytes_;
  bool stream_;
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> permute_layout(const at::Tensor& experts_in, int64_t num_experts, int64_t block,
                                                              std::optional<int64_t> routed_in) {
  check_layout(experts_in, num_experts, block, routed_in);
  const at::Tensor experts = experts_in.contiguous();
  const int64_t slots = experts.numel(), top_k = experts.size(1), routed = routed_in.value_or(slots);
  const int32_t* experts_TK = experts.const_data_ptr<int32_t>();
  at::Tensor token = at::full({most_rows(routed, num_experts, block)}, -1, experts.options());
  at::Tensor row = at::empty_like(experts), ends = at::empty({num_experts}, experts.options());
  std::vector<int32_t> next(num_experts);
  int64_t chosen = 0;
  for (int64_t i = 0; i < slots; ++i) {
    TORCH_CHECK_VALUE(experts_TK[i] >= -1 && experts_TK[i] < num_experts, "experts[", i / top_k, ", ", i % top_k, "]: ", experts_TK[i],
                      ", need -1 to ", num_experts - 1);
    if (experts_TK[i] < 0) continue;
    ++next[experts_TK[i]];
    ++chosen;
  }
  TORCH_CHECK_VALUE(chosen <= routed, "routed: ", routed, ", but ", chosen, " slots have an expert");
  int32_t *token_R = token.mutable_data_ptr<int32_t>(), *row_TK = row.mutable_data_ptr<int32_t>(),
          *ends_E = ends.mutable_data_ptr<int32_t>();
  int64_t start = 0;
  for (int64_t e = 0; e < num_experts; ++e) {
    const int64_t count = next[e];
    next[e] = static_cast<int32_t>(start);
    start += (count + block - 1) / block * block;
    ends_E[e] = static_cast<int32_t>(start);
  }
  for (int64_t i = 0; i < slots; ++i) {
    row_TK[i] = experts_TK[i] < 0 ? -1 : next[experts_TK[i]]++;
    if (row_TK[i] >= 0) token_R[row_TK[i]] = static_cast<int32_t>(i / top_k);
  }
  return {ends, token, row};
}

at::Tensor permute(const at::Tensor& x_in, const at::Tensor& token_in, const at::Tensor& row_in) {
  check_rows("x", x_in);
  check_index("token", token_in, 1, x_in);
  check_index("row", row_in, 2, x_in);
  const at::Tensor x = with_rows(x_in), token = token_in.contiguous();
  const int64_t size = static_cast<int64_t>(x.element_size()), stride = x.stride(0) * size;
  const int64_t rows = token.size(0), tokens = x.size(0), bytes = x.size(1) * size;
  at::Tensor out = at::empty({rows, x.size(1)}, x.options());
  const int32_t* token_R = token.const_data_ptr<int32_t>();
  const char* from = static_cast<const char*>(x.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  const RowCopy row_copy(bytes, to, rows * bytes);
  at::parallel_for(0, rows, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      TORCH_CHECK_VALUE(token_R[r] >= -1 && token_R[r] < tokens, "token[", r, "]: ", token_R[r], ", need -1 to ", tokens - 1);
      if (token_R[r] < 0) std::memset(to + r * bytes, 0, bytes);
      else row_copy.copy(to + r * bytes, from + token_R[r] * stride);
    }
    row_copy.done();
  });
  return out;
}

void check_row_range(const int32_t* row_K, int64_t top_k, int64_t rows, int64_t token) {
  for (int64_t k = 0; k < top_k; ++k) {
    TORCH_CHECK_VALUE(row_K[k] >= -1 && row_K[k] < rows, "row[", token, ", ", k, "]: ", row_K[k], ", need -1 to ", rows - 1);
  }
}

// out_t = sum_k weights_tk rows_(row_tk), in fp32, k in order.
template <typename T>
void combine(const T* rows_RW, const int32_t* row_TK, const float* weights_TK, int64_t tokens, int64_t top_k, int64_t rows, int64_t width,
             T* out_TW) {
  at::parallel_for(0, tokens, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int32_t* row_K = row_TK + t * top_k;
      check_row_range(row_K, top_k, rows, t);
      for (int64_t i = 0; i < width; i += kLanes) {
        const int64_t n = std::min(kLanes, width - i);
        Lanes total(0.0f);
        for (int64_t k = 0; k < top_k; ++k) {
          if (row_K[k] < 0) continue;
          const Lanes x = load(rows_RW + row_K[k] * width + i, n);
          total = weights_TK ? at::vec::fmadd(Lanes(weights_TK[t * top_k + k]), x, total) : total + x;
        }
        store(out_TW + t * width + i, total, n);
      }
    }
  });
}

// The combination's backward: d_rows_(row_tk) = weights_tk grad_t, d_weights_tk = <rows_(row_tk), grad_t>; rows of no token get 0.
template <typename T>
void combine_backward(const T* grad_TW, const T* rows_RW, const int32_t* row_TK, const float* weights_TK, const int32_t* token_R,
                      int64_t tokens, int64_t top_k, int64_t rows, int64_t width, T* d_rows_RW, float* d_weights_TK) {
  at::parallel_for(0, rows, kGrain * top_k, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      if (token_R[r] < 0) std::memset(static_cast<void*>(d_rows_RW + r * width), 0, width * sizeof(T));
    }
  });
  at::parallel_for(0, tokens, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int32_t* row_K = row_TK + t * top_k;
      check_row_range(row_K, top_k, rows, t);
      for (int64_t k = 0; k < top_k; ++k) {
        if (row_K[k] < 0) {
          d_weights_TK[t * top_k + k] = 0;
          continue;
        }
        const T *grad = grad_TW + t * width, *row = rows_RW + row_K[k] * width;
        T* out = d_rows_RW + row_K[k] * width;
        const Lanes weight(weights_TK[t * top_k + k]);
        Lanes dot(0.0f);
        for (int64_t i = 0; i < width; i += kLanes) {
          const int64_t n = std::min(kLanes, width - i);
          const Lanes g = load(grad + i, n);
          dot = at::vec::fmadd(g, load(row + i, n), dot);
          store(out + i, g * weight, n);
        }
        d_weights_TK[t * top_k + k] = sum(dot);
      }
    }
  });
}

at::Tensor unpermute(const at::Tensor& rows_in, const at::Tensor& token_in, const at::Tensor& row_in, const OptionalTensor& weights_in) {
  check_rows("rows", rows_in);
  check_index("token", token_in, 1, rows_in);
  check_index("row", row_in, 2, rows_in);
  check_weights(weights_in, row_in);
  const at::Tensor rows = rows_in.contiguous(), row = row_in.contiguous(), weights = weights_in ? weights_in->contiguous() : at::Tensor();
  at::Tensor out = at::empty({row.size(0), rows.size(1)}, rows.options());
  const auto run = [&]<typename T>(T* out_TW) {
    combine<T>(rows.const_data_ptr<T>(), row.const_data_ptr<int32_t>(), weights_in ? weights.const_data_ptr<float>() : nullptr, row.size(0),
               row.size(1), rows.size(0), rows.size(1), out_TW);
  };
  if (rows.scalar_type() == at::kFloat) run(out.mutable_data_ptr<float>());
  else run(out.mutable_data_ptr<at::BFloat16>());
  return out;
}

std::tuple<at::Tensor, at::Tensor> unpermute_backward(const at::Tensor& grad_in, const at::Tensor& rows_in, const at::Tensor& token_in,
                                                      const at::Tensor& row_in, const at::Tensor& weights_in) {
  check_backward(grad_in, rows_in, token_in, row_in, weights_in);
  const at::Tensor grad = grad_in.contiguous(), rows = rows_in.contiguous(), token = token_in.contiguous(), row = row_in.contiguous();
  const at::Tensor weights = weights_in.contiguous();
  at::Tensor d_rows = at::empty_like(rows), d_weights = at::empty_like(weights);
  const auto run = [&]<typename T>(T* d_rows_RW) {
    combine_backward<T>(grad.const_data_ptr<T>(), rows.const_data_ptr<T>(), row.const_data_ptr<int32_t>(), weights.const_data_ptr<float>(),
                        token.const_data_ptr<int32_t>(), row.size(0), row.size(1), rows.size(0), rows.size(1), d_rows_RW,
                        d_weights.mutable_data_ptr<float>());
  };
  if (rows.scalar_type() == at::kFloat) run(d_rows.mutable_data_ptr<float>());
  else run(d_rows.mutable_data_ptr<at::BFloat16>());
  return {d_rows, d_weights};
}

}  // namespace

TORCH_LIBRARY_IMPL(m2_ops, CPU, m) {
  m.impl("permute_layout", &permute_layout);
  m.impl("permute", &permute);
  m.impl("unpermute", &unpermute);
  m.impl("unpermute_backward", &unpermute_backward);
}

}  // namespace m2::permute

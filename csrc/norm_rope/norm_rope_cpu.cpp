// RMSNorm over whole rows, then partial RoPE of each head, on the CPU: tokens in parallel, each row in two passes over L1.
// Shape suffixes: T tokens, W width (heads * head_dim), R rotated pairs of a head.
#include "../common/lanes.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <cmath>
#include <vector>

#include "norm_rope.h"

namespace m2::norm_rope {
namespace {

constexpr int64_t kGrain = 16;  // tokens worth a task of their own

template <typename T>
float sum_of_squares(const T* x, int64_t width) {
  Lanes even(0.0f), odd(0.0f);
  int64_t i = 0;
  for (; i + 2 * kLanes <= width; i += 2 * kLanes) {
    const Lanes a = load(x + i), b = load(x + i + kLanes);
    even = at::vec::fmadd(a, a, even);
    odd = at::vec::fmadd(b, b, odd);
  }
  for (; i < width; i += kLanes) {
    const Lanes a = load(x + i, std::min(kLanes, width - i));
    even = at::vec::fmadd(a, a, even);
  }
  return sum(even + odd);
}

// Calls work(offset, lanes) over [begin, end) in steps of a register.
template <typename Work>
inline void sweep(int64_t begin, int64_t end, Work work) {
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) work(i, kLanes);
  if (i < end) work(i, end - i);
}

// Every product and sum is rounded where eager PyTorch rounds it: the value does not depend on which path ran.
template <typename T>
void forward_row(const Sizes& s, const T* x_W, const T* weight_W, const T* cos_R, const T* sin_R, Lanes rstd, T* out_W) {
  const auto normed = [&](int64_t at, int64_t n) { return rounded<T>(rounded<T>(load(x_W + at, n) * rstd) * load(weight_W + at, n)); };
  for (int64_t head = 0; head < s.width; head += s.head_dim) {
    sweep(0, s.half, [&](int64_t i, int64_t n) {
      const Lanes a = normed(head + i, n), b = normed(head + s.half + i, n), cos = load(cos_R + i, n), sin = load(sin_R + i, n);
      store(out_W + head + i, rounded<T>(a * cos) - rounded<T>(b * sin), n);
      store(out_W + head + s.half + i, rounded<T>(b * cos) + rounded<T>(a * sin), n);
    });
    sweep(head + 2 * s.half, head + s.head_dim, [&](int64_t i, int64_t n) { store(out_W + i, normed(i, n), n); });
  }
}

template <typename T>
void forward(const Sizes& s, int64_t full_width, double eps, const T* x_TW, const T* weight_W, const T* cos_TR, const T* sin_TR,
             const float* sum_squares_T, T* out_TW, float* rstd_T) {
  at::parallel_for(0, s.tokens, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const T* x_W = x_TW + t * s.width;
      const float squares = sum_squares_T ? sum_squares_T[t] : sum_of_squares(x_W, s.width);
      rstd_T[t] = 1.0f / std::sqrt(squares / static_cast<float>(full_width) + static_cast<float>(eps));
      forward_row(s, x_W, weight_W, cos_TR + t * s.half, sin_TR + t * s.half, Lanes(rstd_T[t]), out_TW + t * s.width);
    }
  });
}

// With n = x rstd, out = R (w n) and y = R^-1 grad: d_w = y n, d_n = y w, dx = rstd (d_n - n <d_n, n> / W).
// When the sum of squares came from outside, its gradient goes out as d_sum_squares and dx lacks the second term.
template <typename T>
class BackwardRow {
 public:
  BackwardRow(const Sizes& s, const T* weight_W) : s_(s), weight_W_(weight_W), d_normed_W_(s.width) {}

  // <d_n, n>; keeps d_n and adds to d_weight_W.
  float inner(const T* grad_W, const T* x_W, const T* cos_R, const T* sin_R, float rstd, float* d_weight_W) {
    Lanes total(0.0f);
    const auto take = [&](int64_t at, Lanes y, int64_t n) {
      const Lanes normed = load(x_W + at, n) * Lanes(rstd), d_normed = y * load(weight_W_ + at, n);
      store(d_weight_W + at, at::vec::fmadd(y, normed, load(d_weight_W + at, n)), n);
      store(d_normed_W_.data() + at, d_normed, n);
      total = at::vec::fmadd(d_normed, normed, total);
    };
    for (int64_t head = 0; head < s_.width; head += s_.head_dim) {
      sweep(0, s_.half, [&](int64_t i, int64_t n) {
        const Lanes a = load(grad_W + head + i, n), b = load(grad_W + head + s_.half + i, n);
        const Lanes cos = load(cos_R + i, n), sin = load(sin_R + i, n);
        take(head + i, a * cos + b * sin, n);
        take(head + s_.half + i, b * cos - a * sin, n);
      });
      sweep(head + 2 * s_.half, head + s_.head_dim, [&](int64_t i, int64_t n) { take(i, load(grad_W + i, n), n); });
    }
    return sum(total);
  }

  void dx(const T* x_W, float rstd, float mean, T* dx_W) const {
    const Lanes scale(rstd), back(-mean * rstd * rstd);
    sweep(0, s_.width, [&](int64_t i, int64_t n) {
      store(dx_W + i, at::vec::fmadd(load(x_W + i, n), back, load(d_normed_W_.data() + i, n) * scale), n);
    });
  }

 private:
  const Sizes& s_;
  const T* weight_W_;
  std::vector<float> d_normed_W_;
};

// d_weight is summed in parts of a fixed number of tokens, so that it does not depend on the number of threads.
template <typename T>
void backward(const Sizes& s, int64_t full_width, const T* grad_TW, const T* x_TW, const T* weight_W, const T* cos_TR, const T* sin_TR,
              const float* rstd_T, T* dx_TW, float* d_sum_squares_T, T* d_weight_W) {
  const int64_t parts = (s.tokens + kTokensPerPartial - 1) / kTokensPerPartial;
  std::vector<float> partial(parts * s.width, 0.0f);
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    BackwardRow<T> row(s, weight_W);
    for (int64_t t = begin * kTokensPerPartial; t < std::min(end * kTokensPerPartial, s.tokens); ++t) {
      const T *x_W = x_TW + t * s.width, *grad_W = grad_TW + t * s.width;
      float* d_weight = partial.data() + t / kTokensPerPartial * s.width;
      const float mean =
          row.inner(grad_W, x_W, cos_TR + t * s.half, sin_TR + t * s.half, rstd_T[t], d_weight) / static_cast<float>(full_width);
      row.dx(x_W, rstd_T[t], d_sum_squares_T ? 0.0f : mean, dx_TW + t * s.width);
      if (d_sum_squares_T) d_sum_squares_T[t] = -0.5f * mean * rstd_T[t] * rstd_T[t];
    }
  });
  at::parallel_for(0, s.width, 256, [&](int64_t begin, int64_t end) {
    sweep(begin, end, [&](int64_t i, int64_t n) {
      Lanes total(0.0f);
      for (int64_t p = 0; p < parts; ++p) total = total + load(partial.data() + p * s.width + i, n);
      store(d_weight_W + i, total, n);
    });
  });
}

template <typename T>
const T* data(const OptionalTensor& x) {
  return x ? x->const_data_ptr<T>() : nullptr;
}

at::Tensor row_sum_squares(const at::Tensor& x_in) {
  check_rows(x_in);
  const at::Tensor x = x_in.contiguous();
  at::Tensor out = at::empty({x.size(0)}, x.options().dtype(at::kFloat));
  const int64_t width = x.size(1);
  float* out_T = out.mutable_data_ptr<float>();
  const auto run = [&]<typename T>(const T* x_TW) {
    at::parallel_for(0, x.size(0), kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) out_T[t] = sum_of_squares(x_TW + t * width, width);
    });
  };
  if (x.scalar_type() == at::kFloat) run(x.const_data_ptr<float>());
  else run(x.const_data_ptr<at::BFloat16>());
  return out;
}

std::tuple<at::Tensor, at::Tensor> rms_norm_rope(const at::Tensor& x_in, const at::Tensor& weight_in, double eps, int64_t heads,
                                                 const OptionalTensor& cos_in, const OptionalTensor& sin_in,
                                                 const OptionalTensor& sum_squares_in, int64_t full_width) {
  const Sizes s = check(x_in, weight_in, heads, cos_in, sin_in);
  check_split(x_in, sum_squares_in, full_width);
  const at::Tensor x = x_in.contiguous(), weight = weight_in.contiguous();
  const OptionalTensor cos = contiguous(cos_in), sin = contiguous(sin_in), sum_squares = contiguous(sum_squares_in);
  at::Tensor out = at::empty_like(x), rstd = at::empty({s.tokens}, x.options().dtype(at::kFloat));
  const auto run = [&]<typename T>(T* out_TW) {
    forward<T>(s, full_width, eps, x.const_data_ptr<T>(), weight.const_data_ptr<T>(), data<T>(cos), data<T>(sin), data<float>(sum_squares),
               out_TW, rstd.mutable_data_ptr<float>());
  };
  if (x.scalar_type() == at::kFloat) run(out.mutable_data_ptr<float>());
  else run(out.mutable_data_ptr<at::BFloat16>());
  return {out, rstd};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> rms_norm_rope_backward(const at::Tensor& grad_in, const at::Tensor& x_in,
                                                                      const at::Tensor& weight_in, const at::Tensor& rstd_in, int64_t heads,
                                                                      const OptionalTensor& cos_in, const OptionalTensor& sin_in,
                                                                      bool split, int64_t full_width) {
  const Sizes s = check(x_in, weight_in, heads, cos_in, sin_in);
  check_tensor("grad", grad_in, x_in.scalar_type(), x_in.sizes(), x_in.device());
  check_tensor("rstd", rstd_in, at::kFloat, {s.tokens}, x_in.device());
  const at::Tensor grad = grad_in.contiguous(), x = x_in.contiguous(), weight = weight_in.contiguous(), rstd = rstd_in.contiguous();
  const OptionalTensor cos = contiguous(cos_in), sin = contiguous(sin_in);
  at::Tensor dx = at::empty_like(x), d_weight = at::empty_like(weight);
  at::Tensor d_sum_squares = at::empty({split ? s.tokens : 0}, rstd.options());
  const auto run = [&]<typename T>(T* dx_TW) {
    backward<T>(s, full_width, grad.const_data_ptr<T>(), x.const_data_ptr<T>(), weight.const_data_ptr<T>(), data<T>(cos), data<T>(sin),
                rstd.const_data_ptr<float>(), dx_TW, split ? d_sum_squares.mutable_data_ptr<float>() : nullptr,
                d_weight.mutable_data_ptr<T>());
  };
  if (x.scalar_type() == at::kFloat) run(dx.mutable_data_ptr<float>());
  else run(dx.mutable_data_ptr<at::BFloat16>());
  return {dx, d_weight, d_sum_squares};
}

}  // namespace

TORCH_LIBRARY_IMPL(m2_ops, CPU, m) {
  m.impl("row_sum_squares", &row_sum_squares);
  m.impl("rms_norm_rope", &rms_norm_rope);
  m.impl("rms_norm_rope_backward", &rms_norm_rope_backward);
}

}  // namespace m2::norm_rope

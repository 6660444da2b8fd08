// Linear + cross-entropy on the CPU. Logits live in tiles of one product and never leave the cache: the forward keeps three numbers a
// row, the backward makes each tile again, turns it into its gradient, and stores that for one chunk of the vocabulary at a time.
// Shape suffixes: N predictions (P: padded to whole tiles), H hidden, V vocabulary, C a chunk of it, S its splits.
#include "../common/brgemm.h"
#include "../common/lanes.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <vector>

#include "linear_cross_entropy.h"

namespace m2::linear_cross_entropy {
namespace {

constexpr int64_t kRows = 64;                          // predictions of a tile
constexpr int64_t kRowsPerTask = 2048;                 // that share one packing of a block of the weight
constexpr int64_t kMostSplits = 32;                    // of the vocabulary in the forward: fixed, so that sums do not depend on the threads
constexpr int64_t kPackedBytes = 768 << 10;            // a packed block of the weight stays in a core's second-level cache
constexpr int64_t kChunkElements = int64_t{16} << 20;  // logit gradients that exist at one time

int64_t blocks_of(int64_t n, int64_t block) { return (n + block - 1) / block; }

// Vocabulary entries of a tile.
int64_t tile_columns(int64_t hidden) {
  int64_t columns = 256;
  while (columns > 64 && columns * hidden * static_cast<int64_t>(sizeof(bf16)) > kPackedBytes) columns /= 2;
  return columns;
}

// The operands, rows gathered and padded to whole tiles with zeros, so that products come in few shapes.
struct Operands {
  at::Tensor rows, weight, targets;
  int64_t count, padded, hidden, vocab, columns;
  const bf16 *rows_PH, *weight_VH;
  const int64_t* targets_N;
};

Operands operands(const at::Tensor& hidden_in, const at::Tensor& weight_in, const at::Tensor& targets_in,
                  const OptionalTensor& sources_in) {
  check(hidden_in, weight_in, targets_in, sources_in);
  Operands o;
  o.count = targets_in.size(0), o.hidden = hidden_in.size(1), o.vocab = weight_in.size(0);
  o.padded = round_up(o.count, kRows), o.columns = tile_columns(o.hidden);
  o.weight = weight_in.contiguous(), o.targets = targets_in.contiguous();
  const at::Tensor hidden = hidden_in.contiguous();
  if (!sources_in && o.padded == o.count) {
    o.rows = hidden;
  } else {
    o.rows = at::empty({o.padded, o.hidden}, hidden.options());
    const at::Tensor sources = sources_in ? sources_in->contiguous() : at::Tensor();
    const int64_t *from = sources_in ? sources.const_data_ptr<int64_t>() : nullptr, tokens = hidden.size(0);
    const bf16* hidden_TH = hidden.const_data_ptr<bf16>();
    bf16* rows_PH = o.rows.mutable_data_ptr<bf16>();
    for (int64_t i = 0; from && i < o.count; ++i) {
      TORCH_CHECK_VALUE(from[i] >= 0 && from[i] < tokens, "sources[", i, "]: ", from[i], ", need 0 to ", tokens - 1);
    }
    at::parallel_for(0, o.padded, 256, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        if (i < o.count) std::memcpy(rows_PH + i * o.hidden, hidden_TH + (from ? from[i] : i) * o.hidden, o.hidden * sizeof(bf16));
        else std::memset(static_cast<void*>(rows_PH + i * o.hidden), 0, o.hidden * sizeof(bf16));
      }
    });
  }
  o.rows_PH = o.rows.const_data_ptr<bf16>(), o.weight_VH = o.weight.const_data_ptr<bf16>(),
  o.targets_N = o.targets.const_data_ptr<int64_t>();
  return o;
}

// One thread's packed block of the weight and tile of logits.
class Tiles {
 public:
  explicit Tiles(const Operands& o) : o_(o), packed_(packed_size(o.hidden, o.columns)), logits_(kRows * o.columns) {}
  ~Tiles() { brgemm_done(); }

  void take_block(int64_t first_entry) {
    const int64_t entries = std::min(o_.columns, o_.vocab - first_entry);
    pack_nk(o_.weight_VH + first_entry * o_.hidden, o_.hidden, o_.hidden, entries, packed_.data(), o_.columns);
  }

  // [kRows, columns] of the block taken last; columns beyond the vocabulary hold anything.
  const float* logits(int64_t first_row) {
    brgemm(kRows, o_.columns, o_.hidden, o_.rows_PH + first_row * o_.hidden, o_.hidden, packed_.data(), o_.columns, logits_.data(),
           o_.columns, false);
    return logits_.data();
  }

 private:
  const Operands& o_;
  std::vector<bf16> packed_;
  std::vector<float> logits_;
};

// Softmax of a row seen piece by piece: the maximum, and relative to it the sum of exponentials and of exponentials times logits.
struct Running {
  float max = -std::numeric_limits<float>::infinity(), sum = 0, weighted = 0;

  void rescale(float to) {
    const float factor = max == to ? 1.0f : std::exp(max - to);  // equal infinities are no NaN
    sum *= factor, weighted *= factor, max = to;
  }

  template <bool with_mean>
  void add(const float* logits, int64_t n) {
    Lanes top = load(logits, std::min(n, kLanes));
    if (n < kLanes) top = Lanes::set(Lanes(-std::numeric_limits<float>::infinity()), top, n);
    int64_t i = kLanes;
    for (; i + kLanes <= n; i += kLanes) top = at::vec::maximum(top, load(logits + i));
    float best = m2::max(top);
    for (; i < n; ++i) best = std::max(best, logits[i]);
    if (best > max) rescale(best);
    Lanes total(0.0f), mean(0.0f);
    for (i = 0; i + kLanes <= n; i += kLanes) {
      const Lanes z = load(logits + i), e = (z - Lanes(max)).exp_u20();
      total = total + e;
      if constexpr (with_mean) mean = at::vec::fmadd(e, z, mean);
    }
    sum += m2::sum(total), weighted += m2::sum(mean);
    for (; i < n; ++i) {
      const float e = std::exp(logits[i] - max);
      sum += e, weighted += e * logits[i];
    }
  }

  void add(const Running& other) {
    Running o = other;
    const float to = std::max(max, o.max);
    rescale(to), o.rescale(to);
    sum += o.sum, weighted += o.weighted;
  }
};

template <bool with_mean>
void forward(const Operands& o, int64_t vocab_start, float* target_N, float* lse_N, float* mean_N) {
  const int64_t blocks = blocks_of(o.vocab, o.columns), splits = std::min(blocks, kMostSplits), ranges = blocks_of(o.padded, kRowsPerTask);
  std::vector<Running> partial(splits * o.padded);
  at::parallel_for(0, splits * ranges, 1, [&](int64_t begin, int64_t end) {
    Tiles tiles(o);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t split = task % splits, first = task / splits * kRowsPerTask, last = std::min(first + kRowsPerTask, o.padded);
      for (int64_t block = split * blocks / splits; block < (split + 1) * blocks / splits; ++block) {
        const int64_t entry = block * o.columns, n = std::min(o.columns, o.vocab - entry);
        tiles.take_block(entry);
        for (int64_t row = first; row < last; row += kRows) {
          const float* logits = tiles.logits(row);
          for (int64_t i = row; i < std::min(row + kRows, o.count); ++i, logits += o.columns) {
            partial[split * o.padded + i].template add<with_mean>(logits, n);
            const int64_t place = o.targets_N[i] - vocab_start - entry;
            if (place >= 0 && place < n) target_N[i] = logits[place];
          }
        }
      }
    }
  });
  for (int64_t i = 0; i < o.count; ++i) {
    Running all = partial[i];
    for (int64_t split = 1; split < splits; ++split) all.add(partial[split * o.padded + i]);
    lse_N[i] = all.max + std::log(all.sum);
    if constexpr (with_mean) mean_N[i] = all.weighted / all.sum;
  }
}

// With p = exp(z - lse): d target/dz = [z is the target], d lse/dz = p, d mean/dz = p (1 + z - mean).
struct RowGradients {
  float target, lse, mean;  // what flows in
  float log_sum, average;   // lse and mean of the forward

  void apply(const float* logits, int64_t n, int64_t place, bf16* out) const {
    for (int64_t i = 0; i < n; i += kLanes) {
      const int64_t lanes = std::min(kLanes, n - i);
      const Lanes z = load(logits + i, lanes), p = (z - Lanes(log_sum)).exp_u20();
      store(out + i, p * at::vec::fmadd(Lanes(mean), z - Lanes(average - 1.0f), Lanes(lse)), lanes);
    }
    if (place < 0 || place >= n) return;
    const float z = logits[place];
    out[place] = target + std::exp(z - log_sum) * (lse + mean * (1.0f + z - average));
  }
};

// d_logits_PC of the vocabulary entries from first_entry on.
void logit_gradients(const Operands& o, int64_t vocab_start, int64_t first_entry, int64_t entries,
                     const std::vector<RowGradients>& gradients_N, bf16* d_logits_PC) {
  const int64_t blocks = blocks_of(entries, o.columns), ranges = blocks_of(o.padded, kRowsPerTask);
  at::parallel_for(0, blocks * ranges, 1, [&](int64_t begin, int64_t end) {
    Tiles tiles(o);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t column = task % blocks * o.columns, first = task / blocks * kRowsPerTask,
                    last = std::min(first + kRowsPerTask, o.padded);
      const int64_t n = std::min(o.columns, entries - column);
      tiles.take_block(first_entry + column);
      for (int64_t row = first; row < last; row += kRows) {
        const float* logits = tiles.logits(row);
        for (int64_t i = row; i < row + kRows; ++i, logits += o.columns) {
          bf16* out = d_logits_PC + i * entries + column;
          if (i < o.count) gradients_N[i].apply(logits, n, o.targets_N[i] - vocab_start - first_entry - column, out);
          else std::memset(static_cast<void*>(out), 0, n * sizeof(bf16));
        }
      }
    }
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_cross_entropy(const at::Tensor& hidden, const at::Tensor& weight,
                                                                    const at::Tensor& targets, const OptionalTensor& sources,
                                                                    int64_t vocab_start, bool with_mean) {
  const Operands o = operands(hidden, weight, targets, sources);
  const auto fp32 = hidden.options().dtype(at::kFloat);
  at::Tensor target = at::zeros({o.count}, fp32), lse = at::empty({o.count}, fp32), mean = at::empty({with_mean ? o.count : 0}, fp32);
  if (o.count == 0) return {target, lse, mean};
  (with_mean ? forward<true> : forward<false>)(o, vocab_start, target.mutable_data_ptr<float>(), lse.mutable_data_ptr<float>(),
                                               mean.mutable_data_ptr<float>());
  return {target, lse, mean};
}

std::tuple<at::Tensor, at::Tensor> linear_cross_entropy_backward(const at::Tensor& grad_target, const at::Tensor& grad_lse,
                                                                 const at::Tensor& grad_mean, const at::Tensor& hidden,
                                                                 const at::Tensor& weight, const at::Tensor& targets,
                                                                 const OptionalTensor& sources, const at::Tensor& lse_in,
                                                                 const at::Tensor& mean_in, int64_t vocab_start) {
  const Operands o = operands(hidden, weight, targets, sources);
  const bool with_mean = mean_in.numel() > 0;
  check_gradients(grad_target, grad_lse, grad_mean, lse_in, mean_in, o.count, hidden.device());
  if (o.count == 0) return {at::zeros_like(hidden), at::zeros_like(weight)};
  std::vector<RowGradients> gradients_N(o.count);
  {
    const at::Tensor t = grad_target.contiguous(), l = grad_lse.contiguous(), m = grad_mean.contiguous(), lse = lse_in.contiguous(),
                     mean = mean_in.contiguous();
    for (int64_t i = 0; i < o.count; ++i) {
      gradients_N[i] = {t.const_data_ptr<float>()[i], l.const_data_ptr<float>()[i], with_mean ? m.const_data_ptr<float>()[i] : 0.0f,
                        lse.const_data_ptr<float>()[i], with_mean ? mean.const_data_ptr<float>()[i] : 0.0f};
    }
  }
  at::Tensor d_weight = at::empty_like(o.weight);
  const int64_t chunk = std::max(o.columns, kChunkElements / o.padded / o.columns * o.columns);
  at::Tensor d_rows;
  at::Tensor buffer = at::empty({o.padded * std::min(chunk, o.vocab)}, weight.options());
  for (int64_t entry = 0; entry < o.vocab; entry += chunk) {
    const int64_t entries = std::min(chunk, o.vocab - entry);
    const at::Tensor d_logits = buffer.narrow(0, 0, o.padded * entries).view({o.padded, entries});
    logit_gradients(o, vocab_start, entry, entries, gradients_N, d_logits.mutable_data_ptr<bf16>());
    at::Tensor d_weight_chunk = d_weight.narrow(0, entry, entries);
    at::mm_out(d_weight_chunk, d_logits.t(), o.rows);
    const at::Tensor part = at::mm(d_logits, o.weight.narrow(0, entry, entries));
    if (entries == o.vocab) d_rows = part;
    else if (entry == 0) d_rows = part.to(at::kFloat);
    else d_rows.add_(part);
  }
  d_rows = d_rows.narrow(0, 0, o.count);
  if (!sources) return {d_rows.to(at::kBFloat16), d_weight};
  at::Tensor d_hidden = at::zeros(hidden.sizes(), hidden.options().dtype(at::kFloat));
  return {d_hidden.index_add_(0, *sources, d_rows.to(at::kFloat)).to(at::kBFloat16), d_weight};
}

}  // namespace

TORCH_LIBRARY_IMPL(m2_ops, CPU, m) {
  m.impl("linear_cross_entropy", &linear_cross_entropy);
  m.impl("linear_cross_entropy_backward", &linear_cross_entropy_backward);
}

}  // namespace m2::linear_cross_entropy

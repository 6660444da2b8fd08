// Sigmoid router on the CPU: tokens in parallel, scores by at::vec, top-k by a two-level maximum.
// Shape suffixes: T tokens, E experts, K experts per token.
#include "../common/vec.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <bit>
#include <cstring>
#include <limits>
#include <mutex>
#include <vector>

#include "router.h"

namespace m2::router {
namespace {

using Vec = at::vec::Vectorized<float>;

constexpr int64_t kGrain = 64;  // tokens worth a task of their own
constexpr int kTogether = 4;    // tokens whose choices are interleaved: one choice waits for the last, those of other tokens do not
constexpr int kBlock = 16;      // keys under one maximum
constexpr int32_t kTaken = std::numeric_limits<int32_t>::min();  // below the key of every float

Vec sigmoid(Vec x) { return (Vec(1.0f) + x.neg().exp()).reciprocal(); }  // as ATen's sigmoid, so choices agree with eager PyTorch

// Integers in the order of the floats, NaN of either sign on top as in torch.topk. No NaN compares below, so a maximum always exists.
int32_t sort_key(float x) {
  const int32_t bits = std::bit_cast<int32_t>(x);
  return x != x ? std::numeric_limits<int32_t>::max() : bits ^ ((bits >> 31) & std::numeric_limits<int32_t>::max());
}

int32_t block_max(const int32_t* keys) {
#ifdef CPU_CAPABILITY_AVX512
  return _mm512_reduce_max_epi32(_mm512_load_si512(keys));
#else
  int32_t best = keys[0];
  for (int i = 1; i < kBlock; ++i) best = std::max(best, keys[i]);
  return best;
#endif
}

// First place of a key that the block holds.
int block_find(const int32_t* keys, int32_t key) {
#ifdef CPU_CAPABILITY_AVX512
  return std::countr_zero(static_cast<uint32_t>(_mm512_cmpeq_epi32_mask(_mm512_load_si512(keys), _mm512_set1_epi32(key))));
#else
  int i = 0;
  while (keys[i] != key) ++i;
  return i;
#endif
}

// Written as a whole vector: a narrow store would stall the wide load of the same block that follows.
void block_set(int32_t* keys, int place, int32_t key) {
#ifdef CPU_CAPABILITY_AVX512
  _mm512_store_si512(keys, _mm512_mask_set1_epi32(_mm512_load_si512(keys), static_cast<__mmask16>(1u << place), key));
#else
  keys[place] = key;
#endif
}

constexpr int64_t padded(int64_t n) { return (n + kBlock - 1) / kBlock * kBlock; }

// One token's scores and keys, and two levels of maxima over the keys: 16 keys, 16 blocks.
class Chooser {
 public:
  explicit Chooser(int64_t num_experts) : num_experts_(num_experts), num_blocks_(padded(num_experts) / kBlock) {
    std::fill_n(keys_, padded(num_experts), kTaken);
    std::fill_n(block_max_, padded(num_blocks_), kTaken);
  }

  void load(const float* logits_E, const float* bias_E) {
    for (int64_t e = 0; e < num_experts_; e += Vec::size()) {
      const int64_t n = std::min<int64_t>(Vec::size(), num_experts_ - e);
      const Vec score = sigmoid(Vec::loadu(logits_E + e, n));
      score.store(scores_ + e, n);
      (score + Vec::loadu(bias_E + e, n)).store(choice_ + e, n);
    }
    for (int64_t e = 0; e < num_experts_; ++e) keys_[e] = sort_key(choice_[e]);
    for (int64_t b = 0; b < num_blocks_; ++b) block_max_[b] = block_max(keys_ + b * kBlock);
  }

  // The best expert not taken yet; of equal ones the lowest, since the first block and the first place in it win.
  int32_t take() {
    int32_t best = block_max(block_max_);
    for (int64_t b = kBlock; b < num_blocks_; b += kBlock) best = std::max(best, block_max(block_max_ + b));
    int64_t group = 0;
    while (block_max(block_max_ + group) != best) group += kBlock;
    const int block = block_find(block_max_ + group, best);
    const int64_t start = (group + block) * kBlock;
    const int place = block_find(keys_ + start, best);
    block_set(keys_ + start, place, kTaken);
    block_set(block_max_ + group, block, block_max(keys_ + start));
    return static_cast<int32_t>(start + place);
  }

  float score(int32_t expert) const { return scores_[expert]; }

 private:
  int64_t num_experts_, num_blocks_;
  alignas(64) float scores_[kMaxExperts];
  alignas(64) float choice_[kMaxExperts];
  alignas(64) int32_t keys_[kMaxExperts];
  alignas(64) int32_t block_max_[kMaxExperts / kBlock];
};

// Counts of one task, added to the shared tensor when the task ends; integers, so that the number of threads does not show.
class LocalCounts {
 public:
  LocalCounts(at::Tensor& counts_E, const std::optional<at::Tensor>& multiplicity_T)
      : local_(counts_E.numel()), multiplicity_(multiplicity_T ? multiplicity_T->const_data_ptr<int32_t>() : nullptr) {}
  void add(int64_t token, int32_t expert) { local_[expert] += multiplicity_ ? multiplicity_[token] : 1; }
  void merge_into(at::Tensor& counts_E, std::mutex& mutex) const {
    const std::lock_guard lock(mutex);
    int64_t* counts = counts_E.mutable_data_ptr<int64_t>();
    for (size_t e = 0; e < local_.size(); ++e) counts[e] += local_[e];
  }

 private:
  std::vector<int64_t> local_;
  const int32_t* multiplicity_;
};

void check_route(const int32_t* experts_K, int64_t top_k, int64_t num_experts, int64_t token) {
  for (int64_t j = 0; j < top_k; ++j) {
    TORCH_CHECK_VALUE(experts_K[j] >= 0 && experts_K[j] < num_experts, "experts[", token, ", ", j, "]: ", experts_K[j], ", need 0 to ",
                      num_experts - 1);
    for (int64_t i = 0; i < j; ++i)
      TORCH_CHECK_VALUE(experts_K[i] != experts_K[j], "experts[", token, "]: names expert ", experts_K[j], " twice");
  }
}

void normalise(float* scores_K, int64_t top_k) {
  float sum = 0;
  for (int64_t j = 0; j < top_k; ++j) sum += scores_K[j];
  for (int64_t j = 0; j < top_k; ++j) scores_K[j] /= sum;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> router_topk(const at::Tensor& logits_in, const at::Tensor& bias_in, int64_t top_k,
                                                           const std::optional<at::Tensor>& multiplicity_in) {
  check_logits(logits_in);
  const int64_t num_tokens = logits_in.size(0), num_experts = logits_in.size(1);
  check_tensor("bias", bias_in, at::kFloat, {num_experts}, logits_in.device());
  check_top_k(top_k, num_experts);
  check_multiplicity(multiplicity_in, logits_in);
  const at::Tensor logits = logits_in.contiguous(), bias = bias_in.contiguous();
  const auto multiplicity = contiguous(multiplicity_in);
  at::Tensor weights = at::empty({num_tokens, top_k}, logits.options());
  at::Tensor experts = at::empty({num_tokens, top_k}, logits.options().dtype(at::kInt));
  at::Tensor counts = at::zeros({num_experts}, logits.options().dtype(at::kLong));
  const float* logits_TE = logits.const_data_ptr<float>();
  const float* bias_E = bias.const_data_ptr<float>();
  float* weights_TK = weights.mutable_data_ptr<float>();
  int32_t* experts_TK = experts.mutable_data_ptr<int32_t>();
  std::mutex mutex;
  at::parallel_for(0, num_tokens, kGrain, [&](int64_t begin, int64_t end) {
    std::vector<Chooser> choosers(kTogether, Chooser(num_experts));
    LocalCounts local(counts, multiplicity);
    for (int64_t first = begin; first < end; first += kTogether) {
      const int64_t last = std::min(first + kTogether, end);
      for (int64_t t = first; t < last; ++t) choosers[t - first].load(logits_TE + t * num_experts, bias_E);
      for (int64_t j = 0; j < top_k; ++j) {
        for (int64_t t = first; t < last; ++t) {
          const int32_t expert = choosers[t - first].take();
          experts_TK[t * top_k + j] = expert;
          weights_TK[t * top_k + j] = choosers[t - first].score(expert);
          local.add(t, expert);
        }
      }
      for (int64_t t = first; t < last; ++t) normalise(weights_TK + t * top_k, top_k);
    }
    local.merge_into(counts, mutex);
  });
  return {weights, experts, counts};
}

// sign * logit of the chosen experts through the sigmoid, into a buffer of kMaxTopK.
void chosen_sigmoid(const float* logits_E, const int32_t* experts_K, int64_t top_k, float sign, float* out_K) {
  for (int64_t j = 0; j < top_k; ++j) out_K[j] = sign * logits_E[experts_K[j]];
  for (int64_t j = 0; j < top_k; j += Vec::size()) {
    const int64_t n = std::min<int64_t>(Vec::size(), top_k - j);
    sigmoid(Vec::loadu(out_K + j, n)).store(out_K + j, n);
  }
}

std::tuple<at::Tensor, at::Tensor> router_replay(const at::Tensor& logits_in, const at::Tensor& experts_in,
                                                 const std::optional<at::Tensor>& multiplicity_in) {
  check_logits(logits_in);
  check_routes(experts_in, logits_in);
  check_multiplicity(multiplicity_in, logits_in);
  const int64_t num_tokens = logits_in.size(0), num_experts = logits_in.size(1), top_k = experts_in.size(1);
  const at::Tensor logits = logits_in.contiguous(), experts = experts_in.contiguous();
  const auto multiplicity = contiguous(multiplicity_in);
  at::Tensor weights = at::empty({num_tokens, top_k}, logits.options());
  at::Tensor counts = at::zeros({num_experts}, logits.options().dtype(at::kLong));
  const float* logits_TE = logits.const_data_ptr<float>();
  const int32_t* experts_TK = experts.const_data_ptr<int32_t>();
  float* weights_TK = weights.mutable_data_ptr<float>();
  std::mutex mutex;
  at::parallel_for(0, num_tokens, kGrain, [&](int64_t begin, int64_t end) {
    LocalCounts local(counts, multiplicity);
    for (int64_t t = begin; t < end; ++t) {
      const int32_t* experts_K = experts_TK + t * top_k;
      check_route(experts_K, top_k, num_experts, t);
      chosen_sigmoid(logits_TE + t * num_experts, experts_K, top_k, 1.0f, weights_TK + t * top_k);
      normalise(weights_TK + t * top_k, top_k);
      for (int64_t j = 0; j < top_k; ++j) local.add(t, experts_K[j]);
    }
    local.merge_into(counts, mutex);
  });
  return {weights, counts};
}

// w_j = s_j / sum(s), so dL/dlogit_j = w_j (1 - s_j) (g_j - sum_i g_i w_i); 1 - s is sigmoid(-logit), which keeps its digits near s = 1.
at::Tensor router_backward(const at::Tensor& grad_in, const at::Tensor& logits_in, const at::Tensor& weights_in,
                           const at::Tensor& experts_in) {
  check_backward(grad_in, logits_in, weights_in, experts_in);
  const int64_t num_tokens = logits_in.size(0), num_experts = logits_in.size(1), top_k = experts_in.size(1);
  const at::Tensor grad = grad_in.contiguous(), logits = logits_in.contiguous();
  const at::Tensor weights = weights_in.contiguous(), experts = experts_in.contiguous();
  at::Tensor grad_logits = at::empty_like(logits);
  const float* grad_TK = grad.const_data_ptr<float>();
  const float* logits_TE = logits.const_data_ptr<float>();
  const float* weights_TK = weights.const_data_ptr<float>();
  const int32_t* experts_TK = experts.const_data_ptr<int32_t>();
  float* out_TE = grad_logits.mutable_data_ptr<float>();
  at::parallel_for(0, num_tokens, kGrain, [&](int64_t begin, int64_t end) {
    alignas(64) float rest_K[kMaxTopK];  // 1 - score
    for (int64_t t = begin; t < end; ++t) {
      const int32_t* experts_K = experts_TK + t * top_k;
      const float *grad_K = grad_TK + t * top_k, *weights_K = weights_TK + t * top_k;
      float* out_E = out_TE + t * num_experts;
      check_route(experts_K, top_k, num_experts, t);
      chosen_sigmoid(logits_TE + t * num_experts, experts_K, top_k, -1.0f, rest_K);
      float mean = 0;
      for (int64_t j = 0; j < top_k; ++j) mean += grad_K[j] * weights_K[j];
      std::memset(out_E, 0, num_experts * sizeof(float));
      for (int64_t j = 0; j < top_k; ++j) out_E[experts_K[j]] = weights_K[j] * rest_K[j] * (grad_K[j] - mean);
    }
  });
  return grad_logits;
}

void router_bias_update(at::Tensor& bias, const at::Tensor& counts_in, double rate) {
  check_bias_update(bias, counts_in);
  const at::Tensor counts = counts_in.contiguous();
  const int64_t num_experts = bias.numel();
  const int64_t* counts_E = counts.const_data_ptr<int64_t>();
  float* bias_E = bias.mutable_data_ptr<float>();
  int64_t total = 0;
  for (int64_t e = 0; e < num_experts; ++e) total += counts_E[e];
  for (int64_t e = 0; e < num_experts; ++e) {
    const int64_t below_mean = total - counts_E[e] * num_experts;
    bias_E[e] += static_cast<float>(rate) * static_cast<float>((below_mean > 0) - (below_mean < 0));
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(m2_ops, CPU, m) {
  m.impl("router_topk", &router_topk);
  m.impl("router_replay", &router_replay);
  m.impl("router_backward", &router_backward);
  m.impl("router_bias_update", &router_bias_update);
}

}  // namespace m2::router

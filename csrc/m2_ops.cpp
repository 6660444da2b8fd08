// Every op of megatron_m2 on one page: schemas here, kernels in csrc/<op>/, Python side in megatron_m2/ops/<op>.py.
// Shape suffixes: T tokens, E experts, K experts per token.
#include <torch/library.h>

#include "forest/python.h"

TORCH_LIBRARY(m2_ops, m) {
  // ---- router: sigmoid scores with a choosing bias (DeepSeek-V3 eq. 13-16; MiniMax-M2) -------------------------------------------
  // E <= 1024, K <= 32, all floats fp32. A NaN logit is chosen before anything else and makes its token's weights NaN.

  // scores = sigmoid(logits_TE); the K greatest scores + bias_E per token, descending, equal ones by the lower expert.
  // -> weights fp32 [T, K]: chosen scores over their sum, without the bias; experts int32 [T, K];
  //    counts int64 [E]: choices of each expert, each times its token's multiplicity (int32 [T]; none: 1).
  m.def("router_topk(Tensor logits, Tensor bias, int top_k, Tensor? multiplicity=None) -> (Tensor weights, Tensor experts, Tensor counts)");
  // The same with the routes given (int32 [T, K], distinct within a token). A bad route is a ValueError on CPU, a device assert on CUDA.
  m.def("router_replay(Tensor logits, Tensor experts, Tensor? multiplicity=None) -> (Tensor weights, Tensor counts)");
  // Gradient of the weights of either by the logits: fp32 [T, E], zero where not chosen.
  m.def("router_backward(Tensor grad_weights, Tensor logits, Tensor weights, Tensor experts) -> Tensor");
  // Aux-loss-free balance (arXiv:2408.15664): bias_E += rate * sign(mean(counts_E) - counts_E), the comparison in exact integers.
  m.def("router_bias_update(Tensor(a!) bias, Tensor counts, float rate) -> ()");

  // ---- tree_attention: causal attention on a token forest --------------------------------------------------------------------------
  // Token i sees token j when j <= i < subtree_end[j] (int32 [T]). q [Q, H, D] are the queries of tokens query_start to
  // query_start + Q - 1; k, v [T, G, D], H a multiple of G; bf16, D a multiple of 16 up to 256; scale D^-1/2. Deterministic.

  // -> out like q; lse fp32 [Q, H]: natural logarithm of each row's sum of exponentials.
  m.def("tree_attention(Tensor q, Tensor k, Tensor v, Tensor subtree_end, int query_start) -> (Tensor out, Tensor lse)");
  m.def(
      "tree_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "Tensor subtree_end, int query_start) -> (Tensor dq, Tensor dk, Tensor dv)");

  // ---- norm_rope: RMSNorm of whole rows, then partial RoPE of each head (M2's QK norm; without cos and sin plain RMSNorm) -------
  // bf16 or fp32 x [T, W], W = heads * D; cos, sin [T, R] in x's dtype. Rounds as eager PyTorch does: cast, times weight, rotate.

  // Sum of squares of each row, fp32 [T]: the half that tensor-parallel ranks add up.
  m.def("row_sum_squares(Tensor x) -> Tensor");
  // x rstd weight, rotated; rstd = 1 / sqrt(sum_squares / full_width + eps). Without sum_squares that of x itself is taken.
  // -> out like x; rstd fp32 [T]
  m.def(
      "rms_norm_rope(Tensor x, Tensor weight, float eps, int heads, Tensor? cos, Tensor? sin, Tensor? sum_squares, int full_width) "
      "-> (Tensor out, Tensor rstd)");
  // -> dx, d_weight; d_sum_squares fp32 [T] when split (dx then lacks its part), else [0].
  m.def(
      "rms_norm_rope_backward(Tensor grad, Tensor x, Tensor weight, Tensor rstd, int heads, Tensor? cos, Tensor? sin, bool split, "
      "int full_width) -> (Tensor dx, Tensor d_weight, Tensor d_sum_squares)");

  // ---- linear_cross_entropy: softmax of hidden @ weight^T at chosen targets, without the logits ever existing ---------------------
  // hidden bf16 [T, H], H even; weight bf16 [V, H]: the vocabulary entries from vocab_start on (one rank's); targets int64 [N];
  // sources int64 [N]: the row of hidden that predicts each (none: N = T). Logits are fp32 sums of exact products.

  // -> target fp32 [N]: logit of the target, 0 when it is another rank's; lse fp32 [N]; mean fp32 [N]: sum of p * logit, with_mean only.
  m.def(
      "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor targets, Tensor? sources, int vocab_start, bool with_mean) "
      "-> (Tensor target, Tensor lse, Tensor mean)");
  // From the gradients of those three (grad_mean [0] without mean).
  m.def(
      "linear_cross_entropy_backward(Tensor grad_target, Tensor grad_lse, Tensor grad_mean, Tensor hidden, Tensor weight, "
      "Tensor targets, Tensor? sources, Tensor lse, Tensor mean, int vocab_start) -> (Tensor d_hidden, Tensor d_weight)");

  // ---- permute: tokens to rows grouped by expert, and back -------------------------------------------------------------------------
  // Rows of an expert keep the order of tokens and slots, so that sums repeat; each group is padded to a multiple of `block` rows.

  // experts int32 [T, K], -1: none -> ends int32 [E] of each expert's rows, padding included; token int32 [R] of each row, -1: padding,
  // where R is as many rows as any routing of `routed` slots (none: all) can need; row int32 [T, K] of each token's slot, -1 where it has
  // no expert.
  m.def("permute_layout(Tensor experts, int num_experts, int block, int? routed=None) -> (Tensor ends, Tensor token, Tensor row)");
  // bf16 or fp32 x [T, W] -> rows [R, W], those of padding 0.
  m.def("permute(Tensor x, Tensor token, Tensor row) -> Tensor");
  // rows [R, W] -> [T, W]: sum over the slots, each times its weight (fp32 [T, K]; none: 1), in fp32.
  m.def("unpermute(Tensor rows, Tensor token, Tensor row, Tensor? weights) -> Tensor");
  m.def("unpermute_backward(Tensor grad, Tensor rows, Tensor token, Tensor row, Tensor weights) -> (Tensor d_rows, Tensor d_weights)");

  // ---- grouped_gemm: one product per group of rows, bf16, fp32 sums ----------------------------------------------------------------
  // Group e has rows ends[e - 1] to ends[e] (int32 [E]); it may be empty. Rows beyond the last group give 0. Widths even.

  // x [R, A] -> [R, B] by w [E, B, A] transposed, or by w [E, A, B].
  m.def("grouped_mm(Tensor x, Tensor w, Tensor ends, bool transposed) -> Tensor");
  // dy [R, B], x [R, A] -> [E, B, A]: dy^T x of each group.
  m.def("grouped_wgrad(Tensor dy, Tensor x, Tensor ends) -> Tensor");
  // x [R, H], gate_up [E, 2 F, H] (gate first) -> act [R, F] = silu(gate) * up; hidden [R, 2 F]: gate | up.
  m.def("grouped_swiglu(Tensor x, Tensor gate_up, Tensor ends) -> (Tensor act, Tensor hidden)");
  // dy [R, H], down [E, H, F] -> gradient of hidden [R, 2 F], through act = silu(gate) * up and y = act down^T.
  m.def("grouped_swiglu_backward(Tensor dy, Tensor down, Tensor hidden, Tensor ends) -> Tensor");

  // ---- blockwise FP8: e4m3 codes and fp32 factors, one per 128 values (weights: per 128 x 128) --------------------------------------
  // value = code * factor; factor = largest magnitude / 448, 1 for zeros; codes round to nearest even. x bf16 [R, W].

  // -> codes [R, W], scales [R, ceil(W / 128)]: for the products of the forward and of the gradient by the input.
  m.def("quantize_rows(Tensor x) -> (Tensor codes, Tensor scales)");
  // -> codes [R, W], scales [ceil(R / 128), W]: for the gradient by the weight, which sums over rows.
  m.def("quantize_columns(Tensor x) -> (Tensor codes, Tensor scales)");
  // w [E, B, A] in blocks of 128 x 128 -> codes, scales [E, ceil(B / 128), ceil(A / 128)].
  m.def("quantize_weights(Tensor w) -> (Tensor codes, Tensor scales)");
  // quantize_rows of permute: x [T, W] -> codes [R, W], scales [R, ceil(W / 128)].
  m.def("permute_quantize(Tensor x, Tensor token) -> (Tensor codes, Tensor scales)");
  // quantize_rows of silu(gate) * up, hidden [R, 2 F] = gate | up.
  m.def("swiglu_quantize(Tensor hidden) -> (Tensor codes, Tensor scales)");
  // quantize_rows and quantize_columns of one reading of x.
  m.def("quantize_rows_columns(Tensor x) -> (Tensor codes, Tensor scales, Tensor column_codes, Tensor column_scales)");
  // quantize_columns of what the codes by rows stand for, rounded to bf16.
  m.def("requantize_columns(Tensor codes, Tensor scales) -> (Tensor column_codes, Tensor column_scales)");
  // quantize_rows_columns of the gradient of hidden [R, 2 F] = gate | up from d_act [R, F], that of silu(gate) * up, rounded to bf16.
  m.def(
      "swiglu_backward_quantize(Tensor d_act, Tensor hidden) -> (Tensor codes, Tensor scales, Tensor column_codes, "
      "Tensor column_scales)");
  // grouped_mm of codes: fp32 sums over 128 terms, times both factors, added in fp32. w_scale [E, ceil / 128, ceil / 128] as w lies. ->
  // bf16
  m.def("grouped_mm_fp8(Tensor x, Tensor x_scale, Tensor w, Tensor w_scale, Tensor ends, bool transposed) -> Tensor");
  // grouped_mm_fp8 by w [E, 2 F, A] transposed -> hidden bf16 [R, 2 F] = gate | up, and swiglu_quantize of it: codes [R, F], scales.
  m.def(
      "grouped_swiglu_fp8(Tensor x, Tensor x_scale, Tensor w, Tensor w_scale, Tensor ends) -> (Tensor codes, Tensor scales, "
      "Tensor hidden)");
  // grouped_wgrad of codes by columns; groups end on multiples of 128 rows. -> bf16
  m.def("grouped_wgrad_fp8(Tensor dy, Tensor dy_scale, Tensor x, Tensor x_scale, Tensor ends) -> Tensor");

  // ---- expert_parallel: rows of tokens to the ranks of their experts, and back ------------------------------------------------------
  // Rank r of R <= 256 has experts [r E / R, (r + 1) E / R). A token has one row at each rank that has one of its experts.

  // experts int32 [T, K], -1: none -> counts int32 [R, 2]: rows for each rank, and choices among them; row int32 [T, R]: each token's row
  // there, -1: none. A rank's rows keep the order of tokens.
  m.def("ep_plan(Tensor experts, int num_experts, int ranks) -> (Tensor counts, Tensor row)");
  // Row row[t, r] of out[r] (bytes [n, B]; without rows it is left out) = row t of each part from byte at[i] on, then from the last `at`
  // on the experts, less r * per_rank, -1 for those of other ranks.
  m.def("ep_pack(Tensor[] parts, Tensor? experts, Tensor row, int per_rank, int[] at, Tensor(a!)[] out) -> ()");
  // rows [n, W] of each rank, bf16, fp32 or fp64 -> [T, W]: each token's rows added up in fp32 (fp64), rank by rank.
  m.def("ep_combine(Tensor[] rows, Tensor row) -> Tensor");
  // bf16 of quantize_rows' codes and scales; rows may lie apart.
  m.def("ep_dequantize(Tensor codes, Tensor scales) -> Tensor");

  // ---- peer memory: bytes of one GPU that the other ranks of its node write to; CUDA only --------------------------------------------
  // A flag is one int64 of such memory. A signal follows all that its stream did before; what its stream does after a wait follows it.

  // -> uint8 [bytes], zeros
  m.def("peer_alloc(int bytes, Device device) -> Tensor");
  // -> uint8 [64] on the CPU, for peer_open in another process; that fails where this GPU cannot reach the buffer's.
  m.def("peer_handle(Tensor buffer) -> Tensor");
  m.def("peer_open(Tensor handle, int bytes, Device device) -> Tensor");
  // Sets every flag ([1] each).
  m.def("peer_signal(Tensor(a!)[] flags, int value) -> ()");
  // Until every one of flags [R] is at least value; a device assert after some 100 s.
  m.def("peer_wait(Tensor flags, int value) -> ()");
}

// Importing megatron_m2._C runs the registrations of this library; the module itself has what needs no tensors.
PYBIND11_MODULE(_C, module) {
#ifdef M2_WITH_CUDA
  module.attr("with_cuda") = true;
#else
  module.attr("with_cuda") = false;
#endif
  m2::forest::bind(module);
}

"""Bytes that one forest's forward keeps for its backward, and that a layer's backward takes for a moment, on one rank.

Each term names what is kept and by whom; the tests compare the sums with what the real model keeps. bf16 throughout, the router fp32.
"""

from __future__ import annotations

from typing import NamedTuple

from megatron_m2.planning.job import Job, Layout
from megatron_m2.planning.tokens import Shares

_BF16, _FP32, _INT32, _INT64 = 2, 4, 4, 8
_CPU_CHUNK, _CUDA_CHUNK = 1 << 24, 1 << 25  # logits that exist at a time (csrc/linear_cross_entropy)
_SLAB = 512  # rows by which the CPU's kernel transposes a group's rows for the gradient by a weight


class Widths(NamedTuple):
    """Of one rank: q and kv of its heads, heads, its part of the vocabulary, its experts."""

    hidden: int
    q: int
    kv: int
    heads: int
    vocabulary: int
    experts: int

    @classmethod
    def of(cls, job: Job, layout: Layout) -> Widths:
        m, p = job.model, layout.parallel
        kv_parts = min(p.tp, m.num_key_value_heads)
        return cls(m.hidden_size, m.q_size // p.tp, m.kv_size // kv_parts, m.num_attention_heads // p.tp, -(-m.vocab_size // p.tp),
                   m.num_experts // p.ep)


def layer_kept(job: Job, layout: Layout, s: Shares) -> dict[str, int]:
    """Of one decoder layer, by part."""
    w, m = Widths.of(job, layout), job.model
    norms = 2 * s.rank * (w.hidden * _BF16 + _FP32)  # input of each and its 1 / rms
    attention = s.cp * w.hidden * _BF16  # the normed (and gathered) input of the projections
    attention += s.cp * (2 * w.q + w.kv) * _BF16 + 2 * s.cp * _FP32  # q and k before their norm with 1 / rms, q after it
    attention += s.cp * (w.q * _BF16 + w.heads * _FP32)  # output and log-sum-exp
    if layout.parallel.cp == 1:
        attention += 2 * s.cp * w.kv * _BF16  # k, v
    else:
        attention += 2 * s.visible * w.kv * _BF16 + s.cp * w.q * _BF16  # k, v of all visible tokens; outputs run by run, and joined
    router = s.rank * (w.hidden + m.num_experts + 2 * m.top_k) * _FP32  # input in fp32, logits; weights and choices
    if m.router_aux_loss_coef > 0:
        router += s.rank * m.num_experts * _FP32  # scores
    dispatch = 0
    if layout.parallel.ep > 1:
        dispatch = s.rank * layout.parallel.ep * _INT32 + s.came * m.top_k * _FP32  # each token's row at each rank; weights that came
    return {"norms": norms, "attention": attention, "router": router, "dispatch": dispatch, "experts": _experts_kept(job, w, s)}


def _experts_kept(job: Job, w: Widths, s: Shares) -> int:
    m = job.model
    hidden, f, rows = w.hidden, m.intermediate_size, s.layout_rows
    kept = rows * _FP32 + s.came * m.top_k * _FP32  # of the layout: token of each row, row of each slot
    kept += rows * hidden * _BF16  # output rows, for the gradient of the routing weights
    if m.fp8_experts:
        codes = hidden + f + (-(-hidden // 128) + -(-f // 128)) * _FP32  # of input and SwiGLU's result, with a factor per 128
        return kept + rows * (codes + 2 * f * _BF16) + w.experts * m.expert_parameters  # gate and up; the weights' codes
    fused = job.cluster.runs_on == "cpu" or job.options.lean_experts
    gates = 3 * f if fused else 4 * f  # gate, up, their product; torch's kernel: silu(gate) too
    return kept + rows * (hidden + gates) * _BF16


def layer_input(s: Shares, hidden: int) -> int:
    """What is left of a layer that is run again in the backward."""
    return s.rank * hidden * _BF16


def mtp_kept(job: Job, layout: Layout, s: Shares) -> int:
    """Of one MTP module, beside its layer: embedding, previous hidden state, both normed side by side, the state before the last norm
    and what its logits keep."""
    hidden = job.model.hidden_size
    if layout.parallel.recompute:
        return s.rank * 2 * hidden * _BF16 + _logits_kept(s, hidden)  # the two inputs, the second in place of the layer's own
    return s.rank * (4 * hidden * _BF16 + 2 * _FP32) + _logits_kept(s, hidden)


def head_kept(job: Job, s: Shares) -> int:
    """Of final norm and logits."""
    return _logits_kept(s, job.model.hidden_size)


def _logits_kept(s: Shares, hidden: int) -> int:
    """A state before and after its norm, 1 / rms; per prediction its indices, target logit and log-sum-exp."""
    return s.rank * (hidden * _BF16 + _FP32) + s.cp * (hidden * _BF16 + 5 * _INT64)


def batch_kept(job: Job, s: Shares) -> int:
    """The rotary angles and the ids of the embedding."""
    return s.cp * job.model.rotary_dim * _BF16 + s.rank * _INT64


# ---- for a moment --------------------------------------------------------------------------------------------------------------


def layer_working(job: Job, layout: Layout, s: Shares) -> int:
    """The most that a layer's backward adds to what is kept: in the experts' gradients, or where they are added to the fp32 sums."""
    m, w = job.model, Widths.of(job, layout)
    hidden, f, rows = w.hidden, m.intermediate_size, s.layout_rows
    on_cpu = job.cluster.runs_on == "cpu"
    residual = 2 * s.rank * hidden * _BF16
    weight_gradients = w.experts * m.expert_parameters * _BF16
    dispatched = 2 * s.came * hidden * _BF16 if layout.parallel.ep > 1 else 0  # gradients of the rows that came, and of the sum
    if m.fp8_experts:
        # SwiGLU's gradient: in place of eight fp32 tensors [rows, F] one kernel's result
        products = rows * (f * _BF16 + (2 * f * _BF16 if job.options.lean_experts else 8 * f * _FP32))
    else:
        products = rows * (hidden + 2 * f) * _BF16 + weight_gradients
        if on_cpu:
            groups = max(1, w.experts)
            products += groups * (s.expert_rows // groups // _SLAB + 1) * _SLAB * 2 * f * _BF16
    adding = rows * hidden * _BF16 + weight_gradients
    if on_cpu:  # torch casts there before it adds
        adding += w.experts * 2 * f * hidden * _FP32
    return residual + dispatched + max(products, adding)


def head_working(job: Job, layout: Layout, s: Shares) -> int:
    """Of the logits' backward: the gradients of weight and hidden states, and one chunk of logits."""
    w = Widths.of(job, layout)
    hidden = w.hidden
    rows = s.cp * hidden * (2 * _FP32 + 2 * _BF16)
    weight = w.vocabulary * hidden * _BF16
    if job.cluster.runs_on == "cpu":
        return weight + max(rows + min(s.cp * w.vocabulary, _CPU_CHUNK) * _BF16, w.vocabulary * hidden * _FP32)
    return weight + rows + min(s.cp * w.vocabulary, _CUDA_CHUNK) * (_FP32 + _BF16)

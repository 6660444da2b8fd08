"""The decoder layer of M2: attention with QK norm over the whole projected vector, then routed experts; plain pre-norm.

Mathematics only. ``Attend`` is how a layer reaches other tokens: on a training forest it is tree attention, when generating it is a
key/value cache. On a mesh a layer has its rank's part of the weights and of the tokens; a mesh of ones has all of both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megatron_m2.model.config import ModelConfig
from megatron_m2.ops.experts import swiglu_experts
from megatron_m2.ops.norm_rope import Rotary, norm_rope, rms_norm, row_sum_squares
from megatron_m2.ops.router import sigmoid_router
from megatron_m2.ops.weight_grad import linear
from megatron_m2.parallel.collectives import all_sum, gather_rows, scatter_sum_rows, total
from megatron_m2.parallel.expert import LocalExperts, expert_parallel
from megatron_m2.parallel.layout import part
from megatron_m2.parallel.mesh import Axis, Mesh
from megatron_m2.parallel.placement import placed
from megatron_m2.parallel.tensor import split_linear

# Shape suffixes: T tokens of this rank, C of its tp ranks together (all, on a mesh of ones), H hidden, E experts, K experts per token.

ExpertParallel = Callable[[Tensor, Tensor, Tensor, int, Axis, LocalExperts], Tensor]  # parallel.expert.expert_parallel and its like
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q [C, heads, d], k and v [C, kv_heads, d] -> [C, heads, d]


@dataclass(frozen=True)
class Tokens:
    """What a layer knows of its tokens beside their hidden states.

    Attributes:
        rotary: angles of the C tokens. attend: how they see each other.
        multiplicity_T: int32 [T] or None, samples through each.
        routes_TK: int16 [T, K] or None, experts to use in this layer; a row of -1: it chooses.
        rows: how many of the C tokens each tp rank has.
    """

    rotary: Rotary
    attend: Attend
    multiplicity_T: Tensor | None
    rows: tuple[int, ...]
    routes_TK: Tensor | None = None


class RMSNorm(nn.Module):
    """Learned scale of :func:`megatron_m2.ops.norm_rope.rms_norm`."""

    def __init__(self, width: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention, no biases; q and k are normalised over all their heads together, before partial RoPE.

    Of tp ranks each has a part of the heads; where they are more than the key/value heads, several hold the same one.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, mesh: Mesh) -> None:
        super().__init__()
        self.axis, self.head_dim = mesh.tp, config.head_dim
        tp, rank, hidden = mesh.tp.size, mesh.tp.rank, config.hidden_size
        self.kv_copies = max(1, tp // config.num_key_value_heads)
        self.full_width = config.q_size, config.kv_size
        q = part(config.q_size, tp, rank)
        kv = part(config.kv_size, tp // self.kv_copies, rank // self.kv_copies)
        self.q_proj = split_linear(hidden, config.q_size, 0, q, "heads", dtype, config.fp8_dense)
        self.k_proj = split_linear(hidden, config.kv_size, 0, kv, "kv", dtype, config.fp8_dense)
        self.v_proj = split_linear(hidden, config.kv_size, 0, kv, "kv", dtype, config.fp8_dense)
        self.o_proj = split_linear(config.q_size, hidden, 1, q, "heads", dtype, config.fp8_dense)
        self.q_norm = RMSNorm(q[1] - q[0], config.rms_norm_eps, dtype)
        self.k_norm = RMSNorm(kv[1] - kv[0], config.rms_norm_eps, dtype)
        placed(self.q_norm.weight, 0, q, config.q_size, "heads")
        placed(self.k_norm.weight, 0, kv, config.kv_size, "kv")

    def forward(self, x_TH: Tensor, tokens: Tokens) -> Tensor:
        x_CH = gather_rows(x_TH, self.axis, tokens.rows)
        q = self._norm_rope(self.q_proj(x_CH), self.q_norm, self.full_width[0], 1, tokens.rotary)
        k = self._norm_rope(self.k_proj(x_CH), self.k_norm, self.full_width[1], self.kv_copies, tokens.rotary)
        out = tokens.attend(q, k, self.v_proj(x_CH).unflatten(-1, (-1, self.head_dim)))
        return scatter_sum_rows(self.o_proj(out.flatten(1)), self.axis, tokens.rows)

    def _norm_rope(self, x: Tensor, norm: RMSNorm, full_width: int, copies: int, rotary: Rotary) -> Tensor:
        squares = None if self.axis.size == 1 else all_sum(row_sum_squares(x), self.axis) / copies
        return norm_rope(x, norm.weight, norm.eps, x.shape[1] // self.head_dim, rotary, squares, full_width)


class RouterStats(NamedTuple):
    """What one mixture-of-experts layer says of its routing.

    Attributes:
        counts_E: int64 [E], tokens (times multiplicity) each expert got.
        aux_loss: fp32 scalar, the balance loss before its coefficient; None when the coefficient is 0.
    """

    counts_E: Tensor
    aux_loss: Tensor | None


class Router(nn.Module):
    """Sigmoid router: weight, bias, logits and scores in fp32 (fp64 in an fp64 model). The bias only chooses; it gets no gradient."""

    bias: Tensor

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.top_k = config.top_k
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size, dtype=wide))
        self.register_buffer("bias", torch.zeros(config.num_experts, dtype=wide))

    def forward(self, x_TH: Tensor) -> Tensor:
        """Logits [T, E] in the router's own precision."""
        return linear(x_TH.to(self.weight.dtype), self.weight)


class MoE(nn.Module):
    """Routed SwiGLU experts, no shared expert; of ep ranks each has a part of the experts."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, mesh: Mesh) -> None:
        super().__init__()
        self.mesh, self.num_experts = mesh, config.num_experts
        self.expert_parallel: ExpertParallel = expert_parallel  # how rows reach their experts; a run may set it otherwise
        self.with_aux_loss = config.router_aux_loss_coef > 0
        self.fp8 = config.fp8_experts
        self.router = Router(config, dtype)
        mine = part(config.num_experts, mesh.ep.size, mesh.ep.rank)
        experts = mine[1] - mine[0]
        self.gate_up_proj = placed(nn.Parameter(torch.empty(experts, 2 * config.intermediate_size, config.hidden_size, dtype=dtype)),
                                   0, mine, config.num_experts, "experts")
        self.down_proj = placed(nn.Parameter(torch.empty(experts, config.hidden_size, config.intermediate_size, dtype=dtype)),
                                0, mine, config.num_experts, "experts")

    def forward(self, x_TH: Tensor, tokens: Tokens) -> tuple[Tensor, RouterStats]:
        logits_TE, multiplicity_T = self.router(x_TH), tokens.multiplicity_T
        routes = None if tokens.routes_TK is None else self._routes(logits_TE.detach(), tokens.routes_TK)
        routed = sigmoid_router(logits_TE, self.router.bias, self.router.top_k, multiplicity=multiplicity_T, routes=routes)
        out = self.expert_parallel(x_TH, routed.weights, routed.experts, self.num_experts, self.mesh.ep, self._experts)
        aux_loss = None
        if self.with_aux_loss:
            aux_loss = balance_loss(logits_TE, routed.counts, multiplicity_T, partial(total, axis=self.mesh.sequence))
        return out, RouterStats(routed.counts, aux_loss)

    def _routes(self, logits_TE: Tensor, routes_TK: Tensor) -> Tensor:
        """int32 [T, K]: the recorded ones; where there are none, the router's."""
        chosen_TK = sigmoid_router(logits_TE, self.router.bias, self.router.top_k).experts
        return torch.where(routes_TK < 0, chosen_TK, routes_TK.int())

    def _experts(self, x: Tensor, weights: Tensor, experts: Tensor, routed: int) -> Tensor:
        return swiglu_experts(x, self.gate_up_proj, self.down_proj, weights, experts, self.fp8, routed)


def balance_loss(logits_TE: Tensor, counts_E: Tensor, multiplicity_T: Tensor | None,
                 over_ranks: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
    """``E * sum_e f_e P_e``: f the share of choices that expert e got, P its mean normalised score (DeepSeek-V3 eq. 17-19, per forest).

    It is 1 when either is uniform, and its gradient, through P alone, lowers the scores of overloaded experts. Where ``over_ranks``
    sums over the ranks that share the forest, this is one rank's share of it.
    """
    scores_TE = logits_TE.sigmoid()
    share_TE = scores_TE / scores_TE.sum(-1, keepdim=True)
    if multiplicity_T is None:
        sum_E, count = share_TE.sum(0), torch.tensor(len(share_TE), device=logits_TE.device)
    else:
        sum_E, count = (share_TE * multiplicity_T[:, None]).sum(0), multiplicity_T.sum()
    with torch.no_grad():
        chosen_E, tokens = over_ranks(counts_E), over_ranks(count)
    return len(counts_E) * (chosen_E / chosen_E.sum().clamp_min(1) * (sum_E / tokens.clamp_min(1))).sum()


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + experts(norm(x))."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, mesh: Mesh) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.self_attn = Attention(config, dtype, mesh)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.moe = MoE(config, dtype, mesh)

    def forward(self, x_TH: Tensor, tokens: Tokens) -> tuple[Tensor, RouterStats]:
        x_TH = x_TH + self.self_attn(self.input_layernorm(x_TH), tokens)
        routed, stats = self.moe(self.post_attention_layernorm(x_TH), tokens)
        return x_TH + routed, stats

"""The decoder layer of M2: attention with QK norm over the whole projected vector, then routed experts; plain pre-norm.

Mathematics only. ``Attend`` is how a layer reaches other tokens: on a training forest it is tree attention, when generating it is a
key/value cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_m2.model.config import ModelConfig
from megatron_m2.ops.experts import swiglu_experts
from megatron_m2.ops.norm_rope import Rotary, norm_rope, rms_norm
from megatron_m2.ops.router import sigmoid_router

# Shape suffixes: T tokens, H hidden, E experts, K experts per token.

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q [T, heads, d], k and v [T, kv_heads, d] -> [T, heads, d]


class RMSNorm(nn.Module):
    """Learned scale of :func:`megatron_m2.ops.norm_rope.rms_norm`."""

    def __init__(self, width: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention, no biases; q and k are normalised over all their heads together, before partial RoPE."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.q_size, bias=False, dtype=dtype)
        self.k_proj = nn.Linear(config.hidden_size, config.kv_size, bias=False, dtype=dtype)
        self.v_proj = nn.Linear(config.hidden_size, config.kv_size, bias=False, dtype=dtype)
        self.o_proj = nn.Linear(config.q_size, config.hidden_size, bias=False, dtype=dtype)
        self.q_norm = RMSNorm(config.q_size, config.rms_norm_eps, dtype)
        self.k_norm = RMSNorm(config.kv_size, config.rms_norm_eps, dtype)

    def forward(self, x_TH: Tensor, rotary: Rotary, attend: Attend) -> Tensor:
        q, k = self._norm_rope(self.q_proj(x_TH), self.q_norm, rotary), self._norm_rope(self.k_proj(x_TH), self.k_norm, rotary)
        out = attend(q, k, self.v_proj(x_TH).unflatten(-1, (-1, self.head_dim)))
        return self.o_proj(out.flatten(1))

    def _norm_rope(self, x: Tensor, norm: RMSNorm, rotary: Rotary) -> Tensor:
        return norm_rope(x, norm.weight, norm.eps, x.shape[1] // self.head_dim, rotary)


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
        return F.linear(x_TH.to(self.weight.dtype), self.weight)


class MoE(nn.Module):
    """Routed SwiGLU experts, no shared expert."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.with_aux_loss = config.router_aux_loss_coef > 0
        self.fp8 = config.fp8_experts
        self.router = Router(config, dtype)
        self.gate_up_proj = nn.Parameter(torch.empty(config.num_experts, 2 * config.intermediate_size, config.hidden_size, dtype=dtype))
        self.down_proj = nn.Parameter(torch.empty(config.num_experts, config.hidden_size, config.intermediate_size, dtype=dtype))

    def forward(self, x_TH: Tensor, multiplicity_T: Tensor | None) -> tuple[Tensor, RouterStats]:
        logits_TE = self.router(x_TH)
        routed = sigmoid_router(logits_TE, self.router.bias, self.router.top_k, multiplicity=multiplicity_T)
        out = swiglu_experts(x_TH, self.gate_up_proj, self.down_proj, routed.weights, routed.experts, self.fp8)
        aux_loss = balance_loss(logits_TE, routed.counts, multiplicity_T) if self.with_aux_loss else None
        return out, RouterStats(routed.counts, aux_loss)


def balance_loss(logits_TE: Tensor, counts_E: Tensor, multiplicity_T: Tensor | None) -> Tensor:
    """``E * sum_e f_e P_e``: f the share of choices that expert e got, P its mean normalised score (DeepSeek-V3 eq. 17-19, per batch).

    It is 1 when either is uniform, and its gradient, through P alone, lowers the scores of overloaded experts.
    """
    scores_TE = logits_TE.sigmoid()
    share_TE = scores_TE / scores_TE.sum(-1, keepdim=True)
    if multiplicity_T is None:
        mean_E = share_TE.mean(0)
    else:
        mean_E = (share_TE * multiplicity_T[:, None]).sum(0) / multiplicity_T.sum()
    return len(counts_E) * (counts_E / counts_E.sum() * mean_E).sum()


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + experts(norm(x))."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.self_attn = Attention(config, dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.moe = MoE(config, dtype)

    def forward(self, x_TH: Tensor, rotary: Rotary, attend: Attend, multiplicity_T: Tensor | None
                ) -> tuple[Tensor, RouterStats]:
        x_TH = x_TH + self.self_attn(self.input_layernorm(x_TH), rotary, attend)
        routed, stats = self.moe(self.post_attention_layernorm(x_TH), multiplicity_T)
        return x_TH + routed, stats

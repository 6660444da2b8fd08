"""How well a draft head predicts what the policy predicts, its vocabulary split over ranks or not.

The draft is trained towards the policy's own most probable tokens (top-K KL), so that its speculation keeps up with a policy that RL
changes (MiniMax-M2 report 6.2.6). Policy and output weights get no gradient from it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_m2.parallel.collectives import gather_rows, total
from megatron_m2.parallel.layout import part
from megatron_m2.parallel.mesh import Axis

# Shape suffixes: N rows, C a chunk of them, H hidden, V this rank's part of the vocabulary, K most probable tokens.

_CHUNK_ELEMENTS = 1 << 24  # logits that exist at a time, of draft and policy each


class Draft(NamedTuple):
    """Of each row, fp32 (fp64 for fp64).

    Attributes:
        kl: ``sum_K p (log p - log q)`` in nats: p the policy's probabilities of its K most probable tokens, made to sum to 1; q the
            draft's, of the whole vocabulary, so that mass it puts elsewhere costs too.
        acceptance: ``sum_V min(p, q)`` of the whole distributions: how often speculative sampling keeps the draft's token. No gradient.
    """

    kl: Tensor
    acceptance: Tensor


def draft_loss(draft_NH: Tensor, policy_NH: Tensor, weight_VH: Tensor, top_k: int, vocab_start: int, axis: Axis) -> tuple[Draft, slice]:
    """:class:`Draft` of this rank's share of the rows, and which of them that is.

    The gradient, to ``draft_NH`` alone, is made along with the value: whole logits never exist, and none are made twice.

    Args:
        draft_NH, policy_NH: [N, H] before the head, the same on every rank of the axis.
        weight_VH: this rank's part of the head, from ``vocab_start``.
    """
    share = slice(*part(len(draft_NH), axis.size, axis.rank))
    kl, acceptance = _DraftLoss.apply(draft_NH, policy_NH, weight_VH, top_k, vocab_start, axis)
    return Draft(kl, acceptance), share


class _DraftLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, draft: Tensor, policy: Tensor, weight: Tensor, top_k: int, vocab_start: int, axis: Axis) -> tuple[Tensor, Tensor]:
        rows = max(1, _CHUNK_ELEMENTS // len(weight))
        wide = torch.float64 if draft.dtype == torch.float64 else torch.float32
        kl, acceptance = draft.new_zeros(len(draft), dtype=wide), draft.new_zeros(len(draft), dtype=wide)
        d_draft = torch.empty_like(draft)
        for first in range(0, len(draft), rows):
            chunk = slice(first, first + rows)
            draft_CV, policy_CV = (F.linear(x[chunk], weight).to(wide) for x in (draft, policy))
            kl[chunk], acceptance[chunk], d_logits_CV = _chunk(draft_CV, policy_CV, top_k, vocab_start, axis)
            d_draft[chunk] = d_logits_CV.to(weight.dtype) @ weight
        ctx.save_for_backward(d_draft)
        ctx.axis, ctx.rows = axis, [b - a for a, b in (part(len(draft), axis.size, r) for r in range(axis.size))]
        share = slice(*part(len(draft), axis.size, axis.rank))
        kl, acceptance = kl[share], acceptance[share]
        ctx.mark_non_differentiable(acceptance)
        return kl, acceptance

    @staticmethod
    def backward(ctx: Any, d_kl: Tensor, d_acceptance: Tensor) -> tuple[Tensor | None, ...]:
        (d_draft,) = ctx.saved_tensors
        whole = gather_rows(d_kl, ctx.axis, ctx.rows)  # every rank has a part of the vocabulary of every row
        return (d_draft * whole[:, None]).to(d_draft.dtype), None, None, None, None, None


def _chunk(draft_CV: Tensor, policy_CV: Tensor, top_k: int, vocab_start: int, axis: Axis) -> tuple[Tensor, Tensor, Tensor]:
    """KL, acceptance, and the KL's gradient by the draft's logits here, which are overwritten."""
    log_q_CV, log_p_CV = (x - _logsumexp(x, axis)[:, None] for x in (draft_CV, policy_CV))
    acceptance_C = total(torch.minimum(log_q_CV, log_p_CV).exp().sum(1), axis)
    log_p_CK, here_CK, place_CK = _most_probable(log_p_CV, top_k, vocab_start, axis)
    log_p_CK = log_p_CK.log_softmax(1)
    log_q_CK = total(torch.where(here_CK, log_q_CV.gather(1, place_CK), 0.0), axis)
    p_CK = log_p_CK.exp()
    kl_C = (p_CK * (log_p_CK - log_q_CK)).sum(1)
    d_logits_CV = log_q_CV.exp_().scatter_add_(1, place_CK, torch.where(here_CK, -p_CK, 0.0))
    return kl_C, acceptance_C, d_logits_CV


def _logsumexp(x_CV: Tensor, axis: Axis) -> Tensor:
    return gather_rows(x_CV.logsumexp(1)[None], axis, [1] * axis.size).logsumexp(0)


def _most_probable(log_p_CV: Tensor, top_k: int, vocab_start: int, axis: Axis) -> tuple[Tensor, Tensor, Tensor]:
    """[C, K] of the whole vocabulary's most probable tokens: log-probs, whether each is in this rank's part, and its column there."""
    values, ids = log_p_CV.topk(min(top_k, log_p_CV.shape[1]), dim=1)
    if axis.size > 1:
        counts = gather_rows(torch.tensor([values.shape[1]], device=values.device), axis, [1] * axis.size).tolist()
        values, ids = (gather_rows(x.t().contiguous(), axis, counts).t() for x in (values, ids + vocab_start))
        values, best = values.topk(min(top_k, values.shape[1]), dim=1)
        ids = ids.gather(1, best) - vocab_start
    here = (ids >= 0) & (ids < log_p_CV.shape[1])
    return values, here, ids.where(here, 0)

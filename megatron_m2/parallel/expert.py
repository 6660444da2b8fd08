"""Experts over ranks: a token travels once to every rank that has one of its experts, and one sum comes back.

All k choices of a token on one rank share a message row (DeepEP does the same between nodes), so what travels is at most
min(k, ranks) rows per token each way, with no padding to a worst case.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_m2.parallel.collectives import all_to_all, exchange_rows
from megatron_m2.parallel.mesh import Axis

# Shape suffixes: T tokens of this rank, H hidden, K experts per token; M tokens that came.

# x [M, H], weights [M, K], experts int32 [M, K] among this rank's, -1 for those of other ranks -> [M, H], the weighted sum
LocalExperts = Callable[[Tensor, Tensor, Tensor], Tensor]


def expert_parallel(x_TH: Tensor, weights_TK: Tensor, experts_TK: Tensor, num_experts: int, axis: Axis, local: LocalExperts) -> Tensor:
    """``sum_k weights[t, k] * expert[t, k](x[t])``, experts split over the axis: rank r has [r E / R, (r + 1) E / R).

    Args:
        x_TH: [T, H]; weights_TK: [T, K]; experts_TK: int32 [T, K] of all ``num_experts``; T differs from rank to rank and may be 0.
        local: this rank's experts.

    Returns:
        [T, H], differentiable in x and the weights.
    """
    if axis.size == 1:
        return local(x_TH, weights_TK, experts_TK)
    per_rank = num_experts // axis.size
    there = torch.zeros(len(x_TH), axis.size, dtype=torch.bool, device=x_TH.device)
    there.scatter_(1, (experts_TK // per_rank).long(), True)
    rank_of_row, token_of_row = there.t().nonzero(as_tuple=True)  # by rank, then by token
    send = there.sum(0)
    receive = all_to_all(send[:, None], axis, [1] * axis.size, [1] * axis.size).squeeze(1)
    counts = send.tolist(), receive.tolist()
    experts_MK = all_to_all(experts_TK.index_select(0, token_of_row), axis, *counts)
    x_MH = exchange_rows(x_TH.index_select(0, token_of_row), axis, *counts)
    weights_MK = exchange_rows(weights_TK.index_select(0, token_of_row), axis, *counts)
    here_MK = experts_MK - axis.rank * per_rank
    here_MK = here_MK.masked_fill((here_MK < 0) | (here_MK >= per_rank), -1)
    back = exchange_rows(local(x_MH, weights_MK, here_MK), axis, counts[1], counts[0])
    return _add_rows(back, token_of_row, rank_of_row, axis.size, len(x_TH))


def _add_rows(rows: Tensor, token_of_row: Tensor, rank_of_row: Tensor, ranks: int, tokens: int) -> Tensor:
    """Sum of each token's rows, in fp32 (fp64 for fp64), rank by rank: the order does not depend on the machine."""
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    out = torch.zeros(tokens, rows.shape[1], dtype=wide, device=rows.device)
    start = 0
    for count in torch.bincount(rank_of_row, minlength=ranks).tolist():
        # a token has one row per rank at most, so that no two of these additions meet
        out = out.index_add(0, token_of_row[start : start + count], rows[start : start + count].to(wide))
        start += count
    return out.to(rows.dtype)

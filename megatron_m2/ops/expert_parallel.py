"""Rows of tokens to the ranks of their experts, and their sums back. Kernels: ``csrc/expert_parallel/``; knows no process group.

Of R ranks, rank r has experts [r E / R, (r + 1) E / R). A token has one row at each rank that has one of its experts, however many.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_m2.ops import _extension
from megatron_m2.ops.fp8 import E4M3

# Shape suffixes: T tokens, H hidden, K experts per token, R ranks; M rows at one rank, P blocks of 128 values.

MAX_RANKS = 256
MAX_PARTS = 4


class Plan(NamedTuple):
    """Attributes:
        counts: int32 [R, 2], rows for each rank, and choices among them.
        row: int32 [T, R], each token's row at each rank, in the order of tokens; -1: none.
    """

    counts: Tensor
    row: Tensor


# ---- reference ---------------------------------------------------------------------------------------------------------------------


def plan_rows_reference(experts_TK: Tensor, num_experts: int, ranks: int) -> Plan:
    """:func:`plan_rows` in plain torch."""
    rank_TK = torch.where(experts_TK < 0, ranks, experts_TK // (num_experts // ranks)).long()
    there = torch.zeros(len(experts_TK), ranks + 1, dtype=torch.bool, device=experts_TK.device).scatter_(1, rank_TK, True)[:, :ranks]
    choices = torch.bincount(rank_TK.flatten(), minlength=ranks + 1)[:ranks]
    return Plan(torch.stack([there.sum(0), choices], 1).int(), (there.cumsum(0) - 1).masked_fill(~there, -1).int())


def pack_rows_reference(parts: Sequence[Tensor], experts_TK: Tensor | None, row_TR: Tensor, per_rank: int, at: Sequence[int],
                        out: Sequence[Tensor]) -> None:
    """:func:`pack_rows` in plain torch."""
    for r, target in enumerate(out):
        token = (row_TR[:, r] >= 0).nonzero().squeeze(1)  # in the order of its rows
        if len(target) == 0:
            continue
        columns = list(parts)
        if experts_TK is not None:
            here = experts_TK - r * per_rank
            columns.append(here.masked_fill((here < 0) | (here >= per_rank), -1))
        for column, start in zip(columns, at, strict=True):
            source = column.contiguous().view(torch.uint8).index_select(0, token)
            target[:, start : start + source.shape[1]] = source


def combine_rows_reference(rows: Sequence[Tensor], row_TR: Tensor) -> Tensor:
    """:func:`combine_rows` in plain torch."""
    dtype = rows[0].dtype
    out = torch.zeros(len(row_TR), rows[0].shape[1], dtype=torch.float64 if dtype == torch.float64 else torch.float32,
                      device=row_TR.device)
    for r, source in enumerate(rows):
        token = (row_TR[:, r] >= 0).nonzero().squeeze(1)
        out.index_add_(0, token, source.to(out.dtype).index_select(0, row_TR[token, r]))
    return out.to(dtype)


def dequantize_rows_reference(codes_MH: Tensor, scales_MP: Tensor) -> Tensor:
    """:func:`dequantize_rows` in plain torch."""
    return (codes_MH.float() * scales_MP.repeat_interleave(128, 1)[:, : codes_MH.shape[1]]).bfloat16()


# ---- public ------------------------------------------------------------------------------------------------------------------------


def plan_rows(experts_TK: Tensor, num_experts: int, ranks: int) -> Plan:
    """Which row each token has at each rank.

    Args:
        experts_TK: int32 [T, K], each in [0, num_experts), or -1: the slot goes nowhere.

    Raises:
        ValueError: dtype or shape does not fit, the ranks do not divide the experts, or an expert is out of range (on the CPU),
            naming the argument.
    """
    if experts_TK.dim() != 2 or experts_TK.dtype != torch.int32:
        raise ValueError(f"experts: {experts_TK.dtype} {list(experts_TK.shape)}, need torch.int32 [tokens, top_k]")
    if not 1 <= ranks <= MAX_RANKS:
        raise ValueError(f"ranks: {ranks}, need 1 to {MAX_RANKS}")
    if num_experts < ranks or num_experts % ranks:
        raise ValueError(f"num_experts: {num_experts}, need a multiple of the {ranks} ranks; nearest is "
                         f"{max(1, round(num_experts / ranks)) * ranks}")
    if _extension.available(experts_TK.device.type):
        return Plan(*torch.ops.m2_ops.ep_plan(experts_TK, num_experts, ranks))
    return plan_rows_reference(experts_TK, num_experts, ranks)


def pack_rows(parts: Sequence[Tensor], experts_TK: Tensor | None, row_TR: Tensor, per_rank: int, at: Sequence[int],
              out: Sequence[Tensor]) -> None:
    """Writes the message row of every (token, rank): the bytes of the token's row of each part, and its experts among that rank's.

    Args:
        parts: [T, ...] of any dtypes, up to four.
        experts_TK: int32 [T, K] of all experts, or None; of another rank's experts -1 arrives.
        row_TR: of :func:`plan_rows`; per_rank: experts of one rank.
        at: the byte where each part begins in a row, and then the experts.
        out: a uint8 [rows, bytes] for each rank; one without rows is left out.

    Raises:
        ValueError: shapes, dtypes or offsets that do not fit, naming the argument.
    """
    if len(at) != len(parts) + (experts_TK is not None):
        raise ValueError(f"at: {list(at)}, need {len(parts) + (experts_TK is not None)} offsets")
    if len(out) != row_TR.shape[1]:
        raise ValueError(f"out: {len(out)} tensors, need one for each of {row_TR.shape[1]} ranks")
    if _extension.available(row_TR.device.type):
        torch.ops.m2_ops.ep_pack(parts, experts_TK, row_TR, per_rank, at, out)
    else:
        pack_rows_reference(parts, experts_TK, row_TR, per_rank, at, out)


def combine_rows(rows: Sequence[Tensor], row_TR: Tensor) -> Tensor:
    """The sum of each token's rows, in fp32 (fp64 for fp64), rank by rank: the order does not depend on the machine.

    Args:
        rows: [M, H] for each rank; bf16, fp32 or fp64.
        row_TR: of :func:`plan_rows`.

    Returns:
        [T, H] in the rows' dtype; 0 for a token without rows.

    Raises:
        ValueError: shapes or dtypes that do not fit, naming the argument.
    """
    if len(rows) != row_TR.shape[1]:
        raise ValueError(f"rows: {len(rows)} tensors, need one for each of {row_TR.shape[1]} ranks")
    if _extension.available(row_TR.device.type):
        return torch.ops.m2_ops.ep_combine(rows, row_TR)
    return combine_rows_reference(rows, row_TR)


def dequantize_rows(codes_MH: Tensor, scales_MP: Tensor) -> Tensor:
    """``codes * scales`` of :func:`megatron_m2.ops.fp8.quantize_rows`, bf16 [M, H]; their rows may lie apart.

    Raises:
        ValueError: shapes or dtypes that do not fit, naming the argument.
    """
    if codes_MH.dtype != E4M3 or codes_MH.dim() != 2:
        raise ValueError(f"codes: {codes_MH.dtype} {list(codes_MH.shape)}, need {E4M3} [rows, width]")
    need = [len(codes_MH), -(-codes_MH.shape[1] // 128)]
    if scales_MP.dtype != torch.float32 or list(scales_MP.shape) != need:
        raise ValueError(f"scales: {scales_MP.dtype} {list(scales_MP.shape)}, need torch.float32 {need}")
    if _extension.available(codes_MH.device.type):
        return torch.ops.m2_ops.ep_dequantize(codes_MH, scales_MP)
    return dequantize_rows_reference(codes_MH, scales_MP)


# ---- torch.library: shapes for tracing ---------------------------------------------------------------------------------------------

if _extension.available():
    torch.library.register_fake("m2_ops::ep_plan", lambda experts, num_experts, ranks: (
        experts.new_empty(ranks, 2), experts.new_empty(len(experts), ranks)))
    torch.library.register_fake("m2_ops::ep_pack", lambda parts, experts, row, per_rank, at, out: None)
    torch.library.register_fake("m2_ops::ep_combine", lambda rows, row: rows[0].new_empty(len(row), rows[0].shape[1]))
    torch.library.register_fake("m2_ops::ep_dequantize", lambda codes, scales: codes.new_empty(codes.shape, dtype=torch.bfloat16))

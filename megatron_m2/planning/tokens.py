"""How a forest's tokens, and the rows that experts get, spread over ranks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import gcd

import torch

from megatron_m2.model.config import ModelConfig
from megatron_m2.ops.grouped_gemm_fp8 import ROW_BLOCK
from megatron_m2.parallel.context import balanced_owners
from megatron_m2.planning.job import Job, Layout, distinct_groups

_ROW_STEP = 16  # rows of a bf16 expert are padded to it (megatron_m2.ops.experts)
_UNITS = 4096  # a long forest is shared out in this many runs of tokens or fewer


@dataclass(frozen=True)
class Shares:
    """Tokens of one forest on the busiest rank.

    Attributes:
        forest: T, all of them. cp: C, of one cp rank. rank: R, of one rank.
        visible: keys that a cp rank's queries see; received: those of them that others sent.
        pairs: (query, key) pairs of a cp rank.
        sent: rows that a rank sends to experts, those to itself included; came: that it gets.
        expert_rows: rows that its experts multiply.
        layout_rows: rows of the grouped buffers that hold them.
    """

    forest: int
    cp: int
    rank: int
    visible: int
    received: int
    pairs: int
    sent: int
    came: int
    expert_rows: int
    layout_rows: int


def shares(job: Job, layout: Layout) -> Shares:
    m, p, total = job.model, layout.parallel, layout.tokens_per_forest
    cp = -(-total // p.cp)
    rank = -(-cp // p.tp)
    visible, received, pairs = _context(total, job.seq_len, p.cp)
    busy = job.options.imbalance if p.ep > 1 else 1.0  # one rank with all experts has every row of its tokens
    sent = round(rank * distinct_groups(m.num_experts, m.top_k, p.ep))
    came = round(sent * busy)
    mine = round(rank * m.top_k * busy)
    return Shares(total, cp, rank, visible, received, pairs, sent, came, mine, layout_rows(m, mine, p.ep))


def layout_rows(model: ModelConfig, slots: int, ep: int) -> int:
    """Rows of :func:`megatron_m2.ops.permute.permute_layout`: as many as any routing of so many slots can need."""
    block = ROW_BLOCK if model.fp8_experts else _ROW_STEP
    rows = slots + min(slots, model.num_experts // ep) * (block - 1)
    return -(-rows // block) * block


@lru_cache(maxsize=4096)
def _context(total: int, seq_len: int, cp: int) -> tuple[int, int, int]:
    """(visible keys, received keys, pairs), each of the cp rank that has most, as the run itself shares the forest out."""
    chains = total // seq_len
    if cp == 1:
        return total, 0, chains * seq_len * (seq_len + 1) // 2
    unit = gcd(seq_len, 1 << max(0, (total // _UNITS).bit_length() - 1))
    length = seq_len // unit
    depth = torch.arange(length).repeat(chains)
    owners = balanced_owners(depth, cp)
    # of a chain a rank sees what lies before its own last token, and that
    place = torch.arange(chains).repeat_interleave(length) * cp + owners
    seen = torch.zeros(chains * cp, dtype=torch.int64).scatter_reduce(0, place, depth + 1, "amax").view(chains, cp).sum(0)
    received = seen - torch.bincount(owners, minlength=cp)
    pairs = torch.zeros(cp, dtype=torch.int64).index_add(0, owners, depth * unit * unit + unit * (unit + 1) // 2)
    return int(seen.max()) * unit, int(received.max()) * unit, int(pairs.max())

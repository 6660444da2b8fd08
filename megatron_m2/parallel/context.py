"""One forest's tokens over the ranks of a sequence: who owns which, and how rows reach who needs them.

Attention works on a cp rank's tokens with its part of the heads; between attentions each of the rank's tp ranks has a part of those
tokens. Every rank knows the whole forest (some integers per token), so no message ever says what is in another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_m2.parallel.collectives import exchange_rows
from megatron_m2.parallel.layout import part
from megatron_m2.parallel.mesh import Axis, Mesh

# Shape suffixes: T tokens of the forest, C of this cp rank, R of this rank, V visible to this cp rank; H heads, G key/value heads,
# D head_dim.

_CHUNKS_PER_RANK = 4  # runs of tokens a cp rank gets: enough to balance, few enough for long tiles

QueryBlock = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]  # q, k, v, subtree_end, query_start -> out


def balanced_owners(depth_T: Tensor, cp: int) -> Tensor:
    """int64 [T]: a cp rank for each token, as many tokens each to within one chunk, visible pairs balanced.

    The tokens are cut into equal runs; the costliest run left goes to the rank with the least work that has room.
    """
    tokens, chunks = len(depth_T), cp * _CHUNKS_PER_RANK
    bounds = [part(tokens, chunks, i) for i in range(chunks)]
    before = torch.zeros(tokens + 1, dtype=torch.int64)
    torch.cumsum(depth_T.cpu().long() + 1, 0, out=before[1:])
    pairs = [int(before[stop] - before[start]) for start, stop in bounds]
    work, taken = [0] * cp, [0] * cp
    owners = torch.empty(tokens, dtype=torch.int64)
    for i in sorted(range(chunks), key=lambda i: (-pairs[i], i)):
        rank = min((r for r in range(cp) if taken[r] < _CHUNKS_PER_RANK), key=lambda r: (work[r], r))
        work[rank] += pairs[i]
        taken[rank] += 1
        owners[bounds[i][0] : bounds[i][1]] = rank
    return owners.to(depth_T.device)


@dataclass(frozen=True)
class TokenShards:
    """Which rank of ``mesh.sequence`` owns each token of a forest.

    Attributes:
        owner_T: int64 [T], its rank on ``mesh.sequence``.
        index_R: int64 [R], the tokens of this rank, ascending. index_C: of all its tp ranks together.
        rows: how many tokens each of these tp ranks has.
    """

    mesh: Mesh
    owner_T: Tensor
    index_R: Tensor
    index_C: Tensor
    rows: tuple[int, ...]

    @classmethod
    def split(cls, depth_T: Tensor, mesh: Mesh) -> TokenShards:
        """Shares out a forest's tokens."""
        tp, owner_T = mesh.tp.size, torch.zeros_like(depth_T, dtype=torch.int64)
        if mesh.sequence.size > 1:
            cp_owner = balanced_owners(depth_T, mesh.cp.size)
            for c in range(mesh.cp.size):
                of_rank = (cp_owner == c).nonzero().squeeze(1)
                for t in range(tp):
                    start, stop = part(len(of_rank), tp, t)
                    owner_T[of_rank[start:stop]] = c * tp + t
        return cls.of_owners(owner_T, mesh)

    @classmethod
    def of_owners(cls, owner_T: Tensor, mesh: Mesh) -> TokenShards:
        tp = mesh.tp.size
        counts = torch.bincount(owner_T, minlength=mesh.sequence.size).tolist()
        index_R, index_C = ((owner_T // n == r).nonzero().squeeze(1) for n, r in ((1, mesh.sequence.rank), (tp, mesh.cp.rank)))
        return cls(mesh, owner_T, index_R, index_C,
                   tuple(counts[mesh.cp.rank * tp : (mesh.cp.rank + 1) * tp]))

    def keep(self, kept: Tensor) -> TokenShards:
        """Of a forest that has only the tokens ``kept`` (ascending indices) of this one."""
        return TokenShards.of_owners(self.owner_T[kept], self.mesh)

    def mine(self, x_T: Tensor) -> Tensor:
        """This rank's rows of something that every rank has whole."""
        return x_T if self.mesh.sequence.size == 1 else x_T[self.index_R]

    def of_cp(self, x_T: Tensor) -> Tensor:
        """The rows of this rank and its tp neighbours."""
        return x_T if self.mesh.cp.size == 1 else x_T[self.index_C]

    def place(self, index: Tensor) -> Tensor:
        """Row of tokens that this rank owns among its own."""
        return index if self.mesh.sequence.size == 1 else torch.searchsorted(self.index_R, index)

    def owned_by_cp(self, index: Tensor) -> Tensor:
        """bool: which of these tokens this cp rank owns."""
        return self.owner_T[index] // self.mesh.tp.size == self.mesh.cp.rank

    def place_in_cp(self, index: Tensor) -> Tensor:
        """Row of tokens that this cp rank owns among its own."""
        return index if self.mesh.cp.size == 1 else torch.searchsorted(self.index_C, index)

    def fetch(self, x_R: Tensor, source: Tensor, wanted: TokenShards) -> Tensor:
        """Rows of other tokens: row r of the result is that of token ``source[t]``, t the r-th token that this rank owns in ``wanted``.

        Args:
            x_R: rows of this rank's tokens.
            source: int64, a token of this forest for each of ``wanted``'s.
        """
        axis = self.mesh.sequence
        if axis.size == 1:
            return x_R.index_select(0, source)
        sender, receiver = self.owner_T[source], wanted.owner_T
        out = (sender == axis.rank).nonzero().squeeze(1)
        out = out[receiver[out].argsort(stable=True)]
        sent = x_R.index_select(0, self.place(source[out]))
        came_from = sender[wanted.index_R]
        received = exchange_rows(sent, axis, _counts(receiver[out], axis), _counts(came_from, axis))
        return received.index_select(0, came_from.argsort(stable=True).argsort())


def _counts(ranks: Tensor, axis: Axis) -> list[int]:
    counts: list[int] = torch.bincount(ranks, minlength=axis.size).tolist()
    return counts


@dataclass(frozen=True)
class VisibleKeys:
    """What a cp rank's queries see of the others' keys: these travel, nothing else does.

    Attributes:
        send_C: rows of this rank's keys to send, ordered by receiver; send, receive: how many to and from each rank.
        order_V: brings [own rows; received rows] into the forest's order.
        ends_V: int32 [V], ``subtree_end`` among the visible tokens.
        runs: of this rank's queries: (first row, one past the last, index of the first among the visible tokens).
    """

    axis: Axis
    send_C: Tensor
    send: list[int]
    receive: list[int]
    order_V: Tensor
    ends_V: Tensor
    runs: list[tuple[int, int, int]]

    @classmethod
    def of(cls, subtree_end_T: Tensor, shards: TokenShards) -> VisibleKeys:
        axis, owner_T = shards.mesh.cp, shards.owner_T // shards.mesh.tp.size
        ends = subtree_end_T.long()
        needed = []  # by each rank: the tokens with one of its own in their subtree
        for rank in range(axis.size):
            before = _before(owner_T == rank)
            needed.append(before[ends] > before[:-1])
        mine = owner_T == axis.rank
        outgoing = [(mine & n).nonzero().squeeze(1) if r != axis.rank else mine.new_empty(0, dtype=torch.int64)
                    for r, n in enumerate(needed)]
        incoming = [(needed[axis.rank] & (owner_T == r)).nonzero().squeeze(1) if r != axis.rank else mine.new_empty(0, dtype=torch.int64)
                    for r in range(axis.size)]
        visible_before = _before(needed[axis.rank])
        visible = needed[axis.rank].nonzero().squeeze(1)
        starts = shards.index_C.diff(prepend=shards.index_C.new_full((1,), -2)).ne(1).nonzero().squeeze(1).tolist()
        runs = [(start, stop, int(visible_before[shards.index_C[start]]))
                for start, stop in zip(starts, [*starts[1:], len(shards.index_C)], strict=False)]  # no starts: no token here, no run
        return cls(axis, shards.place_in_cp(torch.cat(outgoing)), [len(o) for o in outgoing], [len(i) for i in incoming],
                   torch.cat([shards.index_C, *incoming]).argsort(), visible_before[ends[visible]].int(), runs)

    def attend(self, q_CHD: Tensor, k_CGD: Tensor, v_CGD: Tensor, block: QueryBlock) -> Tensor:
        """Attention of this rank's queries over all tokens they see, run by run: [C, H, D]."""
        kv = torch.cat([k_CGD, v_CGD], dim=1)
        received = exchange_rows(kv.index_select(0, self.send_C), self.axis, self.send, self.receive)
        k_V, v_V = torch.cat([kv, received]).index_select(0, self.order_V).split(k_CGD.shape[1], dim=1)
        outs = []
        for start, stop, first in self.runs:
            end = first + stop - start
            outs.append(block(q_CHD[start:stop], k_V[:end], v_V[:end], self.ends_V[:end].clamp_max(end), first))
        # a rank without queries joins the exchange of the backward too: its empty result hangs on the keys
        return torch.cat(outs) if outs else q_CHD + (k_V.sum() + v_V.sum())


def _before(chosen_T: Tensor) -> Tensor:
    """int64 [T + 1]: how many tokens before each are chosen."""
    out = torch.zeros(len(chosen_T) + 1, dtype=torch.int64, device=chosen_T.device)
    torch.cumsum(chosen_T, 0, out=out[1:])
    return out

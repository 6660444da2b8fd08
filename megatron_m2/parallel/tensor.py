"""Tensor and sequence parallelism: weights split over ``mesh.tp``, tokens split over it between the products.

A column-split product takes gathered rows, a row-split product gives a sum that is scattered over the rows again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_m2.ops.dense import dense_linear
from megatron_m2.ops.linear_cross_entropy import (
    SoftmaxParts,
    combine_parts,
    linear_logprobs,
    linear_logprobs_and_entropy,
    softmax_parts,
)
from megatron_m2.parallel.collectives import gather_rows, scatter_sum_rows
from megatron_m2.parallel.layout import part
from megatron_m2.parallel.mesh import Axis
from megatron_m2.parallel.placement import placed

# Shape suffixes: T tokens, R those of this rank, H hidden, N predictions, V this rank's part of the vocabulary.


def split_linear(in_width: int, out_width: int, dim: int, bounds: tuple[int, int], replicas: str, dtype: torch.dtype, fp8: bool
                 ) -> nn.Linear:
    """A bias-free linear map of which this rank holds ``bounds`` of the outputs (dim 0) or of the inputs (dim 1)."""
    widths = [out_width, in_width]
    size, widths[dim] = widths[dim], bounds[1] - bounds[0]
    linear = dense_linear(widths[1], widths[0], dtype, fp8)
    placed(linear.weight, dim, bounds, size, replicas)
    return linear


class VocabEmbedding(nn.Embedding):
    """An embedding of which each tp rank holds a part of the vocabulary."""

    def __init__(self, vocab: int, hidden: int, axis: Axis, dtype: torch.dtype) -> None:
        self.axis, self.bounds = axis, part(vocab, axis.size, axis.rank)
        super().__init__(self.bounds[1] - self.bounds[0], hidden, dtype=dtype)
        placed(self.weight, 0, self.bounds, vocab, "heads")

    def embed(self, tokens_T: Tensor, rows: Sequence[int]) -> Tensor:
        """[R, H] of this rank's rows; ``tokens_T`` are those of all its tp ranks, ``rows`` of each."""
        if self.axis.size == 1:
            return self(tokens_T)
        place = tokens_T - self.bounds[0]
        here = (place >= 0) & (place < len(self.weight))
        partial = F.embedding(place.where(here, 0), self.weight) * here[:, None]
        return scatter_sum_rows(partial, self.axis, rows)


class VocabLinear(nn.Linear):
    """The head, of which each tp rank holds a part of the vocabulary."""

    def __init__(self, hidden: int, vocab: int, axis: Axis, dtype: torch.dtype) -> None:
        self.axis, self.bounds = axis, part(vocab, axis.size, axis.rank)
        super().__init__(hidden, self.bounds[1] - self.bounds[0], bias=False, dtype=dtype)
        placed(self.weight, 0, self.bounds, vocab, "heads")


def vocab_parallel_logprobs(hidden_TH: Tensor, weight_VH: Tensor, targets_N: Tensor, sources_N: Tensor, vocab_start: int, axis: Axis,
                            with_entropy: bool = False) -> tuple[Tensor, Tensor | None, slice]:
    """Log-probs of this rank's share of the targets, entropies if asked, and which of them that is.

    Args:
        hidden_TH: [T, H], the same on every rank of the axis; weight_VH: this rank's part of the vocabulary, from ``vocab_start``.
        targets_N, sources_N: int64 [N], the same on every rank: token ids, and the row that predicts each.
    """
    if axis.size == 1:
        if with_entropy:
            return *linear_logprobs_and_entropy(hidden_TH, weight_VH, targets_N, sources_N), slice(None)
        return linear_logprobs(hidden_TH, weight_VH, targets_N, sources_N), None, slice(None)
    mine = softmax_parts(hidden_TH, weight_VH, targets_N, sources_N=sources_N, vocab_start=vocab_start, with_mean=with_entropy)
    own = torch.stack([mine.target, mine.lse, *([mine.mean] if with_entropy else [])])
    every = gather_rows(own[None], axis, [1] * axis.size)  # [ranks, 2 or 3, N]
    whole = combine_parts([SoftmaxParts(each[0], each[1], each[2] if with_entropy else each.new_empty(0)) for each in every])
    share = slice(*part(len(targets_N), axis.size, axis.rank))
    return (whole.target - whole.lse)[share], (whole.lse - whole.mean)[share] if with_entropy else None, share

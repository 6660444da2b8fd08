"""What one forward runs over: tokens of a forest, and where a token finds the others that it needs.

The model asks a view wherever tokens meet: in attention, for a parent's state, and for what is predicted. This one is of a whole forest;
that of a piece, whose ancestors were computed before, is :class:`megatron_m2.training.open_path.PieceView`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Self

import torch
from torch import Tensor

from megatron_m2.forest import TokenForest
from megatron_m2.model.layers import Attend
from megatron_m2.ops.tree_attention import tree_attention
from megatron_m2.parallel.context import TokenShards, VisibleKeys
from megatron_m2.parallel.mesh import Mesh

# Shape suffixes: T tokens of the view, R those of this rank, N predictions.


@dataclass(frozen=True)
class ForestView:
    """Tokens at one prediction depth: all of them for the trunk; for the k-th MTP module those of depth >= k, which have an input there.

    Attributes:
        forest: the T tokens; of prediction depth k, k levels of roots are gone.
        shards: which rank owns each.
        index_T: int64 [T], the same tokens in the trunk's view. place_T: int64 [T], in vectors of the output.
        length: of these vectors.
        target_N: int64 [N], place in the output of each token that is predicted. id_N: its token id. source_N: int64 [N], the token
            of this view that predicts it.
    """

    forest: TokenForest
    shards: TokenShards
    index_T: Tensor
    place_T: Tensor
    length: int
    target_N: Tensor
    id_N: Tensor
    source_N: Tensor

    @classmethod
    def of(cls, forest: TokenForest, mesh: Mesh) -> ForestView:
        """The trunk's view of a whole forest."""
        every, (targets, sources) = torch.arange(len(forest), device=forest.device), forest.predictions()
        return cls(forest, TokenShards.split(forest.depth, mesh), every, every, len(forest), targets, forest.tokens[targets], sources)

    def further(self) -> tuple[Self, Tensor]:
        """The view one prediction depth on, and for each of its tokens the parent: int64, an index in this view."""
        forest, kept = self.forest.without_roots()
        predicts = self.forest.depth[self.source_N] > 0
        view = replace(self, forest=forest, shards=self.shards.keep(kept), index_T=self.index_T[kept], place_T=self.place_T[kept],
                       target_N=self.target_N[predicts], id_N=self.id_N[predicts],
                       source_N=torch.searchsorted(kept, self.source_N[predicts]))
        return view, self.forest.parent[kept].long()

    def fetch(self, x_RH: Tensor, source: Tensor, wanted: ForestView) -> Tensor:
        """For each token of this rank in ``wanted``, the row of this view's token ``source``."""
        return self.shards.fetch(x_RH, source, wanted.shards)

    def attend(self, layer: int) -> Attend:
        """How these tokens see others in one layer; decoder layers are counted first, then MTP modules."""
        return self._attend

    @cached_property
    def _attend(self) -> Attend:
        if self.shards.mesh.cp.size == 1:
            return partial(tree_attention, subtree_end_T=self.forest.subtree_end)
        return partial(VisibleKeys.of(self.forest.subtree_end, self.shards).attend, block=tree_attention)

"""The token forest: the one batch format of pre-training, SFT and RL.

Tokens of one or more trees lie in depth-first preorder. Token ``j`` is visible to token ``i`` exactly when
``j <= i < subtree_end[j]``, so one int32 per token is the whole attention mask: packed documents are a forest of chains, a plain
sequence is one chain, a group of answers to one prompt is a star. The prediction of token ``t`` comes from the hidden state of
``parent[t]``, which at a branch point predicts several children.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_m2.ops.forest import measure, merge


@dataclass(frozen=True)
class TokenForest:
    """T tokens of one or more trees in depth-first preorder.

    Attributes:
        tokens: int64 [T], token ids, each shared prefix stored once.
        parent: int32 [T], index of the token before it on its path; -1 for a root.
        depth: int32 [T], distance from its root, which is its position id.
        subtree_end: int32 [T], one past the last token that descends from it.
        weight: float32 [T], coefficient of ``-log p(token | path)`` in the loss; roots are never predicted, so theirs is 0.
        multiplicity: int32 [T] or None, how many samples pass through the token (None: one each). Expert loads count it.
        routes: int16 [T, layers, top_k] or None, the experts that each decoder layer is to use; a row of -1: it chooses.
    """

    tokens: Tensor
    parent: Tensor
    depth: Tensor
    subtree_end: Tensor
    weight: Tensor
    multiplicity: Tensor | None = None
    routes: Tensor | None = None

    def __len__(self) -> int:
        return self.tokens.numel()

    @property
    def device(self) -> torch.device:
        return self.tokens.device

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TokenForest:
        """The same forest on ``device``."""
        moved: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            moved[f.name] = None if value is None else value.to(device, non_blocking=non_blocking)
        return TokenForest(**moved)

    # ---- builders -------------------------------------------------------------------------------------------------------------

    @classmethod
    def from_parent(cls, tokens: Sequence[int] | np.ndarray, parent: Sequence[int] | np.ndarray,
                    weight: np.ndarray | None = None, multiplicity: np.ndarray | None = None) -> TokenForest:
        """Builds and validates a forest from each token's parent index (-1 for a root).

        Raises:
            ValueError: shapes differ, or the tokens are not in depth-first preorder.
        """
        tokens_np, parent_np = np.asarray(tokens, dtype=np.int64), np.ascontiguousarray(parent, dtype=np.int32)
        if tokens_np.ndim != 1 or parent_np.shape != tokens_np.shape:
            raise ValueError(f"parent: shape {parent_np.shape}, but tokens has {tokens_np.shape}; both must be [T]")
        depth, subtree_end = measure(parent_np)
        if weight is None:
            weight = (parent_np >= 0).astype(np.float32)
        forest = cls(torch.from_numpy(tokens_np), torch.from_numpy(parent_np), torch.from_numpy(depth), torch.from_numpy(subtree_end),
                     torch.from_numpy(np.asarray(weight, dtype=np.float32)),
                     None if multiplicity is None else torch.from_numpy(np.asarray(multiplicity, dtype=np.int32)))
        forest.validate()
        return forest

    @classmethod
    def from_documents(cls, documents: Sequence[Sequence[int] | np.ndarray]) -> TokenForest:
        """Packs documents side by side: a forest of chains, every token but each document's first weighs 1.

        Raises:
            ValueError: no document, or an empty one.
        """
        arrays = [np.asarray(d, dtype=np.int64) for d in documents]
        lengths = np.array([len(a) for a in arrays], dtype=np.int32)
        if len(arrays) == 0 or lengths.min() == 0:
            raise ValueError(f"documents: need at least one, none empty; got lengths {lengths.tolist()[:8]}")
        ends = np.cumsum(lengths, dtype=np.int32)
        starts = ends - lengths
        index = np.arange(ends[-1], dtype=np.int32)
        depth = index - np.repeat(starts, lengths)
        parent = np.where(depth == 0, np.int32(-1), index - 1).astype(np.int32)
        return cls(torch.from_numpy(np.concatenate(arrays)), torch.from_numpy(parent), torch.from_numpy(depth),
                   torch.from_numpy(np.repeat(ends, lengths)), torch.from_numpy((depth > 0).astype(np.float32)))

    @classmethod
    def from_samples(cls, samples: Sequence[Sequence[int] | np.ndarray], weights: Sequence[Sequence[float] | np.ndarray] | None = None
                     ) -> TokenForest:
        """Merges samples that share prefixes: each shared prefix is stored once. See :func:`merge_samples`."""
        return merge_samples(samples, weights)[0]

    # ---- views ----------------------------------------------------------------------------------------------------------------

    def without_roots(self) -> tuple[TokenForest, Tensor]:
        """The forest one level up: roots removed, their children become roots.

        This is what a multi-token-prediction module runs on: module k has an input only for tokens of depth >= k, and its positions
        are ``depth - k``. It has no routes: these are of the decoder layers. In a piece of a forest a token with a depth but no parent
        there is none of its roots.

        Returns:
            The smaller forest [T'] and int64 [T'], the index in this forest of each token kept.
        """
        keep = self.depth > 0
        kept = keep.nonzero().squeeze(1)
        # before[t] = number of kept tokens in front of t, for t in [0, T]
        before = torch.zeros(len(self) + 1, dtype=torch.int32, device=self.device)
        torch.cumsum(keep, 0, dtype=torch.int32, out=before[1:])
        old_parent = self.parent[kept].long()
        parent = torch.where((old_parent >= 0) & keep[old_parent], before[old_parent], -1)
        return TokenForest(self.tokens[kept], parent, self.depth[kept] - 1, before[self.subtree_end[kept].long()],
                           torch.where(parent >= 0, self.weight[kept], 0.0),
                           None if self.multiplicity is None else self.multiplicity[kept]), kept

    def predictions(self) -> tuple[Tensor, Tensor]:
        """What the loss needs: int64 [N] indices of the tokens with a weight, and int64 [N] their parents, which predict them."""
        targets = ((self.weight != 0) & (self.parent >= 0)).nonzero().squeeze(1)
        return targets, self.parent[targets].long()

    def validate(self) -> None:
        """Checks dtypes, shapes and that this is a forest in depth-first preorder.

        Raises:
            ValueError: naming the field and the first token at fault.
        """
        want = {"tokens": torch.int64, "parent": torch.int32, "depth": torch.int32, "subtree_end": torch.int32, "weight": torch.float32,
                "multiplicity": torch.int32}
        for name, dtype in want.items():
            value = getattr(self, name)
            if value is None and name == "multiplicity":
                continue
            if value.dtype != dtype or value.shape != self.tokens.shape or value.device != self.device:
                raise ValueError(f"{name}: {value.dtype} {list(value.shape)} on {value.device}, need {dtype} [{len(self)}] "
                                 f"on {self.device}")
        if self.routes is not None and (self.routes.dtype != torch.int16 or self.routes.dim() != 3 or len(self.routes) != len(self)):
            raise ValueError(f"routes: {self.routes.dtype} {list(self.routes.shape)}, need torch.int16 [{len(self)}, layers, top_k]")
        if len(self) == 0:
            raise ValueError("tokens: an empty forest")
        parent, depth, end = (x.cpu().numpy().astype(np.int64) for x in (self.parent, self.depth, self.subtree_end))
        index = np.arange(len(self))
        root = parent < 0
        up = np.where(root, 0, parent)
        _refuse("parent", parent, (parent < -1) | (parent >= index))
        _refuse("depth", depth, depth != np.where(root, 0, depth[up] + 1))
        _refuse("subtree_end", end, (end <= index) | (end > np.where(root, len(self), end[up])))
        # Nested intervals make every ancestor cover its descendants; preorder means that nothing else does.
        covering = np.cumsum(np.bincount(index, minlength=len(self) + 1) - np.bincount(end, minlength=len(self) + 1))[:-1]
        _refuse("subtree_end", end, covering != depth + 1)
        _refuse("weight", self.weight.cpu().numpy(), root & (self.weight.cpu().numpy() != 0), "a root is never predicted, its weight is 0")


def _refuse(field: str, values: np.ndarray, wrong: np.ndarray, why: str = "not a forest in depth-first preorder") -> None:
    if wrong.any():
        t = int(np.flatnonzero(wrong)[0])
        raise ValueError(f"{field}[{t}] = {values[t]}: {why}")


def merge_samples(samples: Sequence[Sequence[int] | np.ndarray], weights: Sequence[Sequence[float] | np.ndarray] | None = None
                  ) -> tuple[TokenForest, list[np.ndarray]]:
    """Merges samples into the forest of their distinct prefixes.

    Args:
        samples: token ids of each sample.
        weights: per token of each sample (default 1); a token shared by several samples gets the sum, which is exact for every loss
            that is linear in the log-probabilities. The first token of a sample is never predicted: its weight is ignored.

    Returns:
        The forest, whose ``multiplicity`` counts the samples through each token, and per sample the int64 forest index of its tokens.

    Raises:
        ValueError: no samples, an empty one, or weights of other lengths.
    """
    lengths = np.array([len(sample) for sample in samples], dtype=np.int64)
    if weights is not None:
        if len(weights) != len(samples):
            raise ValueError(f"weights: {len(weights)} samples, need {len(samples)}")
        for s, (mine, length) in enumerate(zip(weights, lengths, strict=True)):
            if len(mine) != length:
                raise ValueError(f"weights[{s}]: {len(mine)} values for {length} tokens")
    forest, index = merge_flat(_back_to_back(samples, np.int64), lengths, None if weights is None else _back_to_back(weights, np.float32))
    ends = np.cumsum(lengths)
    return forest, [index[start:end] for start, end in zip((ends - lengths).tolist(), ends.tolist(), strict=True)]


def merge_flat(tokens: np.ndarray, lengths: np.ndarray, weights: np.ndarray | None = None) -> tuple[TokenForest, np.ndarray]:
    """:func:`merge_samples` of samples laid back to back, which is how fast it gets.

    Args:
        tokens: int64 [N]; lengths: int64 [S], of each sample; weights: float32 [N], default 1.

    Returns:
        The forest, and the int64 [N] forest index of each token.

    Raises:
        ValueError: no samples, an empty one, or lengths or weights that do not fit the tokens.
    """
    merged = merge(tokens, lengths, weights)
    return TokenForest(*map(torch.from_numpy, merged[:-1])), merged.place


def _back_to_back(parts: Sequence[Sequence[float] | np.ndarray], dtype: type[np.generic]) -> np.ndarray:
    return np.concatenate([np.asarray(p, dtype=dtype) for p in parts]) if len(parts) else np.empty(0, dtype=dtype)

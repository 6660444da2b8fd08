"""What a piece of a forest sees of its ancestors: rows kept in stacks along the open path, which take the gradients for them too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Self

import torch
from torch import Tensor

from megatron_m2.model.config import ModelConfig
from megatron_m2.model.layers import Attend
from megatron_m2.model.view import ForestView
from megatron_m2.ops.tree_attention import tree_attention
from megatron_m2.parallel.data import accumulation_dtype
from megatron_m2.training.pieces import Piece

# Shape suffixes: T tokens of a piece, M those of them that are kept, P tokens of its path.


class KeptRows:
    """One row of something (a layer's key, say) for each kept token, from the root on, and the gradients of these rows so far.

    All is in two buffers. A piece at work has its own rows behind those of its path, so that joining them copies no path; what it keeps
    is then moved together, and is the top of the stack. Gradients are summed in fp32 (fp64 for fp64).

    Args:
        capacity: rows of a path and a piece. gradient_capacity: rows kept at a time.

    Attributes:
        length: rows that are kept.
    """

    def __init__(self, capacity: int, gradient_capacity: int) -> None:
        self.capacity, self.gradient_capacity, self.length = capacity, gradient_capacity, 0
        self._rows: Tensor | None = None
        self._gradients: Tensor | None = None

    @property
    def has_gradients(self) -> bool:
        """Whether a backward has come by."""
        return self._gradients is not None

    def join(self, own_T: Tensor, kept_M: Tensor) -> Tensor:
        """[P + T, ...]: the rows of the path and those of a piece, [T, ...], until the next ones are joined.

        In the backward the path's rows add up their gradients here, and the rows ``kept_M`` of the piece get what has been added up for
        them since :meth:`keep`.
        """
        joined: Tensor = _Join.apply(own_T, self, kept_M)
        return joined

    def keep(self, kept_M: Tensor) -> None:
        """Of the piece's rows joined last, these (ascending) stay."""
        assert self._rows is not None
        top = slice(self.length, self.length + len(kept_M))
        self._rows[top] = self._rows[self.length :].index_select(0, kept_M)
        if self._gradients is not None:
            self._gradients[top] = 0
        self.length = top.stop

    def drop(self, count: int) -> None:
        """Takes the last rows off the stack; their gradients are there until others are kept."""
        self.length -= count

    def write(self, own_T: Tensor) -> Tensor:
        """The forward of :meth:`join`."""
        if self._rows is None:
            self._rows = own_T.new_empty(self.capacity, *own_T.shape[1:])
        end = self.length + len(own_T)
        self._rows[self.length : end] = own_T
        return self._rows[:end]

    def take(self, d_joined: Tensor, path: int, kept_M: Tensor) -> Tensor:
        """The backward of :meth:`join` to ``path`` rows: the gradient of the piece's own."""
        if path:
            if self._gradients is None:
                self._gradients = torch.zeros(self.gradient_capacity, *d_joined.shape[1:], dtype=accumulation_dtype(d_joined.dtype),
                                              device=d_joined.device)
            self._gradients[:path] += d_joined[:path]
        d_own_T = d_joined[path:]
        if self._gradients is None or len(kept_M) == 0:
            return d_own_T
        found_M = self._gradients[path : path + len(kept_M)] + d_own_T.index_select(0, kept_M)
        return d_own_T.index_copy(0, kept_M, found_M.to(d_own_T.dtype))


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own_T: Tensor, rows: KeptRows, kept_M: Tensor) -> Tensor:
        ctx.rows, ctx.path, ctx.kept_M = rows, rows.length, kept_M
        return rows.write(own_T)

    @staticmethod
    def backward(ctx: Any, d_joined: Tensor) -> tuple[Tensor, None, None]:
        return ctx.rows.take(d_joined, ctx.path, ctx.kept_M), None, None


class OpenPath:
    """All that is kept.

    Attributes:
        keys, values: by layer, decoder layers first, then those of MTP modules; a row for each unfinished token.
        states: by the MTP module that reads them: of its input; a row for each piece, of its last unfinished token, the only one whose
            children are yet to come.
    """

    def __init__(self, config: ModelConfig, pieces: Sequence[Piece]) -> None:
        layers = config.num_hidden_layers + config.num_mtp_modules
        tokens = max(p.depth + len(p) for p in pieces), max(p.depth + len(p.kept) for p in pieces)
        states = max(p.nesting + len(p) for p in pieces), max(p.nesting + 1 for p in pieces)
        self.keys, self.values = ([KeptRows(*tokens) for _ in range(layers)] for _ in range(2))
        self.states = [KeptRows(*states) for _ in range(config.num_mtp_modules)]


@dataclass(frozen=True)
class PieceView(ForestView):
    """A piece as the model sees it: its tokens, of which the first ones' parent is the last token of its path.

    ``forest`` has them alone, with true depths.

    Attributes:
        path: what earlier pieces keep. above: how many tokens the path has at this prediction depth, which is ``level``.
        kept_M: int64 [M], the tokens that later pieces descend from.
        joined: rows that this piece was joined to, and which of its own are to be kept there.
    """

    path: OpenPath
    above: int
    level: int
    kept_M: Tensor
    joined: list[tuple[KeptRows, Tensor]]

    def further(self) -> tuple[Self, Tensor]:
        view, parent = super().further()
        stay = self.kept_M[self.forest.depth[self.kept_M] > 0]
        kept_M = torch.searchsorted(view.index_T, self.index_T[stay])
        return replace(view, above=max(0, self.above - 1), level=self.level + 1, kept_M=kept_M), parent

    def fetch(self, x_RH: Tensor, source: Tensor, wanted: ForestView) -> Tensor:
        rows = self.path.states[self.level]
        return self._join(rows, x_RH, self.kept_M[-1:]).index_select(0, source + rows.length)  # the path's last is one before the first

    def attend(self, layer: int) -> Attend:
        return partial(self._attend_path, self.path.keys[layer], self.path.values[layer])

    def _attend_path(self, keys: KeptRows, values: KeptRows, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert keys.length == self.above
        return tree_attention(q, self._join(keys, k, self.kept_M), self._join(values, v, self.kept_M), self._ends, self.above)

    def _join(self, rows: KeptRows, own_T: Tensor, kept_M: Tensor) -> Tensor:
        self.joined.append((rows, kept_M))
        return rows.join(own_T, kept_M)

    @cached_property
    def _ends(self) -> Tensor:
        """int32 [P + T], ``subtree_end`` of path and piece together: every token of the piece sees the whole path."""
        own = self.forest.subtree_end + self.above
        return torch.cat([own.new_full((self.above,), self.above + len(own)), own])

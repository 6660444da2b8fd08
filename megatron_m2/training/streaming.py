"""Training on a token forest of any size in the memory of one piece and one path, and exactly so.

Pieces (:mod:`megatron_m2.training.pieces`) run depth first. A piece from which others descend runs forward without gradients and leaves
what they need: the keys and values of its unfinished tokens in every layer, and the last one's states, which MTP modules read. When all
of them are done it runs again with gradients, and one backward takes its own loss and what they found of the gradients of its rows. So
a token passes the model forward twice at most, and what is kept is never more than one path from a root.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from megatron_m2.forest import TokenForest
from megatron_m2.model.m2 import NOTHING_ELSE, Asked, M2Model, M2Output
from megatron_m2.parallel.context import TokenShards
from megatron_m2.training.open_path import KeptRows, OpenPath, PieceView
from megatron_m2.training.pieces import Piece, cut, lightest_first

Joined = list[tuple[KeptRows, Tensor]]


def stream(model: M2Model, forest: TokenForest, objective: Callable[[int, M2Output], Tensor], microbatch: int, piece_tokens: int,
           before_backward: Callable[[bool], None] = lambda last: None, asked: Asked = NOTHING_ELSE) -> Tensor:
    """Forward and backward of one forest; gradients and expert counts are those of the whole, up to rounding.

    Args:
        objective: what to differentiate is its sum over the pieces. It is called once for each, always with the same ``microbatch``.
            Vectors of the output are as long as the whole forest, with zeros for what other pieces predict; ``predicted`` names what
            this piece predicts; ``hidden_states`` are of the piece's tokens.
        piece_tokens: so many tokens run at a time, at most.
        before_backward: called before every backward with whether it is the forest's last, by which its gradients are complete.

    Returns:
        Expert counts, int64 [layers + MTP, E].

    Raises:
        ValueError: the model is not whole on this rank, or has a balance loss, which is no sum over tokens; piece_tokens below 1; a
            forest that does not fit the model.
    """
    refuse(model)
    model.check(forest)
    return _Stream(model, forest, objective, microbatch, piece_tokens, before_backward, asked).run()


def refuse(model: M2Model) -> None:
    """Raises ValueError for a model that does not train in pieces."""
    mesh, coefficient = model.mesh, model.config.router_aux_loss_coef
    for name, size in (("pp", mesh.pp.size), ("cp", mesh.cp.size), ("tp", mesh.tp.size), ("ep", mesh.ep.size)):
        if size > 1:
            raise ValueError(f"parallel.{name} = {size}: a forest is trained in pieces where the whole model is on one rank; nearest is 1")
    if coefficient > 0:
        raise ValueError(f"model.router_aux_loss_coef = {coefficient}: the balance loss of a forest is not the sum of its pieces'; "
                         "nearest is 0")


class _Stream:
    """One forest on its way through the model. Arguments: :func:`stream`."""

    def __init__(self, model: M2Model, forest: TokenForest, objective: Callable[[int, M2Output], Tensor], microbatch: int,
                 piece_tokens: int, before_backward: Callable[[bool], None], asked: Asked) -> None:
        self.model, self.objective, self.microbatch, self.before_backward, self.asked = model, objective, microbatch, before_backward, asked
        self.forest, self.places = lightest_first(forest)
        self.pieces = cut(self.forest, piece_tokens)
        self.path = OpenPath(model.config, self.pieces)
        targets, sources = self.forest.predictions()
        by_source = sources.argsort(stable=True)
        self.targets, self.sources = targets[by_source], sources[by_source]
        self.counts = torch.zeros(len(model.counted_layers), model.config.num_experts, dtype=torch.int64, device=forest.device)
        self.trained = 0

    def run(self) -> Tensor:
        waiting: list[tuple[Piece, Joined]] = []  # for the pieces that descend from them
        for piece in self.pieces:
            while len(waiting) > piece.nesting:
                self._train(*waiting.pop())
            if len(piece.kept):
                waiting.append((piece, self._lay(piece)))
            else:
                self._train(piece, [])
        while waiting:
            self._train(*waiting.pop())
        return self.counts

    @torch.no_grad()
    def _lay(self, piece: Piece) -> Joined:
        """Leaves what others need of a piece: returns where, and which of its rows."""
        view, nothing = self._view(piece), self.places[:0]
        self.model.over(replace(view, target_N=nothing, id_N=nothing, source_N=nothing))
        for rows, kept_M in view.joined:
            rows.keep(kept_M)
        return view.joined

    def _train(self, piece: Piece, left: Joined) -> None:
        """Forward and backward of a piece; ``left`` is what it left."""
        for rows, kept_M in left:
            rows.drop(len(kept_M))
        output = self.model.over(self._view(piece), None, self.asked)
        assert isinstance(output, M2Output)
        self.counts += output.expert_counts
        loss = self.objective(self.microbatch, output)
        roots = [(loss, torch.ones_like(loss))]
        if left:
            roots += [(x, torch.zeros_like(x)) for x in self._tops(output)]
        roots = [(x, gradient) for x, gradient in roots if x.requires_grad]
        self.trained += 1
        self.before_backward(self.trained == len(self.pieces))
        if roots:
            torch.autograd.backward([x for x, _ in roots], [gradient for _, gradient in roots])

    def _tops(self, output: M2Output) -> list[Tensor]:
        """Where a backward must start, too, to pass all layers in which gradients were found, whatever the loss is of."""
        first = self.model.config.num_hidden_layers
        tops = [output.logprobs, *(output.mtp_logprobs or (draft.kl for draft in output.drafts))]
        return [x for x, keys in zip(tops, self.path.keys[first - 1 :], strict=True) if keys.has_gradients]

    def _view(self, piece: Piece) -> PieceView:
        """What the model sees of a piece, and what it predicts: all children of its tokens, those in later pieces too."""
        tokens, forest = slice(piece.start, piece.stop), self.forest
        values = {name: value[tokens] for name, value in vars(forest).items() if value is not None}
        values["parent"] = torch.where(values["parent"] < piece.start, -1, values["parent"] - piece.start)
        values["subtree_end"] = values["subtree_end"].clamp_max(piece.stop) - piece.start
        own = TokenForest(**values)
        bounds = torch.tensor([piece.start, piece.stop], device=forest.device)
        predicted = slice(*torch.searchsorted(self.sources, bounds).tolist())
        targets, sources = self.targets[predicted], self.sources[predicted] - piece.start
        every = torch.arange(len(own), device=forest.device)
        kept_M = torch.from_numpy(piece.kept).to(forest.device)
        return PieceView(own, TokenShards.split(own.depth, self.model.mesh), every, self.places[tokens], len(forest), self.places[targets],
                         forest.tokens[targets], sources, self.path, piece.depth, 0, kept_M, [])

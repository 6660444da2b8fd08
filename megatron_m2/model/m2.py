"""The whole model: embedding, decoder layers, final norm, untied head, and multi-token-prediction (MTP) modules, on a token forest."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_m2.forest import TokenForest
from megatron_m2.model.config import ModelConfig
from megatron_m2.model.layers import Attend, DecoderLayer, MoE, RMSNorm, Router, RouterStats, Tokens
from megatron_m2.model.view import ForestView
from megatron_m2.ops.norm_rope import Rotary, rotary_angles
from megatron_m2.ops.weight_grad import Linear
from megatron_m2.parallel.collectives import gather_rows
from megatron_m2.parallel.draft import Draft, draft_loss
from megatron_m2.parallel.mesh import ONE, Mesh
from megatron_m2.parallel.pipeline import Span
from megatron_m2.parallel.placement import placement_of, shared_by
from megatron_m2.parallel.tensor import VocabEmbedding, VocabLinear, vocab_parallel_logprobs

# Shape suffixes: T tokens of the forest, R those of this rank, C of its tp ranks together (all three the same on a mesh of ones),
# H hidden, E experts, L layers (main ones first, then MTP), K experts per token.

Predict = Callable[[Tensor, ForestView], None]  # an MTP module's states and whose they are


@dataclass
class StageOutput:
    """What a part of the model returns. On a mesh, this rank's share: summed over the ranks that share the forest it is the whole.

    Attributes:
        hidden_states: [R, H] of this rank's tokens, to be given to the next part; after the final norm in :class:`M2Output`.
        expert_counts: int64 [this part's layers and MTP modules, E], choices of each expert, times ``forest.multiplicity`` where given.
        aux_loss: fp32 scalar, balance loss times its coefficient, summed over these layers (0 when the coefficient is 0).
    """

    hidden_states: Tensor
    expert_counts: Tensor
    aux_loss: Tensor


@dataclass
class M2Output(StageOutput):
    """What the whole model, or its last part, returns.

    Attributes:
        logprobs: fp32 [T], ``log p(tokens[t] | path to parent[t])`` of every token with a weight, 0 elsewhere. Fp64 in an fp64 model.
        predicted: int64, the weighted tokens whose log-probs are this rank's.
        mtp_logprobs: per MTP module k = 1..K the same [T]: the log-probability of token t seen k tokens further back than usual,
            for tokens of depth > k.
        entropy: fp32 [T], of the distribution that each weighted token was predicted with, in nats; no gradient. None: not asked.
        drafts: per MTP module, instead of ``mtp_logprobs``; empty: not asked.
    """

    logprobs: Tensor
    predicted: Tensor
    mtp_logprobs: tuple[Tensor, ...]
    entropy: Tensor | None = None
    drafts: tuple[Draft, ...] = ()


@dataclass(frozen=True)
class Asked:
    """What a forward gives beside the log-probs of the main head.

    Attributes:
        entropy: of its predictions.
        draft_top_k: 0: MTP modules predict tokens, and train the trunk with it. Above: they learn what the main head predicts of its
            most probable tokens (:func:`megatron_m2.parallel.draft.draft_loss`), and train themselves alone.
    """

    entropy: bool = False
    draft_top_k: int = 0


NOTHING_ELSE = Asked()


class MTPModule(nn.Module):
    """One more prediction depth (DeepSeek-V3 section 2.2): projects [embedding; previous hidden] and runs one decoder layer.

    Embedding and head are the main model's. The key layout follows MiniMax-M3's released module.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, mesh: Mesh) -> None:
        super().__init__()
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size, dtype)
        self.layer = DecoderLayer(config, dtype, mesh)
        self.final_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)

    def forward(self, embedding_RH: Tensor, previous_RH: Tensor, tokens: Tokens) -> tuple[Tensor, RouterStats]:
        joined = self.eh_proj(torch.cat([self.enorm(embedding_RH), self.hnorm(previous_RH)], dim=-1))
        return self.layer(joined, tokens)


class M2Model(nn.Module):
    """MiniMax-M2, or one pipeline stage of it, as a function of a token forest.

    The first stage has the embedding; the last one final norm, head and MTP modules, and for these a copy of the embedding, which both
    stages train as one (``mesh.embedding``). Names of weights are those of the whole model on every stage.

    Args:
        config: shape of the whole model.
        dtype: of weights and compute; the router stays fp32 (fp64 in an fp64 model).
        mesh: this rank's place; it holds its part of the weights, :func:`megatron_m2.parallel.placement.placement_of` says which.
        recompute: keep only each layer's input for the backward, which runs the layer again.
        span: the stage's layers; all of them by default.
        embed_tokens: the first stage's embedding, where this rank has that stage too.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.float32, mesh: Mesh = ONE, recompute: bool = False,
                 span: Span | None = None, embed_tokens: VocabEmbedding | None = None) -> None:
        super().__init__()
        self.config, self.mesh, self.recompute = config, mesh, recompute
        self.span = span or Span(0, config.num_hidden_layers)
        num_mtp = config.num_mtp_modules if self.span.last else 0
        if self.span.first or num_mtp:
            self.embed_tokens = embed_tokens or VocabEmbedding(config.vocab_size, config.hidden_size, mesh.tp, dtype)
            if config.num_mtp_modules:
                shared_by(self.embed_tokens, "embedding")
        # other stages' layers keep their places, so that names count through
        self.layers = nn.ModuleList(DecoderLayer(config, dtype, mesh) if self.span.start <= i < self.span.stop else nn.Identity()
                                    for i in range(config.num_hidden_layers))
        if self.span.last:
            self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
            self.lm_head = VocabLinear(config.hidden_size, config.vocab_size, mesh.tp, dtype)
        self.mtp = nn.ModuleList(MTPModule(config, dtype, mesh) for _ in range(num_mtp))

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and compute, the router apart, which no stage begins with."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def counted_layers(self) -> list[int]:
        """Which row of the whole model's ``expert_counts`` each of this part's rows is: decoder layers, then MTP modules."""
        mtp = range(self.config.num_hidden_layers, self.config.num_hidden_layers + len(self.mtp))
        return [*range(self.span.start, self.span.stop), *mtp]

    def init_weights(self, seed: int) -> None:
        """Normal of ``initializer_range``; what writes into the residual stream is smaller by sqrt(2 layers), norms are 1, biases 0.

        Each weight is drawn from (seed, its name) alone, so that every layout of ranks starts from the same model.
        """
        std = self.config.initializer_range
        residual_std = std / math.sqrt(2 * self.config.num_hidden_layers)
        for name, p in self.named_parameters():
            if p.dim() == 1:
                nn.init.ones_(p)
                continue
            placement = placement_of(p)
            whole = p.new_empty(placement.whole_shape(tuple(p.shape)))
            digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=7).digest()
            generator = torch.Generator(device=p.device).manual_seed(int.from_bytes(digest))
            nn.init.normal_(whole, std=residual_std if name.endswith(("o_proj.weight", "down_proj")) else std, generator=generator)
            with torch.no_grad():
                p.copy_(placement.of(whole))
        for router in self.routers():
            router.bias.zero_()

    def moe_layers(self) -> list[MoE]:
        """Of the decoder layers, then of the MTP modules: the rows of ``M2Output.expert_counts``."""
        return [m for m in self.modules() if isinstance(m, MoE)]

    def routers(self) -> list[Router]:
        """The same order as :meth:`moe_layers`."""
        return [m.router for m in self.moe_layers()]

    # ---- mathematics ----------------------------------------------------------------------------------------------------------

    def forward(self, forest: TokenForest, x_RH: Tensor | None = None, asked: Asked = NOTHING_ELSE) -> StageOutput:
        """Log-probabilities of the forest's weighted tokens and what training needs beside them: see :class:`M2Output`.

        Args:
            x_RH: what the stage before returned as ``hidden_states``; for the first stage nothing.

        Returns:
            An :class:`M2Output`, or a :class:`StageOutput` of a stage that is not the last.

        Raises:
            ValueError: a token id outside the vocabulary, or a path longer than ``max_position_embeddings``.
        """
        if self.span.first or len(self.mtp):
            self.check(forest)
        return self.over(ForestView.of(forest, self.mesh), x_RH, asked)

    def over(self, view: ForestView, x_RH: Tensor | None = None, asked: Asked = NOTHING_ELSE) -> StageOutput:
        """:meth:`forward` over the tokens of a view, not checked: ``hidden_states`` are theirs, other vectors have the view's length."""
        embedding_RH = None
        if self.span.first or len(self.mtp):
            embedding_RH = self.embed_tokens.embed(view.shards.of_cp(view.forest.tokens), view.shards.rows)
        x_RH = embedding_RH if self.span.first else x_RH
        assert x_RH is not None
        attends = [view.attend(layer) for layer in range(self.span.start, self.span.stop)]
        routes_RLK = None if view.forest.routes is None else view.shards.mine(view.forest.routes)
        trunk_RH, stats = self._layers(x_RH, self._tokens(view, self.span.start), attends, routes_RLK)
        if not self.span.last:
            return StageOutput(trunk_RH, *self._sum_up(stats, view.forest))
        hidden_RH = self.norm(trunk_RH)
        logprobs, predicted, entropy = self._logprobs(hidden_RH, view, asked.entropy)
        mtp_logprobs: list[Tensor] = []
        drafts: list[Draft] = []
        if len(self.mtp):
            assert embedding_RH is not None
            alone = asked.draft_top_k > 0
            embedding_RH, trunk_RH = (embedding_RH.detach(), trunk_RH.detach()) if alone else (embedding_RH, trunk_RH)

            def predict(state_RH: Tensor, further: ForestView) -> None:
                if alone:
                    teacher_RH = hidden_RH.detach().index_select(0, view.shards.place(further.shards.mine(further.index_T)))
                    drafts.append(self._draft(state_RH, teacher_RH, further, asked.draft_top_k))
                else:
                    mtp_logprobs.append(self._logprobs(state_RH, further)[0])

            stats += self._predict_further(view, embedding_RH, trunk_RH, predict)
        return M2Output(hidden_RH, *self._sum_up(stats, view.forest), logprobs, predicted, tuple(mtp_logprobs), entropy, tuple(drafts))

    def _predict_further(self, trunk: ForestView, embedding_RH: Tensor, trunk_RH: Tensor, predict: Predict) -> list[RouterStats]:
        """The MTP modules, one after the other: routing of each."""
        stats, view, previous_RH = [], trunk, trunk_RH
        for layer, module in enumerate(cast(Sequence[MTPModule], self.mtp), start=self.config.num_hidden_layers):
            above = view
            view, parent = above.further()
            parent_RH = above.fetch(previous_RH, parent, view)
            if len(view.forest) == 0 and self.mesh.alone:  # on a mesh the rank must keep step with the others
                predict(parent_RH, view)
                stats.append(RouterStats(torch.zeros(self.config.num_experts, dtype=torch.int64, device=view.forest.device), None))
                previous_RH = parent_RH
                continue
            embedding = embedding_RH.index_select(0, trunk.shards.place(view.shards.mine(view.index_T)))
            previous_RH, s = self._run(module, embedding, parent_RH, self._tokens(view, layer))
            stats.append(s)
            predict(module.final_layernorm(previous_RH), view)
        return stats

    def _sum_up(self, stats: Sequence[RouterStats], forest: TokenForest) -> tuple[Tensor, Tensor]:
        """Counts [layers, E] and the balance loss."""
        aux = [s.aux_loss for s in stats if s.aux_loss is not None]
        aux_loss = self.config.router_aux_loss_coef * torch.stack(aux).sum() if aux else torch.zeros((), device=forest.device)
        counts = [s.counts_E for s in stats] or [torch.zeros(0, self.config.num_experts, dtype=torch.int64, device=forest.device)]
        return torch.stack(counts) if stats else counts[0], aux_loss

    def trunk(self, embedding_TH: Tensor, position_T: Tensor, attends: Sequence[Attend]) -> tuple[Tensor, list[RouterStats]]:
        """The decoder layers of a mesh of ones, each with its own way to attend: [T, H] before the final norm, and each one's routing."""
        return self._layers(embedding_TH, Tokens(self._rotary(position_T), attends[0], None, (len(embedding_TH),)), attends)

    def _layers(self, x_RH: Tensor, tokens: Tokens, attends: Sequence[Attend], routes_RLK: Tensor | None = None
                ) -> tuple[Tensor, list[RouterStats]]:
        stats = []
        for number, attend in zip(range(self.span.start, self.span.stop), attends, strict=True):
            routes = None if routes_RLK is None else routes_RLK[:, number]
            x_RH, s = self._run(self.layers[number], x_RH, replace(tokens, attend=attend, routes_TK=routes))
            stats.append(s)
        return x_RH, stats

    def _run(self, layer: nn.Module, *arguments: object) -> tuple[Tensor, RouterStats]:
        run = partial(checkpoint, layer, use_reentrant=False) if self.recompute and torch.is_grad_enabled() else layer
        result: tuple[Tensor, RouterStats] = run(*arguments)
        return result

    def head(self, hidden_TH: Tensor) -> Tensor:
        """Logits [T, vocab] of hidden states after the final norm, fp32 (fp64 in an fp64 model), on a mesh of ones."""
        hidden, weight = self._head_operands(hidden_TH)
        logits = F.linear(hidden, weight)
        return logits if logits.dtype == torch.float64 else logits.float()

    def _head_operands(self, hidden_TH: Tensor) -> tuple[Tensor, Tensor]:
        if self.config.fp32_head and self.dtype != torch.float64:
            return hidden_TH.float(), self.lm_head.weight.float()
        return hidden_TH, self.lm_head.weight

    def _logprobs(self, hidden_RH: Tensor, view: ForestView, with_entropy: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
        """[view.length] log-probs of what the view predicts, at their places; these places; and the same of the entropies of their
        distributions.

        A rank predicts the children of the tokens that it owns with its tp neighbours, and of those its share.
        """
        places, ids, sources = view.target_N, view.id_N, view.source_N
        if self.mesh.cp.size > 1:
            owned = view.shards.owned_by_cp(sources)
            places, ids, sources = places[owned], ids[owned], view.shards.place_in_cp(sources[owned])
        hidden, weight = self._head_operands(gather_rows(hidden_RH, self.mesh.tp, view.shards.rows))
        logprobs, entropy, share = vocab_parallel_logprobs(hidden, weight, ids, sources, self.lm_head.bounds[0], self.mesh.tp, with_entropy)
        places = places[share]
        return (_scattered(logprobs, places, view.length), places,
                None if entropy is None else _scattered(entropy.detach(), places, view.length))

    def _draft(self, state_RH: Tensor, teacher_RH: Tensor, view: ForestView, top_k: int) -> Draft:
        """What an MTP module makes of each token that predicts others, [view.length] each; shares as in :meth:`_logprobs`."""
        sources = view.source_N.unique()
        rows = sources
        if self.mesh.cp.size > 1:
            sources = sources[view.shards.owned_by_cp(sources)]
            rows = view.shards.place_in_cp(sources)
        operands = [self._head_operands(gather_rows(x, self.mesh.tp, view.shards.rows)) for x in (state_RH, teacher_RH)]
        (student, weight), (teacher, _) = operands
        draft, share = draft_loss(student.index_select(0, rows), teacher.index_select(0, rows), weight.detach(), top_k,
                                  self.lm_head.bounds[0], self.mesh.tp)
        places = view.place_T[sources[share]]
        return Draft(*(_scattered(x, places, view.length) for x in draft))

    def _tokens(self, view: ForestView, layer: int) -> Tokens:
        forest, shards = view.forest, view.shards
        multiplicity = None if forest.multiplicity is None else shards.mine(forest.multiplicity)
        return Tokens(self._rotary(shards.of_cp(forest.depth)), view.attend(layer), multiplicity, shards.rows)

    def _rotary(self, position_C: Tensor) -> Rotary:
        return rotary_angles(position_C, self.config.rotary_dim, self.config.rope_theta, self.dtype)

    def check(self, forest: TokenForest) -> None:
        """Raises ValueError for a token or a position that the model does not have."""
        if forest.device.type == "meta":
            return
        low, high = (int(x) for x in torch.aminmax(forest.tokens))
        if low < 0 or high >= self.config.vocab_size:
            raise ValueError(f"forest.tokens: id {low if low < 0 else high} outside the vocabulary of {self.config.vocab_size}")
        if int(forest.depth.max()) >= self.config.max_position_embeddings:
            raise ValueError(f"forest.depth: {int(forest.depth.max())} reaches beyond max_position_embeddings = "
                             f"{self.config.max_position_embeddings}")


def _scattered(values: Tensor, place: Tensor, length: int) -> Tensor:
    return torch.zeros(length, dtype=values.dtype, device=values.device).index_copy(0, place, values)


def build_model(config: ModelConfig, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
                seed: int | None = None, mesh: Mesh = ONE, recompute: bool = False, span: Span | None = None,
                embed_tokens: VocabEmbedding | None = None) -> M2Model:
    """A model (or a stage of one) on ``device``; freshly initialised when a seed is given, else uninitialised (to be loaded)."""
    with torch.device(device):
        model = M2Model(config, dtype, mesh, recompute, span, embed_tokens)
    if seed is not None:
        model.init_weights(seed)
    return model


def build_stages(config: ModelConfig, spans: Sequence[Span], mine: Iterable[int], dtype: torch.dtype, device: torch.device | str,
                 seed: int | None, mesh: Mesh, recompute: bool) -> dict[int, M2Model]:
    """This rank's stages of a pipeline, by number; the first and the last share one embedding where it has both."""
    stages: dict[int, M2Model] = {}
    for stage in sorted(mine):
        shared = stages[0].embed_tokens if 0 in stages and spans[stage].last else None
        stages[stage] = build_model(config, dtype, device, seed, mesh, recompute, spans[stage], shared)
    return stages

"""The whole model: embedding, decoder layers, final norm, untied head, and multi-token-prediction (MTP) modules, on a token forest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_m2.forest import TokenForest
from megatron_m2.model.config import ModelConfig
from megatron_m2.model.layers import Attend, DecoderLayer, MoE, RMSNorm, Router, RouterStats
from megatron_m2.ops.linear_cross_entropy import linear_logprobs
from megatron_m2.ops.norm_rope import Rotary, rotary_angles
from megatron_m2.ops.tree_attention import tree_attention

# Shape suffixes: T tokens, H hidden, E experts, L layers (main ones first, then MTP).


@dataclass
class M2Output:
    """What ``model(forest)`` returns.

    Attributes:
        logprobs: fp32 [T], ``log p(tokens[t] | path to parent[t])`` of every token with a weight, 0 elsewhere. Fp64 in an fp64 model.
        mtp_logprobs: per MTP module k = 1..K the same [T]: the log-probability of token t seen k tokens further back than usual,
            for tokens of depth > k.
        hidden_states: [T, H] after the final norm.
        expert_counts: int64 [L + K, E], choices of each expert per layer, times ``forest.multiplicity`` where given.
        aux_loss: fp32 scalar, balance loss times its coefficient, summed over layers (0 when the coefficient is 0).
    """

    logprobs: Tensor
    mtp_logprobs: tuple[Tensor, ...]
    hidden_states: Tensor
    expert_counts: Tensor
    aux_loss: Tensor


class MTPModule(nn.Module):
    """One more prediction depth (DeepSeek-V3 section 2.2): projects [embedding; previous hidden] and runs one decoder layer.

    Embedding and head are the main model's. The key layout follows MiniMax-M3's released module.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False, dtype=dtype)
        self.layer = DecoderLayer(config, dtype)
        self.final_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)

    def forward(self, embedding_TH: Tensor, previous_TH: Tensor, rotary: Rotary, attend: Attend,
                multiplicity_T: Tensor | None) -> tuple[Tensor, RouterStats]:
        joined = self.eh_proj(torch.cat([self.enorm(embedding_TH), self.hnorm(previous_TH)], dim=-1))
        return self.layer(joined, rotary, attend, multiplicity_T)


class M2Model(nn.Module):
    """MiniMax-M2 as a function of a token forest.

    Args:
        config: shape of the model.
        dtype: of weights and compute; the router stays fp32 (fp64 in an fp64 model).
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, dtype=dtype)
        self.layers = nn.ModuleList(DecoderLayer(config, dtype) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, dtype=dtype)
        self.mtp = nn.ModuleList(MTPModule(config, dtype) for _ in range(config.num_mtp_modules))

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and compute, the router apart."""
        return self.lm_head.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Normal of ``initializer_range``; what writes into the residual stream is smaller by sqrt(2 layers), norms are 1, biases 0."""
        std = self.config.initializer_range
        residual_std = std / math.sqrt(2 * self.config.num_hidden_layers)
        for name, p in self.named_parameters():
            if p.dim() == 1:
                nn.init.ones_(p)
            else:
                nn.init.normal_(p, std=residual_std if name.endswith(("o_proj.weight", "down_proj")) else std, generator=generator)
        for router in self.routers():
            router.bias.zero_()

    def moe_layers(self) -> list[MoE]:
        """Of the decoder layers, then of the MTP modules: the rows of ``M2Output.expert_counts``."""
        return [m for m in self.modules() if isinstance(m, MoE)]

    def routers(self) -> list[Router]:
        """The same order as :meth:`moe_layers`."""
        return [m.router for m in self.moe_layers()]

    # ---- mathematics ----------------------------------------------------------------------------------------------------------

    def forward(self, forest: TokenForest) -> M2Output:
        """Log-probabilities of the forest's weighted tokens and what training needs beside them: see :class:`M2Output`.

        Raises:
            ValueError: a token id outside the vocabulary, or a path longer than ``max_position_embeddings``.
        """
        self._check(forest)
        embedding_TH = self.embed_tokens(forest.tokens)
        trunk_TH, stats = self.trunk(embedding_TH, forest.depth, [self._attend(forest)] * len(self.layers), forest.multiplicity)
        hidden_TH = self.norm(trunk_TH)
        logprobs = self._logprobs(hidden_TH, forest, None, len(forest))
        mtp_logprobs = []
        index, sub, previous_TH = torch.arange(len(forest), device=forest.device), forest, trunk_TH
        for module in cast(Sequence[MTPModule], self.mtp):
            parent = sub.parent
            sub, kept = sub.without_roots()
            if len(sub) == 0:
                mtp_logprobs.append(torch.zeros_like(logprobs))
                stats.append(RouterStats(torch.zeros_like(stats[0].counts_E), None))
                previous_TH, index = previous_TH[kept], index[kept]
                continue
            index, parent_hidden = index[kept], previous_TH.index_select(0, parent[kept].long())
            rotary = self._rotary(sub.depth)
            previous_TH, s = module(embedding_TH.index_select(0, index), parent_hidden, rotary, self._attend(sub), sub.multiplicity)
            stats.append(s)
            mtp_logprobs.append(self._logprobs(module.final_layernorm(previous_TH), sub, index, len(forest)))
        aux = [s.aux_loss for s in stats if s.aux_loss is not None]
        aux_loss = self.config.router_aux_loss_coef * torch.stack(aux).sum() if aux else torch.zeros((), device=forest.device)
        return M2Output(logprobs, tuple(mtp_logprobs), hidden_TH, torch.stack([s.counts_E for s in stats]), aux_loss)

    def trunk(self, embedding_TH: Tensor, position_T: Tensor, attends: Sequence[Attend], multiplicity_T: Tensor | None = None
              ) -> tuple[Tensor, list[RouterStats]]:
        """The decoder layers: [T, H] before the final norm, and each layer's routing."""
        rotary = self._rotary(position_T)
        stats, x_TH = [], embedding_TH
        for layer, attend in zip(self.layers, attends, strict=True):
            x_TH, s = layer(x_TH, rotary, attend, multiplicity_T)
            stats.append(s)
        return x_TH, stats

    def head(self, hidden_TH: Tensor) -> Tensor:
        """Logits [T, vocab] of hidden states after the final norm, fp32 (fp64 in an fp64 model)."""
        hidden, weight = self._head_operands(hidden_TH)
        logits = F.linear(hidden, weight)
        return logits if logits.dtype == torch.float64 else logits.float()

    def _head_operands(self, hidden_TH: Tensor) -> tuple[Tensor, Tensor]:
        if self.config.fp32_head and self.dtype != torch.float64:
            return hidden_TH.float(), self.lm_head.weight.float()
        return hidden_TH, self.lm_head.weight

    def _logprobs(self, hidden_TH: Tensor, forest: TokenForest, index_T: Tensor | None, length: int) -> Tensor:
        """[length]: log-probs of the forest's weighted tokens, scattered to their place in the forest that ``index_T`` refers to."""
        targets, sources = forest.predictions()
        hidden, weight = self._head_operands(hidden_TH)
        logprobs = linear_logprobs(hidden, weight, forest.tokens[targets], sources)
        place = targets if index_T is None else index_T[targets]
        return torch.zeros(length, dtype=logprobs.dtype, device=logprobs.device).index_copy(0, place, logprobs)

    def _rotary(self, position_T: Tensor) -> Rotary:
        return rotary_angles(position_T, self.config.rotary_dim, self.config.rope_theta, self.dtype)

    @staticmethod
    def _attend(forest: TokenForest) -> Attend:
        return partial(tree_attention, subtree_end_T=forest.subtree_end)

    def _check(self, forest: TokenForest) -> None:
        if forest.device.type == "meta":
            return
        low, high = (int(x) for x in torch.aminmax(forest.tokens))
        if low < 0 or high >= self.config.vocab_size:
            raise ValueError(f"forest.tokens: id {low if low < 0 else high} outside the vocabulary of {self.config.vocab_size}")
        if int(forest.depth.max()) >= self.config.max_position_embeddings:
            raise ValueError(f"forest.depth: {int(forest.depth.max())} reaches beyond max_position_embeddings = "
                             f"{self.config.max_position_embeddings}")


def build_model(config: ModelConfig, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
                seed: int | None = None) -> M2Model:
    """A model on ``device``; freshly initialised when a seed is given, else uninitialised (to be loaded)."""
    with torch.device(device):
        model = M2Model(config, dtype)
    if seed is not None:
        model.init_weights(torch.Generator(device=device).manual_seed(seed))
    return model

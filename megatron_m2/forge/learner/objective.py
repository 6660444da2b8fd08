"""What the train engine minimises on merged samples: the policy's loss over pairs, and the drafts' over tokens.

A pair's loss depends on its token's log-prob alone, so its derivative by that log-prob, summed over the token's pairs, is all that a
backward needs: the token is predicted once, whatever many samples share it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_m2.forge.learner.losses import PairMetrics, PolicyLossConfig, coefficients
from megatron_m2.forge.learner.merge import MergedSamples
from megatron_m2.model.m2 import Asked, M2Output, StageOutput

# Shape suffixes: T tokens of the forest, P pairs, S samples of the batch.


@dataclass(frozen=True)
class DraftConfig:
    """How MTP modules are trained beside the policy.

    Attributes:
        weight: of their loss, the mean over modules; 0: none is computed.
        top_k: how many of the policy's most probable tokens they learn (KL, the trunk untouched); 0: the sampled tokens, with the trunk.
    """

    weight: float = 0.1
    top_k: int = 64

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ValueError(f"draft.weight = {self.weight}: need 0 or more")
        if self.top_k < 0:
            raise ValueError(f"draft.top_k = {self.top_k}: need 1 or more, or 0 to learn the sampled tokens")


class _Pairs(NamedTuple):
    """Of one microbatch, on the model's device. per_T: how many pairs each token has. scale: what each counts in the step's loss."""

    token_P: Tensor
    old_logprobs_P: Tensor
    advantages_P: Tensor
    reference_logprobs_P: Tensor
    versions_P: Tensor
    scale_P: Tensor
    per_T: Tensor
    scale_T: Tensor  # of the pairs of a token
    below_T: Tensor  # of its children

    @classmethod
    def of(cls, merged: MergedSamples, scale_S: np.ndarray, device: torch.device) -> _Pairs:
        pairs, forest, size = merged.pairs, merged.forest, len(merged.forest)
        scale_P = scale_S[pairs.sample]
        scale_T = np.bincount(pairs.token, scale_P, minlength=size)
        trained = np.flatnonzero(forest.weight.numpy())
        below_T = np.bincount(forest.parent.numpy()[trained], scale_T[trained], minlength=size)
        arrays = (pairs.token, pairs.old_logprobs, pairs.advantages, pairs.reference_logprobs, pairs.versions, scale_P,
                  np.bincount(pairs.token, minlength=size), scale_T, below_T)
        return cls(*(torch.from_numpy(a).to(device) for a in arrays))


class PolicyObjective:
    """The loss of one step on this rank's microbatches; sums up what is reported.

    Args:
        scale_S: fp64, what each pair of a sample of the batch counts (:func:`megatron_m2.forge.learner.losses.scales`).
        num_forests: of the step, over all ranks.

    Attributes:
        sums: fp64, this rank's share of: policy loss, draft loss, balance loss, entropy summed over pairs, and of each draft its expected
            acceptance, weighed as its loss.
        pair_metrics: what the pairs say of the policy.
    """

    def __init__(self, microbatches: Sequence[MergedSamples], scale_S: np.ndarray, loss: PolicyLossConfig, draft: DraftConfig,
                 num_drafts: int, num_forests: int, device: torch.device) -> None:
        self.pairs = [_Pairs.of(m, scale_S, device) for m in microbatches]
        self.loss, self.draft, self.num_drafts, self.num_forests = loss, draft, num_drafts, num_forests
        self.asked = Asked(entropy=True, draft_top_k=draft.top_k if num_drafts and draft.weight else 0)
        self.sums = torch.zeros(4 + num_drafts, dtype=torch.float64)
        self.pair_metrics = PairMetrics()

    def __call__(self, microbatch: int, output: StageOutput) -> Tensor:
        """What to differentiate. Its gradient is that of the loss; its value is not, that is in ``sums``."""
        aux = output.aux_loss / self.num_forests
        self.sums[2] += aux.detach().cpu()
        if not isinstance(output, M2Output):
            return aux
        pairs = self.pairs[microbatch]
        return aux + self._policy(output, pairs) + self._drafts(output, pairs)

    def _policy(self, output: M2Output, pairs: _Pairs) -> Tensor:
        mine_T = torch.zeros(len(output.logprobs), dtype=torch.bool, device=output.logprobs.device)
        mine_T[output.predicted] = True
        mine_P = mine_T[pairs.token_P]
        logprobs_P = output.logprobs.detach()[pairs.token_P]
        loss_P, coefficient_P, clipped_P = coefficients(self.loss, logprobs_P, pairs.old_logprobs_P, pairs.advantages_P,
                                                        pairs.reference_logprobs_P)
        weighed_P = torch.where(mine_P, pairs.scale_P * coefficient_P, 0.0)
        coefficient_T = torch.segment_reduce(weighed_P, "sum", lengths=pairs.per_T, initial=0)
        self.sums[0] += torch.where(mine_P, pairs.scale_P * loss_P, 0.0).sum().cpu()
        assert output.entropy is not None
        self.sums[3] += (output.entropy.double() * pairs.per_T).sum().cpu()
        self.pair_metrics.add(logprobs_P[mine_P], pairs.old_logprobs_P[mine_P], clipped_P[mine_P], pairs.versions_P[mine_P],
                              pairs.reference_logprobs_P[mine_P])
        return (coefficient_T.to(output.logprobs.dtype) * output.logprobs).sum()

    def _drafts(self, output: M2Output, pairs: _Pairs) -> Tensor:
        """The mean over MTP modules; a module has no say on tokens nearer to the root than its depth, nor have these in it."""
        loss = output.logprobs.new_zeros(())
        for k, draft in enumerate(output.drafts):
            below_T = pairs.below_T.to(draft.kl.dtype)
            loss = loss + (below_T * draft.kl).sum() / self.num_drafts
            self.sums[4 + k] += (pairs.below_T * draft.acceptance).sum().cpu()
        if self.draft.weight:
            for logprobs in output.mtp_logprobs:
                loss = loss - (pairs.scale_T.to(logprobs.dtype) * logprobs).sum() / self.num_drafts
        self.sums[1] += loss.detach().cpu()
        return self.draft.weight * loss

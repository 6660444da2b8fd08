"""Losses on the token forest. All are sums of ``coefficient * log-prob``, normalised by the weights of the whole step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_m2.forest import TokenForest
from megatron_m2.model.m2 import M2Output, StageOutput


@dataclass(frozen=True)
class LossWeights:
    """Denominators of one optimizer step: the sum of weights of the main loss and of each MTP depth, over all its forests."""

    main: float
    mtp: tuple[float, ...]

    @classmethod
    def of(cls, forests: Sequence[TokenForest], num_mtp_modules: int, over_ranks: Callable[[Tensor], Tensor] = lambda x: x) -> LossWeights:
        """Module k predicts the tokens of depth > k.

        Args:
            over_ranks: sums over the ranks that have the step's other forests.

        Raises:
            ValueError: nothing to predict.
        """
        sums = [sum(float(f.weight[f.depth > k].sum(dtype=torch.float64)) for f in forests) for k in range(num_mtp_modules + 1)]
        main, *mtp = over_ranks(torch.tensor(sums, dtype=torch.float64)).tolist()
        if main <= 0:
            raise ValueError("forest.weight: nothing to predict in this step, all weights are 0")
        return cls(main, tuple(mtp))


@dataclass
class ForestLoss:
    """One forest's share of the step's losses; summed over the step's forests they are the step's means.

    Attributes:
        total: what is differentiated.
        lm: nats per token of the main head. mtp: mean over the MTP modules. aux: balance loss times its coefficient.
    """

    total: Tensor
    lm: Tensor
    mtp: Tensor
    aux: Tensor


def forest_loss(output: M2Output, forest: TokenForest, weights: LossWeights, mtp_weight: float, num_forests: int) -> ForestLoss:
    """``-sum(w log p) / W + mtp_weight * mean_k(-sum(w log p_k) / W_k) + aux / num_forests`` (DeepSeek-V3 eq. 24-25)."""
    lm = -(forest.weight * output.logprobs).sum() / weights.main
    mtp = lm.new_zeros(())
    for logprobs, denominator in zip(output.mtp_logprobs, weights.mtp, strict=True):
        if denominator > 0:
            mtp = mtp - (forest.weight * logprobs).sum() / denominator / len(weights.mtp)
    aux = output.aux_loss / num_forests
    return ForestLoss(lm + mtp_weight * mtp + aux, lm.detach(), mtp.detach(), aux.detach())


def stage_loss(output: StageOutput, forest: TokenForest, weights: LossWeights, mtp_weight: float, num_forests: int) -> ForestLoss:
    """A pipeline stage's share of :func:`forest_loss`: all but the last have the balance of their own layers only."""
    if isinstance(output, M2Output):
        return forest_loss(output, forest, weights, mtp_weight, num_forests)
    aux = output.aux_loss / num_forests
    nothing = torch.zeros_like(aux)
    return ForestLoss(aux, nothing, nothing, aux.detach())


class ForestObjective:
    """What pre-training and SFT minimise, forest by forest of a step.

    Args:
        weights, num_forests: of the whole step, over all ranks.

    Attributes:
        sums: fp64 [3], this rank's share of the step's losses so far: next token, MTP, balance.
    """

    def __init__(self, forests: Sequence[TokenForest], weights: LossWeights, mtp_weight: float, num_forests: int) -> None:
        self.forests, self.weights, self.mtp_weight, self.num_forests = forests, weights, mtp_weight, num_forests
        self.sums = torch.zeros(3, dtype=torch.float64)

    def __call__(self, microbatch: int, output: StageOutput) -> Tensor:
        """What to differentiate of one forest in one pipeline stage."""
        loss = stage_loss(output, self.forests[microbatch], self.weights, self.mtp_weight, self.num_forests)
        self.sums += torch.stack([loss.lm.double(), loss.mtp.double(), loss.aux.double()]).cpu()
        return loss.total

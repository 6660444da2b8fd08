"""Held-out loss in bits per byte, which compares across tokenizers and with file compressors."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from megatron_m2.forest import TokenForest
from megatron_m2.parallel.collectives import total
from megatron_m2.training.stages import ModelStages


@dataclass(frozen=True)
class Evaluation:
    """nats: summed over the predicted tokens; expert_counts: int64 [layers, experts] over all of them."""

    nats: float
    tokens: int
    expert_counts: torch.Tensor

    @property
    def loss(self) -> float:
        """Nats per predicted token."""
        return self.nats / self.tokens

    def bits_per_byte(self, num_bytes: int) -> float:
        """``num_bytes``: of the text that these tokens encode."""
        return self.nats / math.log(2) / num_bytes


def evaluate(stages: ModelStages, forests: Iterable[TokenForest]) -> Evaluation:
    """The main head's loss on every weighted token, weights counted as 1. All ranks call it with the same forests and get the same.

    Raises:
        ValueError: no forest, or nothing predicted in them.
    """
    everything, mesh = list(forests), stages.mesh
    tokens = sum(int((f.weight != 0).sum()) for f in everything)
    if tokens == 0:
        raise ValueError("forests: nothing to evaluate")
    mine = everything[mesh.dp.rank :: mesh.dp.size]
    # every rank runs as many, since experts are spread over the dp ranks
    mine += [blank(everything[0])] * (math.ceil(len(everything) / mesh.dp.size) - len(mine))
    device = stages.pipeline.like.device
    sums = torch.zeros((), dtype=torch.float64, device=device)
    counts = stages.evaluate([f.to(device) for f in mine], lambda number, output: sums.add_(output.logprobs.double().sum()))
    return Evaluation(-float(total(sums, mesh.world)), tokens, total(counts, mesh.world))


def blank(forest: TokenForest) -> TokenForest:
    """Of the same shape, but it predicts nothing and counts for nothing."""
    return replace(forest, weight=torch.zeros_like(forest.weight), multiplicity=torch.zeros(len(forest), dtype=torch.int32))

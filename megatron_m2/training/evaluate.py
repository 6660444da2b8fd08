"""Held-out loss in bits per byte, which compares across tokenizers and with file compressors."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from megatron_m2.forest import TokenForest
from megatron_m2.model.m2 import M2Model


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


@torch.no_grad()
def evaluate(model: M2Model, forests: Iterable[TokenForest]) -> Evaluation:
    """The main head's loss on every weighted token, weights counted as 1.

    Raises:
        ValueError: no forest, or nothing predicted in them.
    """
    nats, tokens, counts = 0.0, 0, None
    for forest in forests:
        output = model(forest.to(model.device))
        nats -= float(output.logprobs.double().sum())
        tokens += int((forest.weight != 0).sum())
        counts = output.expert_counts if counts is None else counts + output.expert_counts
    if counts is None or tokens == 0:
        raise ValueError("forests: nothing to evaluate")
    return Evaluation(nats, tokens, counts)

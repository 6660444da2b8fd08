"""What a step of merged samples says of itself: how much was shared, and what speed-up that allows."""

from __future__ import annotations

from megatron_m2.forge.learner.merge import MergedSamples
from megatron_m2.forge.learner.plan import Cost, Plan


def sharing_metrics(merged: MergedSamples, plan: Plan, cost: Cost) -> dict[str, float]:
    """Tokens and visible pairs of the samples, each alone, over those computed; so the ceiling, with both in model FLOPs.

    What is computed are the unique tokens, and once more what a cut between microbatches made two of them hold.
    """
    lengths = merged.lengths
    microbatches = [m for part in (*plan.ranks, plan.streamed) for m in part]
    tokens, computed = int(lengths.sum()), sum(m.tokens for m in microbatches)
    pairs, computed_pairs = int((lengths * (lengths + 1) // 2).sum()), sum(m.pairs for m in microbatches)
    alone = cost.per_token * tokens + cost.per_pair * pairs + cost.per_trained * len(merged.pairs)
    return {"tree/tokens": float(tokens), "tree/unique_tokens": float(len(merged.forest)), "tree/computed_tokens": float(computed),
            "tree/token_ratio": tokens / computed, "tree/pair_ratio": pairs / computed_pairs,
            "tree/ceiling": alone / sum(m.cost for m in microbatches), "tree/microbatches": float(len(microbatches)),
            "tree/imbalance": plan.imbalance}

"""Random samples that share prefixes, and the reference for what a step makes of them: every sample alone, by formulas written out."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from megatron_m2.forest import TokenForest
from megatron_m2.forge.learner.samples import Sample
from megatron_m2.model.m2 import Asked
from tests.conftest import random_samples


def samples_of(seed: int, count: int = 6, model=None, routed: str = "", parents: bool = False, **kind) -> list[Sample]:
    """Samples with forks at any level, repeated ones, prefixes of others and short ones, whose shared tokens differ in all else.

    Args:
        routed: "alike": tokens that are shared have the same routes; "anyhow": each sample its own, some unrecorded.
        parents: some samples go on from the end of an earlier one.
    """
    rng = np.random.default_rng(seed)
    paths = [p if len(p) > 1 else [*p, 1] for p in random_samples(seed, count, kind.pop("vocab", 97), **kind)]
    paths += [paths[0], paths[-1][: max(2, len(paths[-1]) // 2)]]
    samples, ends = [], []
    for i, path in enumerate(paths):
        parent, own = None, path
        if parents and i and rng.integers(2):
            at = int(rng.integers(i))
            parent, own = samples[at].name, rng.integers(0, 97, rng.integers(1, 6)).tolist()
            path = ends[at] + own
        ends.append(path)
        n = len(own)
        trainable = rng.random(n) < 0.6
        trainable[-1] = True
        if parent is None:
            trainable[0] = False
        routes = None
        if routed:
            width = (model.num_hidden_layers, model.top_k)
            every = np.stack([_routes(path[: t + 1] if routed == "alike" else rng, width, model.num_experts) for t in range(len(path))])
            routes = every[-n:].copy()
            if routed == "anyhow":
                routes[rng.random((n, width[0])) < 0.2] = -1
        samples.append(Sample(
            f"s{i}", f"g{i % 3}", np.array(own, np.int64), trainable, np.where(trainable, -5 * rng.random(n), 0).astype(np.float32),
            np.where(trainable, rng.standard_normal(n), 0).astype(np.float32), float(rng.choice([0.5, 1.0, 2.0])),
            rng.integers(0, 4, n).astype(np.int32), routes=routes, parent=parent))
    return samples


def recorded_first(samples: list[Sample], everywhere: bool) -> tuple[list[Sample], int, int]:
    """Samples whose unrecorded routes (all routes, if ``everywhere``) are those of the first sample that recorded the same token's; how
    many were recorded, and how many of these differ from the first's, by tokens and layers."""
    first, recorded, differing = {}, 0, 0
    paths = [path_of(replace(s, routes=None), [replace(x, routes=None) for x in samples]).tokens.tolist() for s in samples]
    own = [[(tuple(path[: t + 1]), t - len(path) + len(s.tokens)) for t in range(len(path) - len(s.tokens), len(path))]
           for s, path in zip(samples, paths, strict=True)]
    for s, tokens in zip(samples, own, strict=True):
        for key, t in tokens:
            for layer, row in enumerate(s.routes[t]):
                if row[0] >= 0:
                    recorded += 1
                    differing += set(first.setdefault((key, layer), row).tolist()) != set(row.tolist())
    out = []
    for s, tokens in zip(samples, own, strict=True):
        routes = s.routes.copy()
        for key, t in tokens:
            for layer in range(routes.shape[1]):
                if everywhere or routes[t, layer, 0] < 0:
                    routes[t, layer] = first.get((key, layer), routes[t, layer])
        out.append(replace(s, routes=routes))
    return out, recorded, differing


def _routes(of, width, experts):
    """int16 [layers, K]: of a path always the same ones."""
    rng = np.random.default_rng(of) if isinstance(of, list) else of
    return np.stack([rng.permutation(experts)[: width[1]] for _ in range(width[0])]).astype(np.int16)


@dataclass
class Alone:
    """What the samples of a step come to, each alone: losses, gradients by name, expert counts."""

    policy: float
    draft: float
    grads: dict[str, torch.Tensor]
    counts: torch.Tensor


def path_of(sample: Sample, samples: list[Sample]) -> Sample:
    """With all before its own tokens, none of which it trains."""
    if sample.parent is None:
        return sample
    before = path_of(next(s for s in samples if s.name == sample.parent), samples)
    n = len(before.tokens)
    zeros = np.zeros(n, np.float32)
    routes = None if sample.routes is None else np.concatenate([before.routes, sample.routes])
    return replace(sample, tokens=np.concatenate([before.tokens, sample.tokens]), trainable=np.concatenate([zeros > 0, sample.trainable]),
                   old_logprobs=np.concatenate([zeros, sample.old_logprobs]), advantages=np.concatenate([zeros, sample.advantages]),
                   routes=routes, parent=None)


def every_sample_alone(model, samples: list[Sample], cap: float, draft_weight: float, draft_top_k: int) -> Alone:
    """CISPO with the mean over groups of each group's tokens (MiniMax-M1 eq. 4), and the drafts' loss weighed alike."""
    whole = [path_of(s, samples) for s in samples]
    groups = {s.group for s in whole}
    tokens = {g: sum(s.weight * s.trainable.sum() for s in whole if s.group == g) for g in groups}
    policy = draft = 0.0
    counts = 0
    model.zero_grad()
    for s in whole:
        forest = TokenForest.from_documents([s.tokens])
        weight = torch.from_numpy(s.trainable.astype(np.float32))
        routes = None if s.routes is None else torch.from_numpy(s.routes)
        out = model(replace(forest, weight=weight, routes=routes).to(model.device), asked=Asked(draft_top_k=draft_top_k))
        counts = counts + out.expert_counts
        trained = torch.from_numpy(np.flatnonzero(s.trainable)).to(model.device)
        logprobs = out.logprobs[trained]
        old, advantages = (torch.from_numpy(x[s.trainable]).to(logprobs) for x in (s.old_logprobs, s.advantages))
        ratio = torch.exp(logprobs.detach() - old)
        scale = s.weight / tokens[s.group] / len(groups)
        loss = -scale * (ratio.clamp(0, cap) * advantages * logprobs).sum()
        policy += loss.item()
        if draft_weight:
            mine = loss * 0
            for k in range(1, len(model.mtp) + 1):
                if draft_top_k:
                    mine = mine + scale * out.drafts[k - 1].kl[trained - 1].sum()
                else:
                    mine = mine - scale * out.mtp_logprobs[k - 1][trained].sum()
            draft += mine.item() / len(model.mtp)
            loss = loss + draft_weight * mine / len(model.mtp)
        loss.backward()
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    return Alone(policy, draft, grads, counts)

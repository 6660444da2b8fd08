"""One step of RL on samples: merged, planned over ranks and microbatches, run through the model's stages, one update.

Every rank is given the same samples and comes to the same plan by itself, so nothing about samples is ever sent between ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from megatron_m2.forest import TokenForest
from megatron_m2.forge.learner.losses import PolicyLossConfig, scales
from megatron_m2.forge.learner.merge import MergedSamples, RouteConflict, RouteReport, Sharing, merge_samples
from megatron_m2.forge.learner.objective import DraftConfig, PolicyObjective
from megatron_m2.forge.learner.plan import Budget, Cost, Microbatch, Plan, plan
from megatron_m2.forge.learner.report import sharing_metrics
from megatron_m2.forge.learner.samples import Batch, Refusal, Sample, check, flatten
from megatron_m2.model.m2 import M2Output
from megatron_m2.ops.router import update_router_bias
from megatron_m2.parallel.collectives import gather_rows, total
from megatron_m2.training.metrics import expert_load
from megatron_m2.training.optimizer import MasterAdamW
from megatron_m2.training.stages import ModelStages
from megatron_m2.training.streaming import refuse


@dataclass(frozen=True)
class LearnerConfig:
    """How a step is made of samples.

    Attributes:
        loss, draft: what is minimised.
        budget: of one microbatch.
        piece_tokens: a sample over the budget is trained in pieces of so many tokens, with the tree that it is in; 0: it is refused.
        routes: "split" or "first", where samples that share a token were routed differently.
        sharing: which prefixes are stored once: "tree": all; "chains": of samples that another goes on from; "none". Results are equal.
        router_bias_rate: step of the bias that balances experts' loads; 0: biases stay.
    """

    loss: PolicyLossConfig = field(default_factory=PolicyLossConfig)
    draft: DraftConfig = field(default_factory=DraftConfig)
    budget: Budget = field(default_factory=lambda: Budget(8192))
    piece_tokens: int = 0
    routes: RouteConflict = "split"
    sharing: Sharing = "tree"
    router_bias_rate: float = 0.0


class StepResult(NamedTuple):
    """Metrics by name, the same on all ranks but for ``time/``; and what was not trained."""

    metrics: dict[str, float]
    refusals: list[Refusal]


@dataclass
class Work:
    """A batch as this rank works on it.

    Attributes:
        merged: all of it. mine: this rank's microbatches. streamed: its forests to be trained in pieces.
        scale_S: fp64, what each pair of a sample of the batch counts.
    """

    batch: Batch
    merged: MergedSamples
    routes: RouteReport
    plan: Plan
    mine: list[MergedSamples]
    streamed: list[MergedSamples]
    scale_S: np.ndarray


class Learner:
    """The train engine of one rank.

    Args:
        optimizer: of the stages' weights; ``apart="mtp."`` clips the gradients of drafts by their own norm.

    Raises:
        ValueError: ``piece_tokens`` where the model cannot be trained in pieces.
    """

    def __init__(self, config: LearnerConfig, stages: ModelStages, optimizer: MasterAdamW) -> None:
        self.config, self.stages, self.optimizer, self.mesh = config, stages, optimizer, stages.mesh
        self.device = stages.pipeline.like.device
        self.cost = Cost.of(stages.model)
        if config.piece_tokens:
            for model in stages.stages.values():
                refuse(model)
        self.flops_per_s = 0.0  # on samples that are not merged, once calibrated

    def step(self, samples: Iterable[Sample], lr: float, version: int) -> StepResult:
        """One update of the weights on all samples that can be trained.

        Args:
            version: of the weights before the step, as in ``Sample.versions``.

        Raises:
            ValueError: not one sample can be trained, or one is over the budget; the message names the first.
            FloatingPointError: a gradient is not finite; nothing was updated.
        """
        started = time.perf_counter()
        work = self.prepare(samples)
        prepared = time.perf_counter()
        objective, counts = self.forward_backward(work, self.optimizer.before_backward)
        passed = time.perf_counter()
        grad_norm = self.optimizer.step(lr)
        if self.config.router_bias_rate > 0:
            for row, router in self.stages.routers():
                update_router_bias(router.bias, counts[row], self.config.router_bias_rate)
        seconds = self.stages.pipeline.seconds if work.mine else dict.fromkeys(("forward", "backward", "communication"), 0.0)
        whole = sum(seconds.values())
        metrics = {**self._losses(work, objective), **objective.pair_metrics.result(version, self._gather),
                   **sharing_metrics(work.merged, work.plan, self.cost)}
        metrics |= {"optim/lr": lr, "optim/grad_norm": grad_norm, "optim/draft_grad_norm": self.optimizer.norm_apart,
                    "routes/recorded": float(work.routes.recorded), "routes/disagreeing": float(work.routes.disagreeing),
                    "data/refused": float(len(work.batch.refusals)), **expert_load(counts), **self._speed(work, passed - prepared)}
        metrics |= {"time/prepare_s": prepared - started, "time/forward_s": seconds["forward"], "time/backward_s": seconds["backward"],
                    "time/in_pieces_s": passed - prepared - whole,
                    "time/communication_s": seconds["communication"] + self.optimizer.waited_s,
                    "time/optimizer_s": time.perf_counter() - passed - self.optimizer.waited_s}
        return StepResult(metrics, work.batch.refusals)

    def calibrate(self, samples: Sequence[Sample]) -> None:
        """Measures how fast samples go that are not merged, for ``throughput/share_of_ceiling``; about one microbatch of them on each rank.
        Weights and router biases stay as they are. Collective over the mesh."""
        chosen: list[Sample] = []
        room = self.config.budget.tokens * self.mesh.dp.size
        for sample in flatten(check(samples, self.stages.model)).samples:
            if sample.trainable.any() and len(sample.tokens) <= room:
                room -= len(sample.tokens)
                chosen.append(sample)
        work = self.prepare(chosen, "none")
        for _ in range(2):  # the first one warms up
            started = time.perf_counter()
            self.forward_backward(work)
            self.flops_per_s = self._flops(work) / (time.perf_counter() - started)
            self.optimizer.drop_gradients()

    def recompute(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples with ``old_logprobs`` as the present weights have them, for a loss with ``anchor = recomputed``; refused ones as
        they are."""
        work = self.prepare(samples)
        lengths = [len(s.tokens) for s in work.batch.samples]
        logprobs = torch.zeros(sum(lengths), dtype=torch.float64)

        parts = [*work.mine, *work.streamed]

        def take(number: int, output: M2Output) -> None:
            pairs = parts[number].pairs
            logprobs[pairs.position] += output.logprobs.double().cpu()[pairs.token]

        self.stages.evaluate(self._forests(parts), take)
        found = total(logprobs.to(self.device), self.mesh.world).float().cpu().numpy()
        ends = np.cumsum(lengths)
        anew = {s.name: replace(s, old_logprobs=found[end - n : end]) for s, context, end, n in
                zip(work.batch.samples, work.batch.context, ends, lengths, strict=True) if not context}
        return [anew.get(s.name, s) for s in samples]

    def _gather(self, values: Tensor) -> Tensor:
        """All ranks' values, one rank after the other."""
        world = self.mesh.world
        counts = gather_rows(torch.tensor([len(values)], device=self.device), world, [1] * world.size)
        return gather_rows(values.to(self.device), world, counts.tolist()).cpu()

    # ---- its parts ----------------------------------------------------------------------------------------------------------------

    def prepare(self, samples: Iterable[Sample], sharing: Sharing | None = None) -> Work:
        """Samples checked, merged (as the configuration has it, or as ``sharing`` says), and dealt out.

        Raises:
            ValueError: as :meth:`step`.
        """
        pieces, budget, dp = self.config.piece_tokens, self.config.budget, self.mesh.dp
        batch = check(samples, self.stages.model, self.config.loss.kl_coef > 0, None if pieces else budget.tokens)
        if batch.context.all():
            raise ValueError("samples: none can be trained" + "".join(f"; {r.name}: {r.reason}" for r in batch.refusals[:1]))
        merged, routes = merge_samples(batch, self.config.routes, sharing or self.config.sharing)
        forest = merged.forest
        planned = plan(forest.depth.numpy(), forest.subtree_end.numpy(), merged.last, forest.weight.numpy() > 0, budget, self.cost, dp.size,
                       stream=pieces > 0)
        # ranks keep step: one that has fewer forests than others runs some that train nothing
        mine, streamed = ([merged.take(merged.samples[m.samples]) if len(m.samples) else merged.nothing() for m in part]
                          for part in (planned.ranks[dp.rank], evenly(planned.streamed, dp.size)[dp.rank]))
        trained = np.bincount(merged.pairs.sample, minlength=len(batch.samples))
        scale_S = scales(self.config.loss, trained, np.array([s.weight for s in batch.samples]), [s.group for s in batch.samples])
        return Work(batch, merged, routes, planned, mine, streamed, scale_S)

    def forward_backward(self, work: Work, before_backward: Callable[[bool, Sequence[nn.Parameter]], None] = lambda last, parameters: None
                         ) -> tuple[PolicyObjective, Tensor]:
        """Gradients of a step stay where they were added. Returns also the expert counts of all ranks, int64 [layers + MTP, E]."""
        c, forests = self.config, self._forests(work.mine)
        num_forests = self.mesh.dp.size * (len(work.mine) + len(work.streamed))
        objective = PolicyObjective([*work.mine, *work.streamed], work.scale_S, c.loss, c.draft, self.stages.model.num_mtp_modules,
                                    num_forests, self.device)
        counts = self.stages.no_counts()
        for i, forest in enumerate(self._forests(work.streamed)):
            last = not forests and i == len(work.streamed) - 1
            counts += self.stages.stream(forest, objective, len(forests) + i, c.piece_tokens, before_backward, last, objective.asked)
        if forests:
            counts += self.stages.train(forests, objective, before_backward, objective.asked)
        return objective, total(counts, self.mesh.world)

    def _forests(self, parts: Sequence[MergedSamples]) -> list[TokenForest]:
        return [m.forest.to(self.device, non_blocking=True) for m in parts]

    def _losses(self, work: Work, objective: PolicyObjective) -> dict[str, float]:
        policy, draft, aux, entropy, *acceptance = total(objective.sums.to(self.device), self.mesh.world).tolist()
        metrics = {"loss/policy": policy, "loss/draft": draft, "loss/aux": aux, "policy/entropy": entropy / len(work.merged.pairs)}
        pairs, depth = work.merged.pairs, work.merged.forest.depth.numpy()
        for k, accepted in enumerate(acceptance, start=1):
            drafted = float(work.scale_S[pairs.sample][depth[pairs.token] > k].sum())
            metrics[f"draft/acceptance_{k}"] = accepted / max(drafted, 1e-30)
        return metrics

    def _speed(self, work: Work, seconds: float) -> dict[str, float]:
        """Of this rank's microbatches. The ceiling is reached when FLOPs on forests go as fast as on samples that are not merged."""
        flops_per_s = self._flops(work) / seconds
        speed = {"throughput/model_tflops_per_s": flops_per_s / 1e12, "throughput/tokens_per_s": float(work.merged.lengths.sum()) / seconds}
        return speed | ({"throughput/share_of_ceiling": flops_per_s / self.flops_per_s} if self.flops_per_s else {})

    def _flops(self, work: Work) -> float:
        rank, size = self.mesh.dp.rank, self.mesh.dp.size
        return sum(m.cost for part in (work.plan.ranks, evenly(work.plan.streamed, size)) for m in part[rank])


def evenly(microbatches: Sequence[Microbatch], ranks: int) -> list[list[Microbatch]]:
    """The costliest first, each to the rank with the least so far, as many for each: some get empty ones."""
    dealt: list[list[Microbatch]] = [[] for _ in range(ranks)]
    for microbatch in sorted(microbatches, key=lambda m: -m.cost):
        min(dealt, key=lambda mine: sum(m.cost for m in mine)).append(microbatch)
    most = max(map(len, dealt))
    return [mine + [Microbatch()] * (most - len(mine)) for mine in dealt]

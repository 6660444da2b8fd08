"""What is planned: a model on a batch of chains (:class:`Job`), laid out over ranks in one way (:class:`Layout`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from math import comb

from megatron_m2.model.config import ModelConfig
from megatron_m2.parallel.layout import Limits, ParallelConfig, check
from megatron_m2.parallel.pipeline import split_layers
from megatron_m2.parallel.sharding import Sharding
from megatron_m2.planning.cluster import ClusterConfig


@dataclass(frozen=True)
class Options:
    """How this code base is set, the same for every layout compared.

    Attributes:
        dispatch_fp8: rows travel to their experts as FP8 codes with a factor per 128 values; the way back and gradients stay bf16.
        node_dedup: a token travels once to every node with one of its experts and is spread inside it, not once to every rank.
        lean_experts: SwiGLU and its gradient are one kernel each and padded rows are not copied, as in other systems. This code has on a
            GPU in bf16 torch's product between masked copies, and in FP8 SwiGLU's gradient in fp32 tensors.
        imbalance: rows of the most loaded expert rank over the mean: it sets the pace, and its memory the limit.
        hide_ep, hide_tp, hide_cp, hide_dp, hide_pp: share of each kind of traffic that runs behind computation. What is not yet
            overlapped in the code stays 0. For dp the computation at hand is the last microbatch's backward.
    """

    dispatch_fp8: bool = False
    node_dedup: bool = False
    lean_experts: bool = False
    imbalance: float = 1.0
    hide_ep: float = 0.0
    hide_tp: float = 0.0
    hide_cp: float = 0.0
    hide_dp: float = 0.0
    hide_pp: float = 0.0

    def __post_init__(self) -> None:
        if self.imbalance < 1:
            raise ValueError(f"plan.imbalance = {self.imbalance}: must be at least 1")
        for name in ("hide_ep", "hide_tp", "hide_cp", "hide_dp", "hide_pp"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"plan.{name} = {getattr(self, name)}: must be between 0 and 1")


@dataclass(frozen=True)
class Job:
    """One optimizer step of one model on one cluster.

    Attributes:
        seq_len: tokens of one chain; forests hold whole chains and nothing else, the dearest case.
        batch_tokens: of one optimizer step.
    """

    model: ModelConfig
    cluster: ClusterConfig
    seq_len: int
    batch_tokens: int
    options: Options = Options()

    def __post_init__(self) -> None:
        if not 2 <= self.seq_len <= self.model.max_position_embeddings:
            raise ValueError(f"plan.seq_len = {self.seq_len}: must be between 2 and model.max_position_embeddings = "
                             f"{self.model.max_position_embeddings}")
        if self.batch_tokens < self.seq_len:
            raise ValueError(f"plan.batch_tokens = {self.batch_tokens}: must be at least seq_len = {self.seq_len}")


@dataclass(frozen=True)
class Layout:
    """One way to run a job.

    Attributes:
        parallel: sizes of the axes, schedule, recomputation.
        tokens_per_forest: tokens of one microbatch, whole chains.
        sharding: of the optimizer's state.
    """

    parallel: ParallelConfig
    tokens_per_forest: int
    sharding: Sharding = field(default_factory=Sharding)


def legal(job: Job, layout: Layout) -> None:
    """Refuses a layout that cannot run this job.

    Raises:
        ValueError: one line with the field and what would be legal: :func:`megatron_m2.parallel.layout.check`'s.
    """
    m = job.model
    if layout.tokens_per_forest % job.seq_len:
        nearest = max(1, round(layout.tokens_per_forest / job.seq_len)) * job.seq_len
        raise ValueError(f"plan.tokens_per_forest = {layout.tokens_per_forest}: must be a multiple of seq_len = {job.seq_len}; "
                         f"nearest is {nearest}")
    check(layout.parallel, job.cluster.ranks, Limits(m.num_attention_heads, m.num_key_value_heads, m.num_experts, m.num_hidden_layers,
                                                     forests_per_step(job, layout), layout.tokens_per_forest))


def forests_per_step(job: Job, layout: Layout) -> int:
    return max(1, job.batch_tokens // layout.tokens_per_forest)


def microbatches(job: Job, layout: Layout) -> int:
    """Forests that one pipeline sees in a step."""
    return forests_per_step(job, layout) // layout.parallel.dp(job.cluster.ranks)


@lru_cache(maxsize=4096)
def distinct_groups(experts: int, top_k: int, groups: int) -> float:
    """Expected number of distinct groups among those of ``top_k`` different experts of a uniform choice, experts split evenly."""
    return groups * (1 - comb(experts - experts // groups, top_k) / comb(experts, top_k))


# ---- stages ------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """What one place in the pipeline holds.

    Attributes:
        layers: of each of its chunks, first to last; what follows the layers belongs to the last chunk.
        embedding, head: whether it has them; mtp: multi-token-prediction modules.
    """

    layers: tuple[int, ...]
    embedding: bool = True
    head: bool = True
    mtp: int = 0

    @property
    def total_layers(self) -> int:
        return sum(self.layers)


def stages(job: Job, layout: Layout) -> list[Stage]:
    """By place in the pipeline, as :class:`megatron_m2.training.stages.ModelStages` builds them."""
    p, mtp = layout.parallel, job.model.num_mtp_modules
    counts = _layers_of_chunks(job.model, job.seq_len // 2, p.pp * p.vpp)
    found = []
    for place in range(p.pp):
        # zbv goes to the last rank and back; the others start again at the first
        mine = (place, 2 * p.pp - 1 - place) if p.schedule == "zbv" and p.pp > 1 else range(place, p.pp * p.vpp, p.pp)
        first, last = 0 in mine, p.pp * p.vpp - 1 in mine
        found.append(Stage(tuple(counts[chunk] for chunk in mine), first or (last and mtp > 0), last, mtp if last else 0))
    return found


@lru_cache(maxsize=1024)
def _layers_of_chunks(model: ModelConfig, depth: int, chunks: int) -> tuple[int, ...]:
    spans = split_layers([model.layer_flops(depth)] * model.num_hidden_layers, model.last_flops(depth), chunks)
    return tuple(span.stop - span.start for span in spans)


def chain_flops(model: ModelConfig, seq_len: int) -> int:
    """Forward model FLOPs of one chain of ``seq_len`` tokens, all of it trained on, MTP included."""
    mtp = [max(0, seq_len - k) for k in range(1, model.num_mtp_modules + 1)]
    predicted = seq_len - 1 + sum(max(0, n - 1) for n in mtp)
    return model.forward_flops(seq_len, seq_len * (seq_len + 1) // 2, predicted, sum(mtp))

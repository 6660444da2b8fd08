"""What is planned: a model on a batch of chains (:class:`Job`), laid out over ranks in one way (:class:`Layout`)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import comb

from megatron_m2.model.config import ModelConfig
from megatron_m2.parallel.layout import Limits, ParallelConfig, check
from megatron_m2.planning.cluster import ClusterConfig

SCHEDULES = ("1f1b", "zero_bubble")


@dataclass(frozen=True)
class Options:
    """How this code base is set, the same for every layout compared.

    Attributes:
        dispatch_fp8: rows travel to their experts as FP8 codes with a factor per 128 values; the way back and gradients stay bf16.
        node_dedup: a token travels once to every node with one of its experts and is spread inside it, not once to every rank.
        lean_experts: the experts' buffers have a row for each choice that is this rank's, and SwiGLU is one kernel, as in other systems.
            This code has a row for every choice of every token that came, and on a GPU in bf16 torch's product with masked copies.
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
        parallel: sizes of the axes.
        tokens_per_forest: tokens of one microbatch, whole chains.
        schedule: "1f1b" (interleaved where vpp > 1) or "zero_bubble"; vpp: chunks of layers per stage.
        recompute: keep only each layer's input for the backward.
        zero: 0 optimizer whole on every replica, 1 optimizer state sharded over them, 2 gradient sums too.
    """

    parallel: ParallelConfig
    tokens_per_forest: int
    schedule: str = "1f1b"
    vpp: int = 1
    recompute: bool = False
    zero: int = 1


def legal(job: Job, layout: Layout) -> None:
    """Refuses a layout that cannot run this job.

    Raises:
        ValueError: one line with the field and what would be legal; of the axes' sizes, :func:`megatron_m2.parallel.layout.check`'s.
    """
    m, p = job.model, layout.parallel
    if layout.tokens_per_forest % job.seq_len:
        nearest = max(1, round(layout.tokens_per_forest / job.seq_len)) * job.seq_len
        raise ValueError(f"plan.tokens_per_forest = {layout.tokens_per_forest}: must be a multiple of seq_len = {job.seq_len}; "
                         f"nearest is {nearest}")
    forests = forests_per_step(job, layout)
    check(p, job.cluster.ranks, Limits(m.num_attention_heads, m.num_key_value_heads, m.num_experts, m.num_hidden_layers, forests,
                                       layout.tokens_per_forest))
    if layout.schedule not in SCHEDULES:
        raise ValueError(f"plan.schedule = {layout.schedule!r}: must be one of {', '.join(SCHEDULES)}")
    if layout.zero not in (0, 1, 2):
        raise ValueError(f"plan.zero = {layout.zero}: must be 0, 1 or 2")
    if layout.vpp < 1 or p.pp * layout.vpp > m.num_hidden_layers:
        raise ValueError(f"plan.vpp = {layout.vpp}: must be between 1 and {m.num_hidden_layers // p.pp}, a layer for each of the "
                         f"{p.pp} stages' chunks")
    if layout.vpp > 1 and (p.pp == 1 or layout.schedule != "1f1b"):
        raise ValueError(f"plan.vpp = {layout.vpp}: must be 1 with pp = {p.pp} and schedule {layout.schedule}")
    if layout.vpp > 1 and microbatches(job, layout) % p.pp:
        raise ValueError(f"plan.vpp = {layout.vpp}: a stage's {microbatches(job, layout)} microbatches must be a multiple of pp = {p.pp}")
    if layout.schedule == "zero_bubble" and p.pp == 1:
        raise ValueError("plan.schedule = zero_bubble: needs pp of at least 2")


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
    """What one pipeline stage holds beside its layers.

    Attributes:
        layers: of each of its chunks.
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
    """The stages of a layout: contiguous chunks of layers, chunk c on stage ``c % pp``, balanced by FLOPs.

    The embedding is on the first stage; final norm, head and MTP modules, with a second copy of the embedding for them, on the last.
    """
    model, pp, chunks = job.model, layout.parallel.pp, layout.parallel.pp * layout.vpp
    layer, tail = _layer_and_tail_flops(model, job.seq_len)
    counts = split_layers(model.num_hidden_layers, chunks, tail / layer)
    mtp = model.num_mtp_modules
    return [Stage(counts[s::pp], embedding=s == 0 or (s == pp - 1 and mtp > 0), head=s == pp - 1, mtp=mtp if s == pp - 1 else 0)
            for s in range(pp)]


@lru_cache(maxsize=4096)
def split_layers(layers: int, chunks: int, tail: float) -> tuple[int, ...]:
    """Layers of each chunk, the largest cost least where the last chunk also costs ``tail`` layers; only it may have none.

    >>> split_layers(62, 4, 3.0)
    (17, 16, 16, 13)
    """
    if chunks == 1:
        return (layers,)

    def largest(last: int) -> tuple[float, float]:
        others = -(-(layers - last) // (chunks - 1))
        return max(float(others), last + tail), abs(last + tail - others)

    last = min(range(layers - chunks + 2), key=largest)
    base, extra = divmod(layers - last, chunks - 1)
    return (*(base + (c < extra) for c in range(chunks - 1)), last)


def _layer_and_tail_flops(model: ModelConfig, seq_len: int) -> tuple[float, float]:
    """Forward FLOPs of a chain in one layer, and in head and MTP modules."""
    pairs = seq_len * (seq_len + 1) // 2
    layers = model.forward_flops(seq_len, pairs, 0)
    return layers / model.num_hidden_layers, chain_flops(model, seq_len) - layers


def chain_flops(model: ModelConfig, seq_len: int) -> int:
    """Forward model FLOPs of one chain of ``seq_len`` tokens, all of it trained on, MTP included."""
    mtp = [max(0, seq_len - k) for k in range(1, model.num_mtp_modules + 1)]
    predicted = seq_len - 1 + sum(max(0, n - 1) for n in mtp)
    return model.forward_flops(seq_len, seq_len * (seq_len + 1) // 2, predicted, sum(mtp))

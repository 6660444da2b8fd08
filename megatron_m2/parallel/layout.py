"""How many ranks each axis of parallelism gets, and what a model allows: checked before any process starts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class ParallelConfig:
    """Sizes of the axes; data parallelism takes the ranks that the others leave.

    Attributes:
        pp: pipeline stages. cp: parts of a forest's tokens. tp: parts of the attention's heads and of the vocabulary; between the
            attentions each of its ranks has a part of the tokens. ep: parts of the experts, folded over dp x cp x tp of a stage.
        vpp: stages per pp rank. schedule: of the pipeline: 1f1b (vpp 1), interleaved or zero_bubble (vpp 2 or more), zbv (vpp 2, the
            first stage beside the last).
        recompute: keep only each layer's input for the backward, which runs the layer again.
        ep_fp8_payload: tokens travel to their experts as e4m3 codes with a factor per 128 values; sums and gradients stay as they are.
        ep_chunks: parts of a forest's tokens, of which one travels while the experts of another compute.
        ep_peer_mib: size of a message that ranks of one node write straight into each other's memory (CUDA IPC); longer ones, and all
            where a GPU cannot reach the others, go by all-to-all. 0: none.
        timeout_s: seconds within which a rank that died or stalls ends the job; so a collective takes at most 0.7 of it.
    """

    pp: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    vpp: int = 1
    schedule: str = "1f1b"
    recompute: bool = False
    ep_fp8_payload: bool = False
    ep_chunks: int = 1
    ep_peer_mib: int = 0
    timeout_s: float = 600.0

    @property
    def first_stage_with_last(self) -> bool:
        """Whether one rank has both."""
        return self.pp == 1 or self.schedule == "zbv"

    def dp(self, world: int) -> int:
        return world // (self.pp * self.cp * self.tp)


_LEGAL_VPP = {"1f1b": (1, 1), "interleaved": (2, 1 << 30), "zero_bubble": (2, 1 << 30), "zbv": (2, 2)}


@dataclass(frozen=True)
class Limits:
    """What a model and its batches allow."""

    heads: int
    kv_heads: int
    experts: int
    layers: int
    forests_per_step: int
    tokens_per_forest: int


def check(config: ParallelConfig, world: int, limits: Limits) -> None:
    """Refuses a layout that cannot run.

    Raises:
        ValueError: one line with the field, its value, the constraint and the nearest legal value.
    """
    if config.ep_peer_mib < 0:
        raise ValueError(f"parallel.ep_peer_mib = {config.ep_peer_mib}: must be at least 0")
    for name in ("pp", "cp", "tp", "ep", "vpp", "ep_chunks"):
        if getattr(config, name) < 1:
            raise ValueError(f"parallel.{name} = {getattr(config, name)}: must be at least 1")
    if config.timeout_s <= 0:
        raise ValueError(f"parallel.timeout_s = {config.timeout_s}: must be positive")
    _divides("tp", config.tp, limits.heads, "the attention heads")
    if limits.kv_heads % config.tp and config.tp % limits.kv_heads:
        legal = [d for d in _divisors(limits.heads) if limits.kv_heads % d == 0 or d % limits.kv_heads == 0]
        raise ValueError(f"parallel.tp = {config.tp}: must divide the {limits.kv_heads} key/value heads or be a multiple of them; "
                         f"nearest is {_nearest(config.tp, legal)}")
    _divides("ep", config.ep, limits.experts, "the experts")
    _check_stages(config, limits)
    ranks = config.pp * config.cp * config.tp
    if world % ranks:
        raise ValueError(f"parallel: pp x cp x tp = {config.pp} x {config.cp} x {config.tp} = {ranks} must divide the {world} ranks; "
                         f"nearest number of ranks is {max(1, round(world / ranks)) * ranks}")
    dp = config.dp(world)
    stage = dp * config.cp * config.tp
    if stage % config.ep:
        legal = [d for d in _divisors(limits.experts) if stage % d == 0]
        raise ValueError(f"parallel.ep = {config.ep}: must divide dp x cp x tp = {dp} x {config.cp} x {config.tp} = {stage}; "
                         f"nearest is {_nearest(config.ep, legal)}")
    if limits.forests_per_step % dp:
        legal = [dp * max(1, round(limits.forests_per_step / dp))]
        raise ValueError(f"stage.forests_per_step = {limits.forests_per_step}: must be a multiple of dp = {dp}; nearest is {legal[0]}")
    _check_microbatches(config, limits.forests_per_step // dp, dp)
    if limits.tokens_per_forest < config.cp * config.tp:
        raise ValueError(f"data.tokens_per_forest = {limits.tokens_per_forest}: fewer than cp x tp = {config.cp * config.tp}; "
                         f"at least {config.cp * config.tp}")


def _check_stages(config: ParallelConfig, limits: Limits) -> None:
    if config.schedule not in _LEGAL_VPP:
        raise ValueError(f"parallel.schedule = {config.schedule}: must be one of {', '.join(_LEGAL_VPP)}")
    low, high = _LEGAL_VPP[config.schedule] if config.pp > 1 else (1, 1)
    if not low <= config.vpp <= high:
        raise ValueError(f"parallel.vpp = {config.vpp}: with pp = {config.pp} and schedule = {config.schedule}, "
                         f"nearest is {min(max(config.vpp, low), high)}")
    most = limits.layers + 1  # the head may be alone on the last stage
    if config.pp * config.vpp > most:
        field, value, least = ("vpp", config.vpp, config.pp) if config.pp <= most else ("pp", config.pp, config.vpp)
        raise ValueError(f"parallel.{field} = {value}: pp x vpp = {config.pp * config.vpp} stages for {limits.layers} layers and the head; "
                         f"at most {max(1, most // least)}")


def _check_microbatches(config: ParallelConfig, count: int, dp: int) -> None:
    """torch's looped schedules go in rounds of about pp microbatches, of equal size."""
    if config.schedule in ("interleaved", "zero_bubble") and count % max(1, count // config.pp):
        legal = [n for n in range(1, count + config.pp + 1) if n % max(1, n // config.pp) == 0]
        raise ValueError(f"stage.forests_per_step = {count * dp}: {config.schedule} runs {max(1, count // config.pp)} rounds, which must "
                         f"divide the {count} forests per dp rank; nearest is {_nearest(count, legal) * dp}")


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _nearest(value: int, legal: Iterable[int]) -> int:
    return min(legal, key=lambda n: (abs(n - value), n))


def _divides(name: str, value: int, whole: int, what: str) -> None:
    if whole % value:
        raise ValueError(f"parallel.{name} = {value}: must divide {what}, {whole}; nearest is {_nearest(value, _divisors(whole))}")


def part(size: int, parts: int, index: int) -> tuple[int, int]:
    """[start, stop) of the index-th of ``parts`` nearly equal parts, the first ones larger by one."""
    base, extra = divmod(size, parts)
    start = index * base + min(index, extra)
    return start, start + base + (index < extra)

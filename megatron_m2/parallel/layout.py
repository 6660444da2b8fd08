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
    """

    pp: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1

    def dp(self, world: int) -> int:
        return world // (self.pp * self.cp * self.tp)


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
    for name in ("pp", "cp", "tp", "ep"):
        if getattr(config, name) < 1:
            raise ValueError(f"parallel.{name} = {getattr(config, name)}: must be at least 1")
    _divides("tp", config.tp, limits.heads, "the attention heads")
    if limits.kv_heads % config.tp and config.tp % limits.kv_heads:
        legal = [d for d in _divisors(limits.heads) if limits.kv_heads % d == 0 or d % limits.kv_heads == 0]
        raise ValueError(f"parallel.tp = {config.tp}: must divide the {limits.kv_heads} key/value heads or be a multiple of them; "
                         f"nearest is {_nearest(config.tp, legal)}")
    _divides("ep", config.ep, limits.experts, "the experts")
    if config.pp > limits.layers:
        raise ValueError(f"parallel.pp = {config.pp}: more than the {limits.layers} layers; at most {limits.layers}")
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
    if limits.tokens_per_forest < config.cp * config.tp:
        raise ValueError(f"data.tokens_per_forest = {limits.tokens_per_forest}: fewer than cp x tp = {config.cp * config.tp}; "
                         f"at least {config.cp * config.tp}")


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

"""Pipeline parallelism: the model's layers over stages, microbatches in the order of one of torch's schedules.

torch.distributed.pipelining decides what each rank computes when. Its own runtime allocates every microbatch's buffers in one shape
before the first one runs; forests differ in size, so the loop here receives each into a buffer of its own, when its turn comes.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

# the one way to ask a schedule for its order without processes and models
from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops

from megatron_m2.ops.weight_grad import Later, Left, compute_left
from megatron_m2.parallel.mesh import Axis

# By our names those of torch. Of 1F1B torch lists no usable order (its list for drawing starts with a later microbatch).
SPLIT_BACKWARD = ("zero_bubble", "zbv")
SCHEDULES = {"1f1b": "1F1B", "interleaved": "Interleaved1F1B", "zero_bubble": "InterleavedZeroBubble", "zbv": "ZBVZeroBubble"}
_TIMED_AS = {"F": "forward", "B": "backward", "I": "backward", "W": "backward"}
_KINDS = {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}

# ---- which layers ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Span:
    """Layers [start, stop) of a model; the first span has the embedding too, the last one all that comes after the layers."""

    start: int
    stop: int
    first: bool = True
    last: bool = True


def split_layers(costs: Sequence[float], after: float, stages: int) -> list[Span]:
    """Consecutive layers for every stage, such that the costliest stage costs least; a last stage may have no layer at all.

    Args:
        costs: of each layer, in any unit. after: of the head and what else the last stage does.

    Raises:
        ValueError: fewer layers and heads than stages.
    """
    items = [*costs, after]
    if stages > len(items):
        raise ValueError(f"parallel: pp x vpp = {stages} stages for {len(costs)} layers and the head; at most {len(items)}")
    before = [0.0]
    for cost in items:
        before.append(before[-1] + cost)
    # best[n]: (costliest stage, where the last stage starts) of the first n items over the stages so far
    best: list[tuple[float, list[int]]] = [(before[n], [0]) for n in range(len(items) + 1)]
    for stage in range(1, stages):
        best = [min(((max(best[cut][0], before[n] - before[cut]), [*best[cut][1], cut]) for cut in range(stage, n)),
                    default=(float("inf"), [])) for n in range(len(items) + 1)]
    starts = best[-1][1]
    stops = [*starts[1:], len(costs)]
    return [Span(start, min(stop, len(costs)), s == 0, s == stages - 1)
            for s, (start, stop) in enumerate(zip(starts, stops, strict=True))]


# ---- in which order ------------------------------------------------------------------------------------------------------------------


class Action(NamedTuple):
    """One thing a rank does. Kinds: F forward, B backward, I and W its halves for inputs and for weights; SEND_F, RECV_F, SEND_B and
    RECV_B: activations and their gradients."""

    kind: str
    stage: int
    microbatch: int


@lru_cache(maxsize=64)
def schedule(name: str, ranks: int, stages_per_rank: int, microbatches: int) -> tuple[tuple[Action, ...], ...]:
    """What each rank does, in order.

    Args:
        name: a key of ``SCHEDULES``.

    Raises:
        ValueError: this schedule cannot be for these numbers.
    """
    if ranks == 1:
        return (tuple(Action(kind, 0, m) for m in range(microbatches) for kind in "FB"),)
    if name == "1f1b":
        return _with_transfers([_one_forward_one_backward(rank, ranks, microbatches) for rank in range(ranks)])
    orders = get_schedule_ops(SCHEDULES[name], ranks, microbatches, stages_per_rank)
    return _with_transfers([[Action(_KINDS[a.computation_type.name], a.stage_index, int(a.microbatch_index or 0))
                             for a in order if a is not None and a.computation_type.name in _KINDS] for order in orders])


def _one_forward_one_backward(rank: int, ranks: int, microbatches: int) -> list[Action]:
    """As many forwards ahead as stages follow, then one backward after every forward (Narayanan et al. 2019, PipeDream-Flush)."""
    ahead = min(ranks - rank - 1, microbatches)
    forwards = [Action("F", rank, m) for m in range(microbatches)]
    backwards = [Action("B", rank, m) for m in range(microbatches)]
    steady = [action for pair in zip(forwards[ahead:], backwards, strict=False) for action in pair]
    return [*forwards[:ahead], *steady, *backwards[microbatches - ahead :]]


def stage_ranks(orders: Sequence[Iterable[Action]]) -> list[int]:
    """The rank of every stage."""
    found = {action.stage: rank for rank, order in enumerate(orders) for action in order}
    return [found[stage] for stage in range(len(found))]


def _with_transfers(orders: Sequence[Sequence[Action]]) -> tuple[tuple[Action, ...], ...]:
    """Adds sends and receives: both ends of a transfer join their rank's list at one moment of a simulated run, so any two ranks
    list their common transfers in the same order and never wait for each other crosswise."""
    rank_of = stage_ranks(orders)
    waiting, done, whole = [deque(order) for order in orders], set[Action](), [list[Action]() for _ in orders]
    while any(waiting):
        moved = False
        for rank, queue in enumerate(waiting):
            if not queue or not _needs(queue[0], len(rank_of)) <= done:
                continue
            action, moved = queue.popleft(), True
            done.add(_as_needed(action))
            whole[rank].append(action)
            kind, step = ("F", 1) if action.kind == "F" else ("B", -1)
            to = action.stage + step
            if action.kind != "W" and 0 <= to < len(rank_of) and rank_of[to] != rank:
                whole[rank].append(Action(f"SEND_{kind}", action.stage, action.microbatch))
                whole[rank_of[to]].append(Action(f"RECV_{kind}", to, action.microbatch))
        if not moved:
            raise ValueError("parallel.schedule: the ranks would wait for each other")
    return tuple(tuple(order) for order in whole)


def _needs(action: Action, stages: int) -> set[Action]:
    """What is computed before ``action``."""
    kind, stage, m = action
    if kind == "F":
        return {Action("F", stage - 1, m)} if stage > 0 else set()
    if kind == "W":
        return {Action("B", stage, m)}
    return {Action("F", stage, m), Action("B", stage + 1, m)} if stage < stages - 1 else {Action("F", stage, m)}


def _as_needed(action: Action) -> Action:
    """Others wait for the gradient of an input alike, whether that of the weights came with it (B) or is left for later (I)."""
    return action._replace(kind="B") if action.kind == "I" else action


# ---- running it --------------------------------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """What one stage makes of one microbatch: the next stage's input (None at the end), and its own share of the loss, if any."""

    output: Tensor | None
    loss: Tensor | None

    def outputs(self) -> list[Tensor]:
        return [t for t in self if t is not None and t.requires_grad]


Forward = Callable[[int, int, Tensor | None], Part]  # stage, microbatch, input (None on the first stage)


@dataclass
class Pipeline:
    """One rank's stages.

    Attributes:
        axis: ranks of the pipeline. rank_of: the rank of every stage.
        chunks: this rank's part of the model, by stage.
        like: an empty tensor with the dtype and device of activations.
        later: of schedules that split the backward: takes the gradients of each stage's weights.
        seconds: that the last :meth:`train` spent in forwards, backwards and transfers between stages, as the device sees it.
    """

    axis: Axis
    rank_of: Sequence[int]
    chunks: Mapping[int, nn.Module]
    like: Tensor
    later: Mapping[int, Later]
    seconds: dict[str, float] = field(default_factory=dict)

    def train(self, order: Iterable[Action], forward: Forward, shapes: Sequence[tuple[int, ...]],
              before_backward: Callable[[int], None]) -> None:
        """Forward and backward of every microbatch.

        Args:
            shapes: of what passes between stages, per microbatch.
            before_backward: called with the stage before what completes its weights' gradients of one microbatch.
        """
        run = _Run(self, forward, shapes, before_backward)
        self.seconds = {"forward": 0.0, "backward": 0.0, "communication": 0.0}
        now = self._clock()
        for action in order:
            run.step(action)
            before, now = now, self._clock()
            self.seconds[_TIMED_AS.get(action.kind, "communication")] += now - before
        run.finish()
        self.seconds["communication"] += self._clock() - now

    def _clock(self) -> float:
        if self.like.device.type == "cuda":
            torch.cuda.synchronize(self.like.device)  # a microbatch takes long enough to hide it
        return time.perf_counter()

    @torch.no_grad()
    def forward_only(self, microbatches: int, forward: Forward, shapes: Sequence[tuple[int, ...]]) -> None:
        """Forward of every microbatch, one after the other through this rank's stages."""
        run = _Run(self, forward, shapes, lambda stage: None)
        for m in range(microbatches):
            for stage in sorted(self.chunks):
                if stage > 0 and self.rank_of[stage - 1] != self.axis.rank:
                    run.step(Action("RECV_F", stage, m))
                run.step(Action("F", stage, m))
                if stage + 1 < len(self.rank_of) and self.rank_of[stage + 1] != self.axis.rank:
                    run.step(Action("SEND_F", stage, m))
        run.finish()


class _Run:
    """State of one pass over the microbatches; keys are (stage, microbatch)."""

    def __init__(self, pipeline: Pipeline, forward: Forward, shapes: Sequence[tuple[int, ...]],
                 before_backward: Callable[[int], None]) -> None:
        self.pipeline, self.forward, self.shapes, self.before_backward = pipeline, forward, shapes, before_backward
        self.inputs: dict[tuple[int, int], Tensor] = {}
        self.parts: dict[tuple[int, int], Part] = {}
        self.grads: dict[tuple[int, int], Tensor] = {}  # of outputs
        self.halves: dict[tuple[int, int], Left] = {}  # what backwards left for the weights
        self.receiving: dict[tuple[str, int, int], list[dist.Work]] = {}
        self.sending: list[tuple[list[dist.Work], Tensor]] = []  # the tensor lives until it has left

    def step(self, action: Action) -> None:
        kind, key = action.kind, (action.stage, action.microbatch)
        if kind == "F":
            self._forward(key)
        elif kind == "B":
            self._backward(key)
        elif kind == "I":
            self._backward_input(key)
        elif kind == "W":
            self.before_backward(action.stage)
            compute_left(self.halves.pop(key))
        else:
            self._transfer(kind, key)

    def finish(self) -> None:
        """Waits for what is still on its way out."""
        for works, _ in self.sending:
            for work in works:
                work.wait()
        assert not any((self.inputs, self.parts, self.grads, self.halves, self.receiving))

    def _local(self, stage: int) -> bool:
        return 0 <= stage < len(self.pipeline.rank_of) and self.pipeline.rank_of[stage] == self.pipeline.axis.rank

    # ---- transfers

    def _transfer(self, kind: str, key: tuple[int, int]) -> None:
        stage, m = key
        forward, send = kind.endswith("F"), kind.startswith("SEND")
        peer = self.pipeline.rank_of[stage + (1 if forward == send else -1)]
        if send:
            tensor = self._outgoing(forward, key)
        else:
            tensor = self.pipeline.like.new_empty(self.shapes[m])
            (self.inputs if forward else self.grads)[key] = tensor
        self._drop_sent()
        works = dist.batch_isend_irecv([dist.P2POp(dist.isend if send else dist.irecv, tensor, group=self.pipeline.axis.group,
                                                   group_peer=peer)])
        if send:
            self.sending.append((works, tensor))
        else:
            self.receiving[kind, stage, m] = works

    def _outgoing(self, forward: bool, key: tuple[int, int]) -> Tensor:
        if not forward:
            return self.inputs.pop(key)  # by now it is the input's gradient
        output = self.parts[key].output
        assert output is not None
        if not torch.is_grad_enabled():
            self.parts.pop(key)
        return output.detach().contiguous()

    def _drop_sent(self) -> None:
        self.sending = [(works, tensor) for works, tensor in self.sending if not all(work.is_completed() for work in works)]

    def _received(self, kind: str, key: tuple[int, int]) -> None:
        for work in self.receiving.pop((kind, *key), []):
            work.wait()

    # ---- computations

    def _forward(self, key: tuple[int, int]) -> None:
        stage, m = key
        self._received("RECV_F", key)
        x = self.inputs.get(key)
        training = torch.is_grad_enabled()
        if x is not None and training:
            x.requires_grad_()
        part = self.forward(stage, m, x)
        if training:
            self.parts[key] = part
        else:
            self.inputs.pop(key, None)
            if part.output is not None and not self._local(stage + 1):
                self.parts[key] = part  # until it is sent
        if part.output is not None and self._local(stage + 1):
            self.inputs[stage + 1, m] = part.output.detach()

    def _output_grads(self, key: tuple[int, int], part: Part) -> list[Tensor]:
        self._received("RECV_B", key)
        return [self.grads.pop(key) if t is part.output else torch.ones_like(t) for t in part.outputs()]

    def _backward(self, key: tuple[int, int]) -> None:
        part = self.parts.pop(key)
        grads = self._output_grads(key, part)
        self.before_backward(key[0])
        torch.autograd.backward(part.outputs(), grads)
        self._pass_gradient(key)

    def _backward_input(self, key: tuple[int, int]) -> None:
        """The half that the stage before waits for."""
        part = self.parts.pop(key)
        with self.pipeline.later[key[0]].collecting() as left:
            torch.autograd.backward(part.outputs(), self._output_grads(key, part))
        self.halves[key] = left
        self._pass_gradient(key)

    def _pass_gradient(self, key: tuple[int, int]) -> None:
        """Keeps the input's gradient where it is needed next."""
        x = self.inputs.pop(key, None)
        if x is None:
            return
        assert x.grad is not None
        stage, m = key
        if self._local(stage - 1):
            self.grads[stage - 1, m] = x.grad
        else:
            self.inputs[key] = x.grad  # SEND_B takes it from here


#!/usr/bin/env python3
"""Dispatch + combine of expert parallelism on gloo ranks of this machine, beside the plain path on the same routing in the same run.

    python tools/bench/expert_parallel.py [--ranks 4 --tokens 2048 --hidden 1024 --experts 64 --top-k 8 --rounds 15]
                                          [--cards results --commit $(git rev-parse HEAD)]

The plain path is that of an all-to-all dispatcher: one row per (token, choice), index_select by expert, all_to_all_single, index_select
by local expert, and all of it back, then weights and index_add. Both end and begin at rows grouped by local expert; the experts
themselves are the identity, so that what is timed is moving rows. Both are first checked against a sum that no rank communicates for.
Balanced: every expert equally likely; natural: probabilities as 1 / k of the k-th most popular expert (Zipf), in random order.
Prints a table, bytes sent included, and one JSON object per figure, the last line being the last figure's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the package of this checkout, installed or not

from megatron_m2.ops import _extension
from megatron_m2.ops.expert_parallel import plan_rows
from megatron_m2.ops.experts import swiglu_experts
from megatron_m2.ops.permute import permute, permute_layout, unpermute
from megatron_m2.parallel.collectives import all_to_all, exchange_rows
from megatron_m2.parallel.expert import expert_parallel
from megatron_m2.parallel.mesh import Axis
from megatron_m2.training.memory import keep_freed_memory
from tools.bench.common import Figure, add_card_arguments, device_name, report, write_cards

Rows = Callable[[Tensor, Tensor], Tensor]  # rows grouped by local expert, and the rows of each expert -> rows
Layer = Callable[[Tensor, Tensor, Tensor], Tensor]


def routing(kind: str, tokens: int, experts: int, top_k: int, rank: int) -> Tensor:
    """int32 [tokens, top_k], drawn without replacement."""
    weight = torch.ones(experts)
    if kind == "natural":
        weight = 1 / (1 + torch.randperm(experts, generator=torch.Generator().manual_seed(1)))  # the same on every rank
    gumbel = -torch.empty(tokens, experts).exponential_(generator=torch.Generator().manual_seed(2 + rank)).log()
    return (gumbel + weight.log()).topk(top_k).indices.int()


def plain(axis: Axis, num_experts: int, experts_rows: Rows, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    per_rank, top_k = num_experts // axis.size, experts.shape[1]
    order = experts.flatten().argsort(stable=True)
    token = order // top_k
    counts = torch.bincount(experts.flatten(), minlength=num_experts)
    arriving = all_to_all(counts, axis, [per_rank] * axis.size, [per_rank] * axis.size)
    send, receive = (c.view(axis.size, per_rank).sum(1).tolist() for c in (counts, arriving))
    rows = exchange_rows(x.index_select(0, token), axis, send, receive)
    local = torch.arange(per_rank).repeat(axis.size).repeat_interleave(arriving)
    by_expert = local.argsort(stable=True)
    done = experts_rows(rows.index_select(0, by_expert), arriving.view(axis.size, per_rank).sum(0))
    back = exchange_rows(done.index_select(0, by_expert.argsort()), axis, receive, send)
    weighted = back * weights.flatten().index_select(0, order)[:, None].to(back.dtype)
    return torch.zeros_like(x).index_add(0, token, weighted)


def ours(axis: Axis, num_experts: int, experts_rows: Rows, x: Tensor, weights: Tensor, experts: Tensor, fp8: bool = False) -> Tensor:
    def local(x: Tensor, weights: Tensor, experts: Tensor, routed: int) -> Tensor:
        layout = permute_layout(experts, num_experts // axis.size, 1, routed)
        counts = layout.ends.diff(prepend=layout.ends.new_zeros(1))
        return unpermute(experts_rows(permute(x, layout), counts), layout, weights)

    return expert_parallel(x, weights, experts, num_experts, axis, local, fp8_payload=fp8)


def identity(rows: Tensor, counts: Tensor) -> Tensor:
    return rows


def scaled(first: int, rows: Tensor, counts: Tensor) -> Tensor:
    """Expert e doubles its rows e % 3 times."""
    return rows * (2.0 ** ((first + torch.arange(len(counts))) % 3)).repeat_interleave(counts)[:, None].to(rows.dtype)


def check(layer: Callable[..., Tensor], axis: Axis, num_experts: int, batch: tuple[Tensor, Tensor, Tensor], tolerance: float) -> None:
    """Output and gradients beside the sum that needs no exchange."""
    x, weights, experts = batch
    grad = torch.randn_like(x)
    out = layer(axis, num_experts, partial(scaled, axis.rank * (num_experts // axis.size)), x, weights, experts)
    factor = 2.0 ** (experts % 3)
    wanted = x.double() * (weights.double() * factor).sum(1, keepdim=True)
    got = (out, *torch.autograd.grad(out, (x, weights), grad))
    for a, b in zip(got, (wanted, *torch.autograd.grad(wanted, (x, weights), grad.double())), strict=True):
        error = float((a.detach().double() - b.detach()).abs().max() / b.detach().abs().max())
        assert error < tolerance, f"{layer}: off by {error}"


def seconds(works: list[Callable[[], object]], rounds: int) -> list[float]:
    """Median over rounds of the slowest rank's time of each work; the works alternate, and so does which begins."""
    times = torch.zeros(rounds + 1, len(works), dtype=torch.float64)
    for i in range(rounds + 1):
        for j in range(len(works)) if i % 2 else reversed(range(len(works))):
            dist.barrier()
            start = time.perf_counter()
            works[j]()
            times[i, j] = time.perf_counter() - start
    dist.all_reduce(times, dist.ReduceOp.MAX)
    return [statistics.median(column) for column in times[1:].t().tolist()]


def forward(layer: Layer, x: Tensor, weights: Tensor, experts: Tensor) -> None:
    with torch.no_grad():
        layer(x, weights, experts)


def forward_backward(layer: Layer, grad: Tensor, x: Tensor, weights: Tensor, experts: Tensor) -> None:
    torch.autograd.grad(layer(x, weights, experts), (x, weights), grad)


def sent_per_token(experts: Tensor, num_experts: int, axis: Axis, row_bytes: tuple[int, int]) -> list[float]:
    """Bytes that leave a rank per token, there and back, mean of all ranks: rows of ours, and one for each choice."""
    others = torch.arange(axis.size) != axis.rank
    rows, choices = (int(n) for n in plan_rows(experts, num_experts, axis.size).counts[others].sum(0))
    total = torch.tensor([rows * row_bytes[0], choices * row_bytes[1], len(experts)], dtype=torch.float64)
    dist.all_reduce(total)
    return (total[:2] / total[2]).tolist()


def run_rank(rank: int, a: argparse.Namespace, folder: str) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()  # as training does, for both
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=a.ranks)
    torch.manual_seed(rank)
    axis = Axis(a.ranks, rank, dist.group.WORLD)
    x = torch.randn(a.tokens, a.hidden).bfloat16().requires_grad_()
    weights = torch.rand(a.tokens, a.top_k).requires_grad_()
    grad = torch.randn_like(x)
    fixed = partial(plain, axis, a.experts, identity), partial(ours, axis, a.experts, identity)
    device = f"{device_name(torch.device('cpu')).split(',')[0]}, {a.ranks} gloo ranks of 1 thread on {os.cpu_count()} cores"
    shape = f"{a.tokens}x{a.hidden} {a.top_k}/{a.experts}"
    figures: list[Figure] = []

    def add(metric: str, mine: float, baseline: float, unit: str = "us", target: str = "") -> None:
        scale = 1e6 if unit == "us" else 1
        figures.append(Figure("expert_parallel", f"{metric}, {shape}", mine * scale, baseline * scale, 0, device, target, unit))

    add_overlap(add, a, axis, x, weights)
    for kind in ("natural", "balanced"):
        experts = routing(kind, a.tokens, a.experts, a.top_k, rank)
        batch = x, weights, experts
        for layer, tolerance in ((plain, 2**-5), (ours, 2**-7), (partial(ours, fp8=True), 2**-4)):  # the plain sum is rounded k times
            check(layer, axis, a.experts, batch, tolerance)
        meta = -(-4 * a.top_k // 16) * 32
        mine, theirs = sent_per_token(experts, a.experts, axis, (4 * a.hidden + meta, 4 * a.hidden))
        add(f"sent per token, {kind}", mine, theirs, "B")
        fp8 = partial(ours, axis, a.experts, identity, fp8=True)
        theirs, mine, mine_fp8 = seconds([partial(forward, layer, *batch) for layer in (*fixed, fp8)], a.rounds)
        add(f"forward, fp8 payload, {kind}", mine_fp8, theirs)
        add(f"forward, {kind}", mine, theirs, target=">= 1.5x")
        theirs, mine = seconds([partial(forward_backward, layer, grad, *batch) for layer in fixed], a.rounds)
        add(f"forward+backward, {kind}", mine, theirs, target=">= 1.5x")
    if rank == 0:
        Path(folder, "figures").write_text(json.dumps([vars(f) for f in figures]))
    dist.destroy_process_group()


def add_overlap(add: Callable[..., None], a: argparse.Namespace, axis: Axis, x: Tensor, weights: Tensor) -> None:
    """Two chunks beside one, with experts that compute."""
    mine, width = a.experts // a.ranks, a.hidden // 4
    gate_up, down = (torch.randn(mine, *shape).bfloat16() / a.hidden**0.5 for shape in ((2 * width, a.hidden), (a.hidden, width)))
    experts = routing("balanced", a.tokens, a.experts, a.top_k, axis.rank)

    def layer(chunks: int, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        return expert_parallel(x, weights, experts, a.experts, axis, lambda x, w, e, n: swiglu_experts(x, gate_up, down, w, e, routed=n),
                               chunks=chunks)

    one, two = seconds([partial(forward, partial(layer, chunks), x, weights, experts) for chunks in (1, 2)], max(3, a.rounds // 3))
    add(f"2 chunks beside 1, experts of width {width}", two, one)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("ranks", 4), ("tokens", 2048), ("hidden", 1024), ("experts", 64), ("top-k", 8), ("rounds", 15)):
        parser.add_argument(f"--{name}", type=int, default=value)
    add_card_arguments(parser)
    a = parser.parse_args()
    if not _extension.available():
        raise SystemExit("no kernels: the bench would time the reference")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run_rank, (a, folder), a.ranks)
        figures = [Figure(**values) for values in json.loads(Path(folder, "figures").read_text())]
    report(figures)
    if a.cards:
        write_cards(figures, a.cards, a.commit)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""A large tree trained in pieces: its memory beside that of its longest path alone, its gradients and its time beside the whole at once.

    python tools/bench/streaming.py [--prefix 32768 --branches 64 --branch 4096 --piece 4096] [--device cpu]

Memory is the most that torch's allocator holds during forward and backward of a tiny bf16 model, weights and sums of gradients apart. The
tree at once, which tells what its gradients are, recomputes its layers to fit. Forests have routes. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the package of this checkout, installed or not

from megatron_m2.forest import TokenForest
from megatron_m2.model.config import ModelConfig
from megatron_m2.model.m2 import M2Model, M2Output, build_model
from megatron_m2.training.memory import keep_freed_memory, peak_bytes
from megatron_m2.training.pieces import cut, lightest_first
from megatron_m2.training.streaming import stream
from tools.bench.common import Figure, add_card_arguments, device_name, report, write_cards

MODEL = ModelConfig(vocab_size=2048, hidden_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=64,
                    rotary_dim=32, num_experts=16, top_k=4, intermediate_size=64)


def star(prefix: int, branches: int, length: int) -> TokenForest:
    """A prefix and its branches: random tokens, on random routes, since choices of experts that flip would be no rounding."""
    generator, total = torch.Generator().manual_seed(0), prefix + branches * length
    parent = torch.arange(-1, total - 1)
    parent[prefix::length] = prefix - 1
    forest = TokenForest.from_parent(torch.randint(0, MODEL.vocab_size, (total,), generator=generator).numpy(), parent.numpy())
    routes = torch.rand(total, MODEL.num_hidden_layers, MODEL.num_experts, generator=generator).topk(MODEL.top_k).indices
    return replace(forest, routes=routes.short())


def mean_loss(microbatch: int, output: M2Output) -> Tensor:
    return -output.logprobs.sum() / len(output.logprobs)


def at_once(model: M2Model, forest: TokenForest) -> None:
    output = model(forest)
    assert isinstance(output, M2Output)
    mean_loss(0, output).backward()


def measured(model: M2Model, work: Callable[[], object], device: torch.device) -> tuple[float, list[Tensor]]:
    """Peak memory in MiB, and the gradients, summed in fp32 as an optimizer does."""
    parameters = list(model.parameters())
    sums = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]

    def move(p: Tensor, into: Tensor) -> None:
        assert p.grad is not None
        into += p.grad
        p.grad = None

    hooks = [p.register_post_accumulate_grad_hook(partial(move, into=into)) for p, into in zip(parameters, sums, strict=True)]
    peak = peak_bytes(work, device) / 2**20
    for hook in hooks:
        hook.remove()
    return peak, sums


def medians_us(works: Sequence[Callable[[], object]], device: torch.device, rounds: int) -> list[float]:
    """Median time of each, taken in turn."""
    times: list[list[float]] = [[] for _ in works]
    for _ in range(rounds + 1):
        for work, mine in zip(works, times, strict=True):
            start = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            mine.append(1e6 * (time.perf_counter() - start))
    return [statistics.median(mine[1:]) for mine in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("prefix", 32_768), ("branches", 64), ("branch", 4096), ("piece", 4096), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_card_arguments(parser)
    a = parser.parse_args()
    keep_freed_memory()
    device = torch.device(a.device)
    model = build_model(MODEL, torch.bfloat16, device, seed=0)
    figures: list[Figure] = []

    def add(metric: str, value: float, baseline: float, unit: str, target: str = "") -> None:
        figures.append(Figure("streaming", metric, value, baseline, 0, device_name(device), target, unit))

    def in_pieces(forest: TokenForest, piece_tokens: int) -> Callable[[], object]:
        return lambda: stream(model, forest, mean_loss, 0, piece_tokens)

    def whole(forest: TokenForest) -> Callable[[], object]:
        return lambda: at_once(model, forest)

    for name, forest in (("tree", star(a.prefix // 8, a.branches // 8, a.branch // 4)), ("chain", star(a.prefix // 4, 1, 1))):
        forest = forest.to(device)
        for piece in (len(forest), a.piece // 4):
            mine, theirs = medians_us([in_pieces(forest, piece), whole(forest)], device, a.rounds)
            add(f"time of a {name} of {len(forest)} in pieces of {piece}, beside at once", mine, theirs, "us")

    tree, path = star(a.prefix, a.branches, a.branch), star(a.prefix, 1, a.branch)
    pieces = [len(cut(lightest_first(forest)[0], a.piece)) for forest in (tree, path)]
    tree, path = tree.to(device), path.to(device)
    of_path, _ = measured(model, in_pieces(path, a.piece), device)
    of_path_at_once, _ = measured(model, whole(path), device)
    of_tree, found = measured(model, in_pieces(tree, a.piece), device)
    model.recompute = True
    of_tree_at_once, expected = measured(model, whole(tree), device)
    difference = max(float((x - y).norm() / y.norm()) for x, y in zip(found, expected, strict=True))
    print(f"{pieces[0]} pieces for the tree's {len(tree)} tokens, {pieces[1]} for the path's {len(path)}")
    print(f"gradients of the tree in pieces and at once differ by {difference:.1e} of their norm at most: bf16 rounds so")
    shape = f"{a.branches} x {a.branch} behind {a.prefix}, pieces of {a.piece}"
    add(f"memory of {shape}, beside at once with recomputation", of_tree, of_tree_at_once, "MiB")
    add(f"memory of {shape}, beside its longest path at once", of_tree, of_path_at_once, "MiB")
    add(f"memory of {shape}, beside its longest path in pieces", of_tree, of_path, "MiB", ">= 0.77: at most 1.3x")
    report(figures)
    if a.cards:
        write_cards(figures, a.cards, a.commit)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Time of each op beside eager PyTorch in the same run, on this machine's GPU if it has one, else its CPU.

    python tools/bench/ops.py [--device cpu] [--cards results --commit $(git rev-parse HEAD)]

Prints a table and one JSON object per figure, the last line being the last figure's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the package of this checkout, installed or not

from megatron_m2.ops import _extension
from megatron_m2.ops.router import sigmoid_router
from megatron_m2.training.memory import keep_freed_memory
from tools.bench import op_grouped_gemm, op_linear_cross_entropy, op_norm_rope, op_permute, op_tree_attention
from tools.bench.common import Figure, add_card_arguments, device_name, medians_us, report, write_cards

# ---- router: 8192 tokens, 256 experts, top 8 ---------------------------------------------------------------------------------------


def eager_router(logits: Tensor, bias: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """What a plain PyTorch model writes (transformers' MiniMaxM2, with the counts that the bias update needs)."""
    scores = logits.sigmoid()
    experts = (scores + bias).topk(top_k, dim=-1).indices
    chosen = scores.gather(1, experts)
    counts = torch.zeros(logits.shape[1], dtype=torch.int64, device=logits.device)
    counts.scatter_add_(0, experts.flatten(), torch.ones_like(experts).flatten())
    return chosen / chosen.sum(-1, keepdim=True), experts, counts


def bench_router(device: torch.device) -> list[Figure]:
    tokens, experts, top_k = 8192, 256, 8
    num_inputs = 1 if device.type == "cpu" else 16  # 134 MB of logits: beyond a GPU's L2
    logits = [torch.randn(tokens, experts, device=device, requires_grad=True) for _ in range(num_inputs)]
    bias = 0.01 * torch.randn(experts, device=device)
    grad = torch.randn(tokens, top_k, device=device)

    def forward(route: Callable[..., tuple[Tensor, ...]]) -> Callable[[int], None]:
        @torch.no_grad()
        def work(i: int) -> None:
            route(logits[i], bias, top_k)

        return work

    def forward_backward(route: Callable[..., tuple[Tensor, ...]]) -> Callable[[int], None]:
        def work(i: int) -> None:
            torch.autograd.grad(route(logits[i], bias, top_k)[0], logits[i], grad)

        return work

    read, routes, written = 4 * tokens * experts, 8 * tokens * top_k, 4 * tokens * experts
    on_cpu = device.type == "cpu"
    cases = [("forward", forward, read + routes, "" if on_cpu else "<= 10 us on one H100"),
             ("forward+backward", forward_backward, read + routes + 12 * tokens * top_k + written, ">= 6x" if on_cpu else "")]
    figures = []
    for name, work, bytes_moved, target in cases:
        mine, eager = medians_us([work(sigmoid_router), work(eager_router)], num_inputs, device)
        figures.append(Figure("router", f"{name} {tokens}x{experts} top-{top_k}", mine, eager, bytes_moved, device_name(device), target))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--only", nargs="*", help="names of the ops to time; default all")
    add_card_arguments(parser)
    a = parser.parse_args()
    if not _extension.available(a.device):
        raise SystemExit(f"no kernels for {a.device}: the bench would time the reference against itself")
    keep_freed_memory()  # as training does: the times are of kernels, not of page faults
    torch.manual_seed(0)
    device = torch.device(a.device)
    benches = {"router": bench_router, "permute": op_permute.bench, "grouped_gemm": op_grouped_gemm.bench,
               "tree_attention": op_tree_attention.bench, "norm_rope": op_norm_rope.bench,
               "linear_cross_entropy": op_linear_cross_entropy.bench}
    figures = [figure for name, bench in benches.items() if not a.only or name in a.only for figure in bench(device)]
    report(figures)
    if a.cards:
        write_cards(figures, a.cards, a.commit)


if __name__ == "__main__":
    main()

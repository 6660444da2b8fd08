"""Prefix-tree attention beside torch's causal attention: on one chain, on a star, and on the quickstart's batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_m2.ops.tree_attention import tree_attention
from tools.bench.common import Figure, device_name, medians_us


def star(prefix: int, branches: int, length: int) -> Tensor:
    """``subtree_end`` of one prefix and its branches."""
    total = prefix + branches * length
    ends = torch.full((total,), total, dtype=torch.int32)
    for b in range(branches):
        ends[prefix + b * length : prefix + (b + 1) * length] = prefix + (b + 1) * length
    return ends


def visible_pairs(subtree_end: Tensor) -> int:
    return int((subtree_end - torch.arange(len(subtree_end))).sum())


def bench(device: torch.device) -> list[Figure]:
    cases = [("chain of 4096", star(4096, 0, 0), (1, 4096), (8, 2, 128), ">= 1.3x", 5),
             ("star 4096 + 16 x 256, beside 16 sequences of 4352", star(4096, 16, 256), (16, 4352), (8, 2, 128), "", 1),
             ("4 chains of 512", torch.arange(1, 5).repeat_interleave(512).mul(512).int(), (4, 512), (2, 1, 64), ">= 1x", 15)]
    figures = []
    for name, ends, (batch, length), (heads, kv_heads, dim), target, rounds in cases:
        counts = (heads, kv_heads, kv_heads)
        tree = [torch.randn(len(ends), n, dim, device=device).bfloat16().requires_grad_() for n in counts]
        plain = [torch.randn(batch, n, length, dim, device=device).bfloat16().requires_grad_() for n in counts]
        mine = step(tree_attention, tree, ends.to(device))
        theirs = step(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), plain)
        value, baseline = medians_us([mine, theirs], 1, device, rounds=rounds)
        if not target:
            target = f">= {0.9 * batch * length * (length + 1) / 2 / visible_pairs(ends):.1f}x: 0.9 of the ratio of visible pairs"
        figures.append(Figure("tree_attention", f"forward+backward {name}, {heads}/{kv_heads} heads, d {dim}", value, baseline, 0,
                              device_name(device), target))
    return figures


def step(attention: Callable[..., Tensor], operands: list[Tensor], *rest: Tensor) -> Callable[[int], None]:
    grad = torch.randn_like(operands[0])

    def work(_: int) -> None:
        torch.autograd.grad(attention(*operands, *rest), operands, grad)

    return work

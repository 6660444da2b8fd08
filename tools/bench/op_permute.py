"""Permute + unpermute beside index_select / index_add."""

from __future__ import annotations

import torch

from megatron_m2.ops.permute import permute, permute_layout, unpermute
from tools.bench.common import Figure, device_name, medians_us

TOKENS, WIDTH, EXPERTS, TOP_K = 8192, 1024, 32, 8


def bench(device: torch.device) -> list[Figure]:
    experts = torch.rand(TOKENS, EXPERTS, device=device).argsort(-1)[:, :TOP_K].int()
    x = torch.randn(TOKENS, WIDTH, device=device, dtype=torch.bfloat16, requires_grad=True)
    weights = torch.rand(TOKENS, TOP_K, device=device, requires_grad=True)
    grad = torch.randn_like(x)

    def mine(_: int) -> None:
        layout = permute_layout(experts, EXPERTS)
        out = unpermute(permute(x, layout), layout, weights)
        torch.autograd.grad(out, (x, weights), grad)

    def eager(_: int) -> None:
        order = experts.flatten().argsort(stable=True)
        token = order // TOP_K
        rows = x.index_select(0, token)
        weighted = rows * weights.flatten().index_select(0, order)[:, None].to(rows.dtype)
        out = torch.zeros_like(x).index_add(0, token, weighted)
        torch.autograd.grad(out, (x, weights), grad)

    value, baseline = medians_us([mine, eager], 1, device, rounds=7)
    rows_bytes = 2 * TOKENS * TOP_K * WIDTH
    figure_name = f"forward+backward {TOKENS}x{WIDTH} top-{TOP_K}"
    return [Figure("permute", figure_name, value, baseline, 5 * rows_bytes, device_name(device), ">= 2x")]



"""QK norm + partial RoPE beside the same in eager PyTorch, and RMSNorm alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_m2.ops.norm_rope import norm_rope, rotary_angles
from tools.bench.common import Figure, device_name, medians_us


def eager(x: Tensor, weight: Tensor, eps: float, heads: int, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """As transformers' MiniMaxM2 writes it: MiniMaxM2RMSNorm, then apply_rotary_pos_emb on the rotary part of each head."""
    wide = x.float()
    x = weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
    x = x.unflatten(-1, (heads, -1))
    cos, sin = (torch.cat([table, table], -1)[:, None] for table in rotary)
    turning, passing = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turning.chunk(2, dim=-1)
    return torch.cat([turning * cos + torch.cat([-second, first], -1) * sin, passing], -1)


def bench(device: torch.device) -> list[Figure]:
    tokens, head_dim, rotary_dim = 4096, 128, 64
    heads = (48, 8)  # M2's query and key
    rotary = rotary_angles(torch.arange(tokens, device=device), rotary_dim, 5e6, torch.bfloat16)
    xs = [torch.randn(tokens, h * head_dim, device=device, dtype=torch.bfloat16, requires_grad=True) for h in heads]
    weights = [torch.ones(h * head_dim, device=device, dtype=torch.bfloat16, requires_grad=True) for h in heads]
    grads = [torch.randn(tokens, h, head_dim, device=device, dtype=torch.bfloat16) for h in heads]

    def work(op: Callable[..., Tensor]) -> Callable[[int], None]:
        def step(_: int) -> None:
            outs = [op(x, w, 1e-6, h, rotary) for x, w, h in zip(xs, weights, heads, strict=True)]
            torch.autograd.grad(outs, [*xs, *weights], grads)

        return step

    mine, theirs = medians_us([work(norm_rope), work(eager)], 1, device)
    bytes_moved = 2 * 5 * sum(x.numel() for x in xs)  # read x, write out; read x and the gradient, write the gradient
    name = f"forward+backward {tokens} x {heads[0]}/{heads[1]} heads, d {head_dim}"
    return [Figure("qk_norm_rope", name, mine, theirs, bytes_moved, device_name(device), ">= 4x")]

"""The experts' products beside one square ``torch.mm`` with the same FLOPs."""

from __future__ import annotations

from functools import partial

import torch

from megatron_m2.ops.grouped_gemm import grouped_mm, grouped_swiglu
from megatron_m2.ops.grouped_gemm_fp8 import grouped_mm_fp8
from tools.bench.common import Figure, device_name, medians_us

EXPERTS, ROWS, HIDDEN, WIDTH = 32, 16384, 1024, 512  # M2's 2 : 1


def square_product(a: torch.Tensor, _: int) -> None:
    torch.mm(a, a)


def bench(device: torch.device) -> list[Figure]:
    def operand(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).mul_(shape[-1] ** -0.5).bfloat16().requires_grad_()

    ends = (torch.arange(1, EXPERTS + 1, device=device) * (ROWS // EXPERTS)).int()
    x, gate_up, down = operand(ROWS, HIDDEN), operand(EXPERTS, 2 * WIDTH, HIDDEN), operand(EXPERTS, HIDDEN, WIDTH)
    grad, grad_hidden = torch.randn_like(x), torch.randn(ROWS, 2 * WIDTH, device=device).bfloat16()

    def product(_: int) -> None:
        torch.autograd.grad(grouped_mm(x, gate_up, ends), (x, gate_up), grad_hidden)

    def in_fp8(_: int) -> None:
        torch.autograd.grad(grouped_mm_fp8(x, gate_up, ends), (x, gate_up), grad_hidden)

    def experts(_: int) -> None:
        torch.autograd.grad(grouped_swiglu(x, gate_up, down, ends), (x, gate_up, down), grad)

    figures = []
    target = ">= 0.8 of its FLOP/s"
    for name, work, flops in (("forward+backward", product, 12 * ROWS * HIDDEN * WIDTH),
                              ("SwiGLU experts forward+backward", experts, 18 * ROWS * HIDDEN * WIDTH)):
        side = round((flops / 2) ** (1 / 3))
        square = torch.randn(side, side, device=device).bfloat16()
        value, baseline = medians_us([work, partial(square_product, square)], 1, device, rounds=9)
        figures.append(Figure("grouped_gemm", f"{name}, {EXPERTS} groups, {ROWS} x {HIDDEN} x {WIDTH}", value, baseline, 0,
                              device_name(device), target))
    fp8, bf16 = medians_us([in_fp8, product], 1, device, rounds=5)
    figures.append(Figure("grouped_gemm", "FP8 forward+backward with all quantisation, beside ours in bf16", fp8, bf16, 0,
                          device_name(device)))
    return figures

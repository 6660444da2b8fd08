"""Every operation names the argument that lies on another device than its first one, whatever runs: kernel or plain torch."""

from __future__ import annotations

import pytest
import torch

from megatron_m2.ops.experts import swiglu_experts
from megatron_m2.ops.fp8 import permute_quantize
from megatron_m2.ops.grouped_gemm import grouped_mm, grouped_swiglu
from megatron_m2.ops.grouped_gemm_fp8 import grouped_mm_fp8, grouped_swiglu_fp8
from megatron_m2.ops.linear_cross_entropy import softmax_parts
from megatron_m2.ops.norm_rope import norm_rope
from megatron_m2.ops.permute import permute, permute_layout, unpermute
from megatron_m2.ops.router import sigmoid_router, update_router_bias
from megatron_m2.ops.tree_attention import tree_attention, tree_attention_with_lse

ENDS, ROUTES = torch.tensor([128, 256], dtype=torch.int32), torch.arange(8, dtype=torch.int32).view(4, 2) % 4
LAYOUT = permute_layout(ROUTES, 4)
X, WEIGHTS = torch.randn(256, 16), (torch.randn(2, 32, 16), torch.randn(2, 16, 16))
BLOCKS = permute_layout(torch.zeros(256, 1, dtype=torch.int32), 2, 128)
Q, SUBTREE_END = torch.randn(4, 2, 16), torch.full((4,), 4, dtype=torch.int32)

# operation, its first argument, the others by the name that the error gives them
CASES = {
    "router": (lambda logits, bias, multiplicity, routes: sigmoid_router(logits, bias, 2, multiplicity=multiplicity, routes=routes),
               torch.randn(4, 8), {"bias": torch.zeros(8), "multiplicity": torch.ones(4, dtype=torch.int32), "routes": ROUTES}),
    "bias update": (lambda bias, counts: update_router_bias(bias, counts, 0.1), torch.zeros(8), {"counts": torch.zeros(8).long()}),
    "permute": (permute, torch.randn(4, 6), {"layout": LAYOUT}),
    "unpermute": (unpermute, torch.randn(8, 6), {"layout": LAYOUT, "weights": torch.rand(4, 2)}),
    "permute quantised": (permute_quantize, torch.randn(4, 6), {"layout": LAYOUT}),
    "grouped_mm": (grouped_mm, X, {"w": WEIGHTS[0], "ends": ENDS}),
    "grouped_swiglu": (grouped_swiglu, X, {"gate_up": WEIGHTS[0], "down": WEIGHTS[1], "ends": ENDS}),
    "grouped_mm_fp8": (grouped_mm_fp8, X, {"w": WEIGHTS[0], "ends": ENDS}),
    "grouped_swiglu_fp8": (grouped_swiglu_fp8, X, {"gate_up": WEIGHTS[0], "down": WEIGHTS[1], "layout": BLOCKS}),
    "experts": (lambda x, gate_up, down, weights, experts: swiglu_experts(x, gate_up, down, weights, experts), X[:4],
                {"gate_up": WEIGHTS[0], "down": WEIGHTS[1], "weights": torch.rand(4, 2), "experts": ROUTES % 2}),
    "tree_attention": (tree_attention, Q, {"k": Q, "v": Q, "subtree_end": SUBTREE_END}),
    "tree_attention with lse": (tree_attention_with_lse, Q, {"k": Q, "v": Q, "subtree_end": SUBTREE_END}),
    "norm_rope": (lambda x, weight, cos, sin, sum_squares: norm_rope(x, weight, 1e-6, 2, (cos, sin), sum_squares, 64), torch.randn(4, 32),
                  {"weight": torch.ones(32), "cos": torch.ones(4, 4), "sin": torch.ones(4, 4), "sum_squares": torch.ones(4)}),
    "linear + cross-entropy": (lambda hidden, weight, targets, sources: softmax_parts(hidden, weight, targets, sources_N=sources),
                               torch.randn(5, 6), {"weight": torch.randn(9, 6), "targets": ROUTES[0].long(), "sources": ROUTES[1].long()}),
}


def elsewhere(argument):
    if isinstance(argument, torch.Tensor):
        return argument.to("meta")
    return type(argument)(*(t.to("meta") for t in argument))


def in_bf16(argument):
    """bf16 is what most kernels take; statistics and weights of a sum stay fp32."""
    return argument.bfloat16() if isinstance(argument, torch.Tensor) and argument.is_floating_point() else argument


FP32_ONLY, BF16_ONLY = {"router", "bias update"}, {"grouped_mm_fp8", "grouped_swiglu_fp8"}


@pytest.mark.parametrize(("name", "bf16"), [(n, b) for n in CASES for b in (False, True) if n not in (FP32_ONLY if b else BF16_ONLY)])
def test_the_argument_on_another_device_is_named(name, bf16):
    operation, first, others = CASES[name]
    if bf16:
        first, others = in_bf16(first), {k: v if k in ("weights", "sum_squares") else in_bf16(v) for k, v in others.items()}
    operation(first, *others.values())
    for moved in others:
        with pytest.raises(ValueError, match=rf"^{moved}: .*on meta, need (cpu|torch\.int64 \[8\] on cpu)"):
            operation(first, *(elsewhere(x) if other == moved else x for other, x in others.items()))

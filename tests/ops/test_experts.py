"""The experts of a layer beside their definition in fp64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_m2.ops.experts import experts_reference, swiglu_experts
from megatron_m2.ops.grouped_gemm_fp8 import grouped_swiglu_fp8
from megatron_m2.ops.permute import permute_layout

# Inputs of order 1: the rounding of fp32 sums of a few terms; bf16 rounds gate, up, their product, the result and what flows back.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 4e-6, torch.bfloat16: 6 * 2**-8}


def run(op, x, gate_up, down, weights, routes):
    leaves = [t.clone().requires_grad_() for t in (x, gate_up, down, weights)]
    out = op(*leaves, routes)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).bfloat16()
    out.backward(upstream.to(out.dtype))
    return [out.detach(), *(t.grad for t in leaves)]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@given(tokens=st.integers(0, 60), experts=st.integers(1, 7), k=st.integers(1, 3), seed=st.integers(0, 2**20))
@example(tokens=200, experts=4, k=2, seed=0)
def test_equals_the_definition_in_fp64(dtype, tokens, experts, k, seed):
    k = min(k, experts)
    g = torch.Generator().manual_seed(seed)
    x, gate_up, down = (torch.randn(shape, generator=g).to(dtype) for shape in ((tokens, 6), (experts, 20, 6), (experts, 6, 10)))
    weights = torch.rand(tokens, k, generator=g).to(torch.float64 if dtype == torch.float64 else torch.float32)
    routes = torch.rand(tokens, experts, generator=g).mul(torch.linspace(1, 0.2, experts)).argsort(-1, descending=True)[:, :k].int()
    actual = run(swiglu_experts, x, gate_up, down, weights, routes)
    expected = run(experts_reference, *(t.double() for t in (x, gate_up, down, weights)), routes)
    for mine, reference in zip(actual, expected, strict=True):
        assert mine.shape == reference.shape
        if mine.numel():
            assert float((mine.double() - reference).abs().max()) < TOLERANCE[dtype] * float(reference.abs().max().clamp_min(1.0))
    idle = sorted(set(range(experts)) - set(routes.flatten().tolist()))
    assert not actual[2][idle].any()  # an expert without tokens learns nothing
    assert not actual[3][idle].any()


@pytest.mark.parametrize("tokens", [0, 40, 300])
def test_fp8_is_the_definition_to_fp8_rounding(tokens):
    x, gate_up, down = (torch.randn(shape).bfloat16() for shape in ((tokens, 256), (5, 96, 256), (5, 256, 48)))
    weights = torch.rand(tokens, 2)
    routes = torch.rand(tokens, 5).mul(torch.tensor([1, 1, 0, 0.7, 0.7])).argsort(-1, descending=True)[:, :2].int()
    actual = run(partial(swiglu_experts, fp8=True), x, gate_up / 16, down / 7, weights, routes)
    expected = run(experts_reference, *(t.double() for t in (x, gate_up / 16, down / 7, weights)), routes)
    for mine, exact in zip(actual, expected, strict=True):
        assert mine.shape == exact.shape
        # each operand of each product is rounded by 2^-5.8 r.m.s.: x, weights, act; dy, d_hidden on the way back
        assert float((mine.double() - exact).norm()) <= 0.075 * float(exact.norm())
    assert not actual[2][2].any()
    assert not actual[3][2].any()


def test_fp8_keeps_codes_alone():
    """Of activations the backward of FP8 experts keeps codes, a byte each, but for gate and up."""
    x, gate_up, down = (torch.randn(s).bfloat16().requires_grad_() for s in ((512, 128), (2, 256, 128), (2, 128, 128)))
    kept: list[int] = []

    def note(t: torch.Tensor) -> torch.Tensor:
        kept.append(t.untyped_storage().nbytes())
        return t

    layout = permute_layout(torch.arange(512, dtype=torch.int32)[:, None] % 2, 2, 128)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        grouped_swiglu_fp8(x, gate_up, down, layout)
    rows = len(layout.token)
    bytes_of_rows = rows * (128 + 128 + 2 * 256)  # x and act as codes, gate and up in bf16
    assert sum(kept) < 1.1 * (bytes_of_rows + gate_up.numel() + down.numel()) + 20 * rows


def test_fp8_needs_bf16():
    x, gate_up, down = torch.randn(4, 6), torch.randn(3, 8, 6), torch.randn(3, 6, 4)
    with pytest.raises(ValueError, match=r"x: torch\.float32.*FP8 needs bfloat16"):
        swiglu_experts(x, gate_up, down, torch.rand(4, 2), torch.zeros(4, 2, dtype=torch.int32), fp8=True)


def test_arguments_that_do_not_fit_are_named():
    x = torch.randn(4, 6)
    gate_up, down, w, e = torch.randn(3, 10, 6), torch.randn(3, 6, 5), torch.rand(4, 2), torch.zeros(4, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"x: torch\.float32 \[6\]"):
        swiglu_experts(x[0], gate_up, down, w, e)
    with pytest.raises(ValueError, match="gate_up"):
        swiglu_experts(x[:, :5], gate_up, down, w, e)
    with pytest.raises(ValueError, match="down"):
        swiglu_experts(x, gate_up, down.transpose(1, 2), w, e)
    with pytest.raises(ValueError, match=r"experts: torch\.float32"):
        swiglu_experts(x, gate_up, down, w, e.float())
    with pytest.raises(ValueError, match=r"experts: \[3, 2\]"):
        swiglu_experts(x, gate_up, down, w, e[:3])

"""The experts of a layer beside their definition in fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_m2.ops.experts import experts_reference, swiglu_experts

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

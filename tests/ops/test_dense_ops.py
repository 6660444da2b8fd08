"""Attention and experts: values and gradients against their definitions in fp64, and against torch's own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_m2.forest import TokenForest
from megatron_m2.ops.experts import _ROW_BLOCK, experts_reference, swiglu_experts
from megatron_m2.ops.tree_attention import tree_attention, tree_attention_reference
from tests.conftest import random_forest

# Against inputs of order 1: the rounding of fp32 sums of up to a few hundred terms; fp64 leaves only the order of summation.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 4e-6}
DTYPES = list(TOLERANCE)


def gradients(function, *inputs):
    """Output and gradients of every floating input under a fixed random upstream gradient."""
    leaves = [x.detach().clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    out = function(*leaves)
    upstream = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7)).to(out.dtype)
    out.backward(upstream)
    return [out.detach(), *(x.grad for x in leaves if x.is_floating_point())]


def assert_close_to_fp64(op, reference, dtype, *inputs):
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    for actual, expected in zip(gradients(op, *(x.to(dtype) if x.is_floating_point() else x for x in inputs)), gradients(reference, *wide),
                                strict=True):
        assert (actual - expected).abs().max() < TOLERANCE[dtype] * expected.abs().max().clamp_min(1.0)


@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=st.integers(0, 999), heads=st.sampled_from([(2, 2), (4, 2), (6, 1)]))
def test_tree_attention_on_random_forests(dtype, seed, heads):
    forest = random_forest(seed)
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(len(forest), h, 8, generator=g) for h in (heads[0], heads[1], heads[1]))
    assert_close_to_fp64(tree_attention, tree_attention_reference, dtype, q, k, v, forest.subtree_end)


@pytest.mark.parametrize("lengths", [[7], [5, 5, 5], [3, 1, 9], [8, 9, 7, 9]])  # one, equal, ragged, nearly equal
def test_tree_attention_on_chains(lengths):
    forest = TokenForest.from_documents([range(n) for n in lengths])
    q, k, v = (torch.randn(len(forest), h, 8, dtype=torch.float64) for h in (4, 2, 2))
    assert_close_to_fp64(tree_attention, tree_attention_reference, torch.float64, q, k, v, forest.subtree_end)


@pytest.mark.parametrize("dtype", DTYPES)
@given(tokens=st.integers(0, 12), experts=st.integers(1, 7), k=st.integers(1, 3), seed=st.integers(0, 99))
def test_experts(dtype, tokens, experts, k, seed):
    k = min(k, experts)
    g = torch.Generator().manual_seed(seed)
    x, gate_up, down = (torch.randn(shape, generator=g) for shape in ((tokens, 6), (experts, 10, 6), (experts, 6, 5)))
    weights = torch.rand(tokens, k, generator=g)
    routes = torch.rand(tokens, experts, generator=g).argsort(-1)[:, :k]
    if experts > 1:
        routes = torch.where(routes == 0, 1, routes) if k == 1 else routes  # an expert without tokens
    if tokens == 0:
        assert swiglu_experts(x, gate_up, down, weights, routes).shape == (0, 6)
    else:
        assert_close_to_fp64(swiglu_experts, experts_reference, dtype, x, gate_up, down, weights, routes)


@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_with_padded_rows(dtype):
    tokens, experts = 3 * _ROW_BLOCK, 4
    routes = torch.rand(tokens, experts).mul(torch.tensor([1.0, 3.0, 0.0, 1.5])).argsort(-1, descending=True)[:, :2]
    inputs = torch.randn(tokens, 6), torch.randn(experts, 10, 6), torch.randn(experts, 6, 5), torch.rand(tokens, 2), routes
    assert_close_to_fp64(swiglu_experts, experts_reference, dtype, *inputs)


def test_arguments_that_do_not_fit_are_named():
    x = torch.randn(4, 6)
    q, kv, end = torch.randn(4, 4, 8), torch.randn(4, 2, 8), torch.full((4,), 4, dtype=torch.int32)
    with pytest.raises(ValueError, match="do not fit q"):
        tree_attention(q, kv[:3], kv[:3], end)
    with pytest.raises(ValueError, match=r"subtree_end: torch\.int64"):
        tree_attention(q, kv, kv, end.long())
    with pytest.raises(ValueError, match=r"subtree_end\[0\] = 9"):
        tree_attention(q, kv, kv, end + 5)
    gate_up, down, w, e = torch.randn(3, 10, 6), torch.randn(3, 6, 5), torch.rand(4, 2), torch.zeros(4, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="gate_up"):
        swiglu_experts(x[:, :5], gate_up, down, w, e)
    with pytest.raises(ValueError, match="down"):
        swiglu_experts(x, gate_up, down.transpose(1, 2), w, e)
    with pytest.raises(ValueError, match=r"experts: torch\.float32"):
        swiglu_experts(x, gate_up, down, w, e.float())

"""Tree attention: values and gradients against their definitions in fp64, and against torch's own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_m2.forest import TokenForest
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


def test_arguments_that_do_not_fit_are_named():
    q, kv, end = torch.randn(4, 4, 8), torch.randn(4, 2, 8), torch.full((4,), 4, dtype=torch.int32)
    with pytest.raises(ValueError, match="do not fit q"):
        tree_attention(q, kv[:3], kv[:3], end)
    with pytest.raises(ValueError, match=r"subtree_end: torch\.int64"):
        tree_attention(q, kv, kv, end.long())
    with pytest.raises(ValueError, match=r"subtree_end\[0\] = 9"):
        tree_attention(q, kv, kv, end + 5)

"""RMSNorm, RoPE, attention, experts and log-probs: values and gradients against their definitions in fp64, and against torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from megatron_m2.forest import TokenForest
from megatron_m2.ops.cross_entropy import linear_logprobs, linear_logprobs_reference
from megatron_m2.ops.experts import _ROW_BLOCK, experts_reference, swiglu_experts
from megatron_m2.ops.norm import rms_norm, rms_norm_reference
from megatron_m2.ops.rope import apply_rotary, rotary_angles
from megatron_m2.ops.tree_attention import tree_attention, tree_attention_reference
from tests.conftest import random_forest, relative_error

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
@given(tokens=st.integers(1, 9), width=st.sampled_from([1, 8, 33, 200]), seed=st.integers(0, 99))
def test_rms_norm(dtype, tokens, width, seed):
    g = torch.Generator().manual_seed(seed)
    x, w = torch.randn(tokens, width, generator=g) * 3, torch.randn(width, generator=g)
    assert_close_to_fp64(lambda x, w: rms_norm(x, w, 1e-6), lambda x, w: rms_norm_reference(x, w, 1e-6), dtype, x, w)


def test_rms_norm_casts_before_it_multiplies():
    x, w = torch.randn(64, 96).bfloat16(), torch.randn(96).bfloat16()
    expected = w * F.rms_norm(x, (96,), None, 1e-6)  # torch's own kernel rounds to bf16; then the product
    assert torch.equal(rms_norm(x, w, 1e-6), expected)
    assert not torch.equal(rms_norm(x, w, 1e-6), F.rms_norm(x.float(), (96,), w.float(), 1e-6).bfloat16())


@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_is_a_complex_rotation(dtype):
    x, position = torch.randn(5, 3, 12, dtype=dtype), torch.tensor([0, 1, 5, 900, 3])
    turned = apply_rotary(x, *rotary_angles(position, 8, 1e4, dtype))
    pair = torch.complex(x[..., :4], x[..., 4:8])
    angle = position.double()[:, None] / 1e4 ** (torch.arange(4).double() / 4)
    expected = pair * torch.polar(torch.ones_like(angle), angle)[:, None]
    # an fp32 angle of 900 rad is known to 900 * 2^-24
    tolerance = 1e-4 if dtype == torch.float32 else 1e-12
    assert relative_error(torch.cat([turned[..., :4], turned[..., 4:8]], -1), torch.cat([expected.real, expected.imag], -1)) < tolerance
    assert torch.equal(turned[..., 8:], x[..., 8:])


def test_rope_gradient():
    cos, sin = rotary_angles(torch.arange(4), 6, 100.0, torch.float64)
    assert torch.autograd.gradcheck(lambda x: apply_rotary(x, cos, sin), torch.randn(4, 2, 8, dtype=torch.float64, requires_grad=True))


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 1024, 1500])
def test_linear_logprobs(dtype, rows):
    hidden, weight, targets = torch.randn(rows, 5), torch.randn(11, 5), torch.randint(0, 11, (rows,))
    if rows == 0:
        assert linear_logprobs(hidden, weight, targets).shape == (0,)
        return
    assert_close_to_fp64(linear_logprobs, linear_logprobs_reference, dtype, hidden, weight, targets)
    expected = -F.cross_entropy(hidden.double() @ weight.double().T, targets, reduction="none")
    assert relative_error(linear_logprobs(hidden.double(), weight.double(), targets), expected) < 1e-12


def test_linear_logprobs_survives_two_backwards():
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(6, 4)
    out = linear_logprobs(hidden, weight, torch.tensor([0, 5, 2])).sum()
    out.backward(retain_graph=True)
    first = hidden.grad.clone()
    hidden.grad = None
    out.backward()
    assert torch.equal(first, hidden.grad)


def test_arguments_that_do_not_fit_are_named():
    x = torch.randn(4, 6)
    with pytest.raises(ValueError, match=r"weight: torch\.float64"):
        rms_norm(x, torch.ones(6, dtype=torch.float64), 1e-6)
    with pytest.raises(ValueError, match="cos"):
        apply_rotary(torch.randn(4, 2, 8), torch.ones(3, 2), torch.ones(3, 2))
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
    with pytest.raises(ValueError, match="weight"):
        linear_logprobs(x, torch.randn(7, 5), e[:, 0])
    with pytest.raises(ValueError, match="targets"):
        linear_logprobs(x, torch.randn(7, 6), e[:3, 0])

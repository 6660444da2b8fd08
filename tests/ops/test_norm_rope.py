"""RMSNorm and QK norm + RoPE: values and gradients against the formula in fp64, eager PyTorch's roundings, the tensor-parallel split."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_m2.ops.norm_rope import norm_rope, norm_rope_reference, rms_norm, rotary_angles, row_sum_squares
from tests.conftest import needs_kernels, relative_error

# fp32: rounding of sums of a few hundred terms. bf16: cast, weight, product and sum each round by 2^-8; gradients are computed in fp32
# and rounded once, of operands that are bf16 in both.
VALUE_TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 4 * 2**-8}
GRADIENT_TOLERANCE = {torch.float64: 1e-13, torch.float32: 4e-6, torch.bfloat16: 1.1 * 2**-8}


def inputs(seed: int, tokens: int, heads: int, head_dim: int, half: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    x = (3 * torch.randn(tokens, heads * head_dim, generator=g)).to(dtype)
    weight, grad = torch.randn(heads * head_dim, generator=g).to(dtype), torch.randn(tokens, heads, head_dim, generator=g).to(dtype)
    cos, sin = rotary_angles(torch.randint(0, 9000, (tokens,), generator=g), 2 * half, 1e4, dtype)
    return x, weight, grad, cos, sin


def run(op, x, weight, grad, cos, sin, heads):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    out = op(x, weight, 1e-6, heads, (cos, sin) if cos.shape[1] else None)
    out.backward(grad)
    return out.detach(), x.grad, weight.grad


@pytest.mark.parametrize("dtype", list(VALUE_TOLERANCE))
@given(tokens=st.integers(0, 9), heads=st.integers(1, 5), head_dim=st.integers(1, 70), share=st.floats(0, 1), seed=st.integers(0, 2**20))
@example(tokens=300, heads=2, head_dim=64, share=0.5, seed=1)  # more than one part of the weight's gradient
@example(tokens=5, heads=48, head_dim=128, share=0.5, seed=2)  # M2's query
@example(tokens=1, heads=1, head_dim=1, share=0.0, seed=3)
def test_equals_fp64_reference(dtype, tokens, heads, head_dim, share, seed):
    case = inputs(seed, tokens, heads, head_dim, int(share * head_dim / 2), dtype)
    out, dx, dw = run(norm_rope, *case, heads)
    expected, expected_dx, expected_dw = run(norm_rope_reference, *(t.double() for t in case), heads)
    assert out.shape == (tokens, heads, head_dim)
    assert out.dtype == dx.dtype == dw.dtype == dtype
    if tokens:
        assert relative_error(out, expected) < VALUE_TOLERANCE[dtype]
        # a row of one dimension has no gradient but rounding: measure against that of its terms
        scale = float((3 * case[2].double().abs().max() * case[1].double().abs().max() / case[0].double().abs().max()).clamp_min(1.0))
        assert float((dx.double() - expected_dx).abs().max()) < GRADIENT_TOLERANCE[dtype] * max(scale, float(expected_dx.abs().max()))
        assert relative_error(dw, expected_dw) < GRADIENT_TOLERANCE[dtype]


def test_rounds_where_eager_rounds():
    x, weight, _, cos, sin = inputs(0, 64, 3, 32, 8, torch.bfloat16)
    normed = (weight * F.rms_norm(x, (96,), None, 1e-6)).view(64, 3, 32)  # torch's own kernel rounds to bf16; then the product
    assert torch.equal(rms_norm(x, weight, 1e-6), normed.flatten(1))
    assert not torch.equal(rms_norm(x, weight, 1e-6), F.rms_norm(x.float(), (96,), weight.float(), 1e-6).bfloat16())
    a, b, c, s = normed[..., :8], normed[..., 8:16], cos[:, None], sin[:, None]
    expected = torch.cat([a * c - b * s, b * c + a * s, normed[..., 16:]], -1)
    assert torch.equal(norm_rope(x, weight, 1e-6, 3, (cos, sin)), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rope_is_a_complex_rotation(dtype):
    x, position = torch.randn(5, 36, dtype=dtype), torch.tensor([0, 1, 5, 900, 3])
    plain = rms_norm(x, torch.ones(36, dtype=dtype), 0.0).view(5, 3, 12)
    turned = norm_rope(x, torch.ones(36, dtype=dtype), 0.0, 3, rotary_angles(position, 8, 1e4, dtype))
    angle = position.double()[:, None] / 1e4 ** (torch.arange(4).double() / 4)
    expected = torch.complex(plain[..., :4], plain[..., 4:8]) * torch.polar(torch.ones_like(angle), angle)[:, None]
    # an fp32 angle of 900 rad is known to 900 * 2^-24
    tolerance = 1e-4 if dtype == torch.float32 else 1e-12
    assert relative_error(torch.cat([turned[..., :4], turned[..., 4:8]], -1), torch.cat([expected.real, expected.imag], -1)) < tolerance
    assert torch.equal(turned[..., 8:], plain[..., 8:])


@pytest.mark.parametrize("dtype", list(VALUE_TOLERANCE))
@given(heads=st.integers(2, 6), seed=st.integers(0, 99))
def test_parts_of_a_vector_equal_the_whole(dtype, heads, seed):
    """Two ranks hold some heads each; their sums of squares are added as an all-reduce would."""
    x, weight, grad, cos, sin = inputs(seed, 7, heads, 16, 4, dtype)
    out, dx, dw = run(norm_rope, x, weight, grad, cos, sin, heads)
    parts = [slice(0, 16), slice(16, heads * 16)]
    leaves = [(x[:, p].clone().requires_grad_(), weight[p].clone().requires_grad_()) for p in parts]
    squares = sum(row_sum_squares(a) for a, _ in leaves)
    outs = [norm_rope(a, w, 1e-6, a.shape[1] // 16, (cos, sin), squares, heads * 16) for a, w in leaves]
    split = torch.cat(outs, 1)
    split.backward(grad)
    assert relative_error(split.detach(), out) <= (2**-7 if dtype == torch.bfloat16 else VALUE_TOLERANCE[dtype])
    # two bf16 terms of the gradient are rounded before they are added
    tolerance = 3 * GRADIENT_TOLERANCE[dtype]
    assert relative_error(torch.cat([a.grad for a, _ in leaves], 1), dx) < tolerance
    assert relative_error(torch.cat([w.grad for _, w in leaves]), dw) < tolerance


def test_reference_gradient():
    x, weight, _, cos, sin = inputs(3, 4, 2, 8, 3, torch.float64)
    x.requires_grad_()
    weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: norm_rope(x, w, 1e-6, 2, (cos, sin)), (x, weight))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rotate", [True, False])
def test_ops_pass_opcheck(dtype, rotate):
    x, weight, grad, cos, sin = inputs(0, 5, 2, 24, 6, dtype)
    x.requires_grad_()
    weight.requires_grad_()
    tables = (cos, sin) if rotate else (None, None)
    squares = row_sum_squares(x).detach().requires_grad_()
    ops = torch.ops.m2_ops
    torch.library.opcheck(ops.row_sum_squares, (x,))
    torch.library.opcheck(ops.rms_norm_rope, (x, weight, 1e-6, 2, *tables, None, 48))
    torch.library.opcheck(ops.rms_norm_rope, (x, weight, 1e-6, 2, *tables, squares, 96))
    rstd = torch.rand(5)
    torch.library.opcheck(ops.rms_norm_rope_backward, (grad.flatten(1), x.detach(), weight.detach(), rstd, 2, *tables, False, 48))


@needs_kernels
def test_weight_gradient_does_not_depend_on_the_number_of_threads():
    x, weight, grad, cos, sin = inputs(1, 1000, 2, 32, 8, torch.bfloat16)
    alone = run(norm_rope, x, weight, grad, cos, sin, 2)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        together = run(norm_rope, x, weight, grad, cos, sin, 2)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_rows_with_strides():
    x, weight, _, cos, sin = inputs(2, 6, 2, 16, 8, torch.float32)
    wide = torch.cat([x, x], 1)[:, :32]
    assert torch.equal(norm_rope(wide, weight, 1e-6, 2, (cos, sin)), norm_rope(x, weight, 1e-6, 2, (cos, sin)))
    assert torch.equal(rms_norm(x.view(2, 3, 32), weight, 1e-6), rms_norm(x, weight, 1e-6).view(2, 3, 32))


def test_arguments_that_do_not_fit_are_named():
    x, weight, cos = torch.randn(4, 32), torch.ones(32), torch.ones(4, 4)
    with pytest.raises(ValueError, match=r"weight: torch\.float64"):
        rms_norm(x, weight.double(), 1e-6)
    with pytest.raises(ValueError, match=r"x: torch\.int64"):
        norm_rope(x.long(), weight, 1e-6)
    with pytest.raises(ValueError, match="heads: 3"):
        norm_rope(x, weight, 1e-6, 3)
    with pytest.raises(ValueError, match=r"cos: torch\.float32 \[3, 4\]"):
        norm_rope(x, weight, 1e-6, 2, (cos[:3], cos))
    with pytest.raises(ValueError, match=r"sin: .* 2 R <= 16"):
        norm_rope(x, weight, 1e-6, 2, (cos, torch.ones(4, 9)))


@needs_kernels
def test_kernels_check_for_themselves():
    x, weight, ops = torch.randn(4, 32), torch.ones(32), torch.ops.m2_ops
    with pytest.raises(ValueError, match="x: Double"):
        ops.rms_norm_rope(x.double(), weight, 1e-6, 1, None, None, None, 32)
    with pytest.raises(ValueError, match="sin: need cos and sin"):
        ops.rms_norm_rope(x, weight, 1e-6, 2, torch.ones(4, 4), None, None, 32)
    with pytest.raises(ValueError, match="full_width: 64"):
        ops.rms_norm_rope(x, weight, 1e-6, 1, None, None, None, 64)
    with pytest.raises(ValueError, match="sum_squares: shape"):
        ops.rms_norm_rope(x, weight, 1e-6, 1, None, None, torch.ones(3), 64)

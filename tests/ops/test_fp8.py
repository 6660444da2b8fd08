"""Blockwise FP8: codes and factors equal torch's own conversion, products equal those of what the codes stand for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_m2.ops.fp8 import (
    E4M3,
    Quantized,
    dequantize_blocks,
    permute_quantize,
    quantize_blocks,
    quantize_columns,
    quantize_reference,
    quantize_rows,
    quantize_rows_columns,
    quantize_weights,
    requantize_columns,
    swiglu_backward_quantize,
    swiglu_backward_reference,
    swiglu_quantize,
)
from megatron_m2.ops.grouped_gemm import grouped_mm_reference
from megatron_m2.ops.grouped_gemm_fp8 import (
    grouped_mm_codes,
    grouped_mm_fp8,
    grouped_mm_fp8_reference,
    grouped_wgrad_codes,
    grouped_wgrad_fp8_reference,
)
from megatron_m2.ops.permute import permute, permute_layout, unpermute
from tests.conftest import needs_kernels


def same(a: Quantized, b: Quantized) -> bool:
    return torch.equal(a.codes.view(torch.uint8), b.codes.view(torch.uint8)) and torch.equal(a.scales, b.scales)


def rows_of_all_sizes(seed: int, rows: int, width: int) -> torch.Tensor:
    """Magnitudes over many powers of two, so that every kind of code occurs; some zeros."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=g) * torch.exp2(torch.randint(-12, 4, (rows, width), generator=g))
    return (x * (torch.rand(rows, width, generator=g) > 0.1)).bfloat16()


@given(rows=st.integers(0, 300), width=st.integers(1, 300), seed=st.integers(0, 2**20))
@example(rows=1, width=1, seed=0)
def test_codes_equal_torch_conversion(rows, width, seed):
    x = rows_of_all_sizes(seed, rows, width)
    x[: rows // 2, : width // 2] = 0
    assert same(quantize_rows(x), quantize_reference(x, (1, 128)))
    assert same(quantize_columns(x), quantize_reference(x, (128, 1)))
    for mine, matrix in zip(zip(*quantize_weights(torch.stack([x, -x])), strict=True), (x, -x), strict=True):
        assert same(Quantized(*mine), quantize_reference(matrix, (128, 128)))


@needs_kernels
def test_every_code_and_tie():
    """All 253 finite codes, the values halfway between two, and their neighbours, under a factor of 1."""
    codes = torch.arange(256, dtype=torch.uint8).view(E4M3).float()
    codes = codes[codes.isfinite()].sort().values
    middle = (codes[1:] + codes[:-1]) / 2
    values = torch.cat([codes, middle, middle * (1 + 2**-7), middle * (1 - 2**-7)]).bfloat16()
    x = torch.cat([values.unflatten(0, (-1, 1)), torch.full((len(values), 1), 448.0).bfloat16()], 1)
    quantized = quantize_rows(x)
    assert torch.equal(quantized.scales, torch.ones_like(quantized.scales))
    assert torch.equal(quantized.codes[:, 0].view(torch.uint8), values.float().to(E4M3).view(torch.uint8))


def test_nan_stays_nan():
    x = torch.ones(2, 200).bfloat16()
    x[1, 130] = float("nan")
    for quantized in (quantize_rows(x), quantize_reference(x, (1, 128))):  # the whole block: its factor is not known
        assert dequantize_blocks(*quantized, (1, 128)).isnan().sum(1).tolist() == [0, 72]


def test_permute_and_swiglu_quantise_what_they_make():
    layout = permute_layout(torch.rand(50, 5).argsort(-1)[:, :2].int(), 5, 128)
    x = rows_of_all_sizes(1, 50, 260)
    assert same(permute_quantize(x, layout), quantize_rows(permute(x, layout)))
    hidden = torch.randn(40, 2 * 150).bfloat16()
    gate, up = hidden.double().chunk(2, -1)
    expected = torch.nn.functional.silu(gate) * up
    values = dequantize_blocks(*swiglu_quantize(hidden), (1, 128))
    # bf16 rounds by 2^-8, e4m3 by 2^-4 of the value or half its least step
    steps = swiglu_quantize(hidden).scales.repeat_interleave(128, 1)[:, :150] * 2**-10
    assert bool(((values - expected).abs() <= (2**-4 + 2**-7) * expected.abs() + 1.01 * steps).all())


@given(rows=st.integers(0, 300), width=st.integers(1, 300), seed=st.integers(0, 2**20))
@example(rows=128, width=256, seed=0)
def test_both_ways_in_one_reading(rows, width, seed):
    x = rows_of_all_sizes(seed, rows, width)
    by_rows, by_columns = quantize_rows_columns(x)
    assert same(by_rows, quantize_reference(x, (1, 128)))
    assert same(by_columns, quantize_reference(x, (128, 1)))
    assert same(requantize_columns(by_rows), quantize_reference(dequantize_blocks(*by_rows, (1, 128)).bfloat16(), (128, 1)))


def codes_off_by_one(mine: Quantized, expected: Quantized) -> float:
    """The share of codes that differ, all of them by one: a flipped rounding of a bf16 value, or of a factor, moves a code by one."""
    torch.testing.assert_close(mine.scales, expected.scales, rtol=2**-7, atol=0)
    difference = mine.codes.view(torch.uint8).int() - expected.codes.view(torch.uint8).int()
    assert int(difference.abs().max()) <= 1
    return float((difference != 0).float().mean())


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (130, 6), (256, 128), (70, 150)])
def test_swiglu_gradient_is_quantised_as_it_is_made(rows, width):
    d_act, hidden = torch.randn(rows, width).bfloat16(), (2 * torch.randn(rows, 2 * width)).bfloat16()
    leaf = hidden.double().requires_grad_()
    gate, up = leaf.chunk(2, -1)
    (torch.nn.functional.silu(gate) * up).backward(d_act.double())
    assert float((swiglu_backward_reference(d_act.double(), hidden.double()) - leaf.grad).abs().max()) < 1e-13
    for mine, block in zip(swiglu_backward_quantize(d_act, hidden), ((1, 128), (128, 1)), strict=True):
        assert codes_off_by_one(mine, quantize_reference(leaf.grad.bfloat16(), block)) < 0.02


groups = st.lists(st.integers(0, 3), min_size=1, max_size=4)


@given(sizes=groups, a=st.integers(1, 150), b=st.integers(1, 150), seed=st.integers(0, 2**20))
@example(sizes=[9, 0, 1], a=128, b=192, seed=0)
def test_products_equal_those_of_the_values(sizes, a, b, seed):
    check_products(sizes, 2 * a, 2 * b, seed)


def check_products(sizes, a, b, seed, device="cpu", terms=2e-6):
    """fp32 sums of exact products, each wrong by ``terms`` of their magnitudes, and one rounding to bf16."""
    ends = (128 * torch.tensor(sizes)).cumsum(0).int()
    rows = int(ends[-1]) + 128
    x, dy = rows_of_all_sizes(seed, rows, a), rows_of_all_sizes(seed + 1, rows, b)
    w = quantize_weights(torch.randn(len(sizes), b, a, generator=torch.Generator().manual_seed(seed)).bfloat16())

    def check(op, reference, q, *rest):
        there = [Quantized(*(t.to(device) for t in v)) if isinstance(v, Quantized) else v for v in rest]
        actual = op(Quantized(*(t.to(device) for t in q)), there[0], ends.to(device), *there[1:]).cpu().double()
        exact = reference(q, rest[0], ends, *rest[1:])
        magnitude = reference(sizes_of(q), sizes_of(rest[0]), ends, *rest[1:])
        assert actual.shape == exact.shape
        assert bool(((actual - exact).abs() <= 2**-8 * exact.abs() + terms * magnitude).all())

    def sizes_of(q: Quantized) -> Quantized:
        return Quantized(q.codes.float().abs().to(E4M3), q.scales)

    for q, transposed in ((quantize_rows(x), True), (quantize_rows(dy), False)):
        check(grouped_mm_codes, grouped_mm_fp8_reference, q, w, transposed)
    check(grouped_wgrad_codes, grouped_wgrad_fp8_reference, quantize_columns(dy), quantize_columns(x))


@needs_kernels
@pytest.mark.parametrize(("sizes", "depth", "width"), [([1], 16, 128), ([2, 0, 1], 144, 256), ([0], 32, 128), ([1, 3], 256, 384)], ids=str)
def test_swiglu_in_the_product_changes_no_number(sizes, depth, width):
    check_fused_swiglu(sizes, depth, width)


def check_fused_swiglu(sizes, depth, width, device="cpu"):
    ends = (128 * torch.tensor(sizes)).cumsum(0).int().to(device)
    x = quantize_rows(rows_of_all_sizes(0, int(ends[-1]) + 100, depth).to(device))
    w = quantize_weights(torch.randn(len(sizes), 2 * width, depth).bfloat16().to(device))
    codes, scales, hidden = torch.ops.m2_ops.grouped_swiglu_fp8(*x, *w, ends)
    assert torch.equal(hidden, grouped_mm_codes(x, w, ends))
    assert same(Quantized(codes, scales), swiglu_quantize(hidden))


def test_gradients_are_those_of_the_bf16_product_to_fp8_rounding():
    ends = torch.tensor([128, 128, 384], dtype=torch.int32)
    x, w = torch.randn(384, 256).bfloat16(), torch.randn(3, 130, 256).bfloat16()
    grad = torch.randn(384, 130).bfloat16()
    results = []
    for op, dtype in ((grouped_mm_fp8, torch.bfloat16), (grouped_mm_reference, torch.float64)):
        leaves = [t.clone().to(dtype).detach().requires_grad_() for t in (x, w)]
        out = op(*leaves, ends)
        out.backward(grad.to(dtype))
        results.append([out.detach(), *(t.grad for t in leaves)])
    for mine, exact in zip(*results, strict=True):
        # both operands are rounded by up to 2^-4, 2^-5.8 r.m.s. (x twice for its gradient), independently from term to term
        assert float((mine.double() - exact).pow(2).mean().sqrt() / exact.pow(2).mean().sqrt()) < 0.045
    assert not results[0][2][1].any()


@needs_kernels
def test_deterministic_whatever_the_threads():
    """Layout, permutation, FP8 products and all their gradients."""
    chosen = torch.rand(700, 6).mul(torch.linspace(1, 0.05, 6)).argsort(-1, descending=True)[:, :3].int()
    x, w, weights = torch.randn(700, 72).bfloat16(), torch.randn(6, 40, 72).bfloat16(), torch.rand(700, 3)
    runs, threads = [], torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            layout = permute_layout(chosen, 6, 128)
            leaves = [t.clone().requires_grad_() for t in (x, w, weights)]
            out = unpermute(grouped_mm_fp8(permute(leaves[0], layout), leaves[1], layout.ends), layout, leaves[2])
            out.float().square().sum().backward()
            runs.append([*layout, out.detach(), *(t.grad for t in leaves)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))


@needs_kernels
def test_ops_pass_opcheck():
    ops, x = torch.ops.m2_ops, torch.randn(128, 20).bfloat16()
    ends = torch.tensor([128], dtype=torch.int32)
    layout = permute_layout(torch.zeros(128, 1, dtype=torch.int32), 1)
    for op, arguments in ((ops.quantize_rows, (x,)), (ops.quantize_columns, (x,)), (ops.swiglu_quantize, (x,)),
                          (ops.quantize_weights, (x[None],)),
                          (ops.permute_quantize, (x, layout.token)),
                          (ops.quantize_rows_columns, (x,)), (ops.requantize_columns, tuple(quantize_rows(x))),
                          (ops.swiglu_backward_quantize, (x[:, :10], x)),
                          (ops.grouped_swiglu_fp8, (*quantize_rows(x), *quantize_weights(torch.randn(1, 256, 20).bfloat16()), ends)),
                          (ops.grouped_mm_fp8, (*quantize_rows(x), *quantize_weights(torch.randn(1, 6, 20).bfloat16()), ends, True)),
                          (ops.grouped_wgrad_fp8, (*quantize_columns(x), *quantize_columns(x), ends))):
        # opcheck's test_schema multiplies tensors by NaN to compare them, which torch has not for e4m3: what it looks for is asserted here
        before = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
        torch.library.opcheck(op, arguments, test_utils=("test_autograd_registration", "test_faketensor"))
        assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(arguments, before, strict=True)
                   if isinstance(a, torch.Tensor))


def test_arguments_that_do_not_fit_are_named():
    x, w, ends = torch.randn(128, 6).bfloat16(), torch.randn(1, 4, 6).bfloat16(), torch.tensor([128], dtype=torch.int32)
    layout = permute_layout(torch.zeros(128, 1, dtype=torch.int32), 1)
    for name, call in {
        r"x: torch\.float64": lambda: quantize_rows(x.double()), r"hidden: width 5": lambda: swiglu_quantize(x[:, :5]),
        r"x: \[127, 6\]": lambda: permute_quantize(x[1:], layout), r"x: torch\.float32": lambda: grouped_mm_fp8(x.float(), w.float(), ends),
        r"w: .* does not fit": lambda: grouped_mm_fp8(x, w[..., :4], ends), r"ends: \[100\]": lambda: grouped_mm_fp8(x, w, ends - 28),
        r"d_act: .* does not fit hidden": lambda: swiglu_backward_quantize(x, x),
        r"x: torch\.int64": lambda: quantize_rows_columns(x.long()),
        r"weight_scale_inv": lambda: dequantize_blocks(quantize_blocks(x)[0], torch.ones(2, 2)),
    }.items():
        with pytest.raises(ValueError, match=name):
            call()


@needs_kernels
def test_kernels_check_for_themselves():
    ops, x, ends = torch.ops.m2_ops, quantize_columns(torch.randn(128, 6).bfloat16()), torch.tensor([128], dtype=torch.int32)
    with pytest.raises(ValueError, match="x: Float"):
        ops.quantize_rows(torch.randn(3, 4))
    with pytest.raises(ValueError, match="x_scale: shape"):
        ops.grouped_wgrad_fp8(*x, x.codes, x.scales[:, :5], ends)
    with pytest.raises(ValueError, match=r"ends\[0\]: 100, need a multiple of 128"):
        ops.grouped_wgrad_fp8(*x, *x, ends - 28)
    with pytest.raises(ValueError, match="w: shape"):
        ops.grouped_mm_fp8(*x, torch.empty(1, 4, 8).to(E4M3), torch.ones(1, 1, 1), ends, True)
    with pytest.raises(ValueError, match="w: 128 rows, need a multiple of 256"):
        ops.grouped_swiglu_fp8(x.codes, torch.ones(128, 1), torch.empty(1, 128, 6).to(E4M3), torch.ones(1, 1, 1), ends)
    with pytest.raises(ValueError, match="scales: shape"):
        ops.requantize_columns(x.codes, x.scales)
    with pytest.raises(ValueError, match="d_act: shape"):
        ops.swiglu_backward_quantize(torch.randn(3, 4).bfloat16(), torch.randn(3, 4).bfloat16())

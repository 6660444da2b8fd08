"""Grouped products and SwiGLU between two of them: values and gradients against one fp64 product per group."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_m2.ops.grouped_gemm import (
    grouped_mm,
    grouped_mm_by_torch,
    grouped_mm_reference,
    grouped_swiglu,
    grouped_swiglu_reference,
)
from tests.conftest import needs_kernels

# Of the sum of the magnitudes of the terms. A product: fp32 sums, rounded once. SwiGLU: gate, up, their product, each gradient and the
# result are rounded by 2^-8; a sum of rounded terms errs by 2^-8 of their magnitudes at most.
PRODUCT = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2**-8}
SWIGLU = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 6 * 2**-8}

group_sizes = st.lists(st.one_of(st.just(0), st.integers(1, 40), st.integers(60, 150)), min_size=1, max_size=5)


def run(op, ends, *operands):
    leaves = [x.clone().requires_grad_() for x in operands]
    out = op(*leaves, ends)
    g = torch.Generator().manual_seed(2)
    out.backward(torch.randn(out.shape, generator=g).bfloat16().to(out.dtype))
    return [out.detach(), *(x.grad for x in leaves)]


def inputs(seed, sizes, spare, dtype, *shapes):
    g = torch.Generator().manual_seed(seed)
    ends = torch.tensor(sizes).cumsum(0).int()
    rows = sum(sizes) + spare
    return ends, *(torch.randn((rows if s[0] == "R" else len(sizes), *s[1:]), generator=g).bfloat16().to(dtype) for s in shapes)


@pytest.mark.parametrize("dtype", list(PRODUCT))
@given(sizes=group_sizes, spare=st.integers(0, 5), a=st.integers(1, 40), b=st.integers(1, 40), seed=st.integers(0, 2**20))
@example(sizes=[0, 0], spare=3, a=4, b=4, seed=0)
@example(sizes=[1], spare=0, a=1, b=1, seed=1)
@example(sizes=[1100, 17], spare=0, a=40, b=280, seed=2)  # more rows than a task takes, more columns than a tile
@example(sizes=[300, 600], spare=0, a=300, b=8, seed=3)  # several slabs of the weight gradient, several of its columns
def test_grouped_mm_equals_fp64(dtype, sizes, spare, a, b, seed):
    if dtype == torch.bfloat16:
        a, b = 2 * a, 2 * b
    ends, x, w = inputs(seed, sizes, spare, dtype, ("R", a), ("E", b, a))
    actual, expected = run(grouped_mm, ends, x, w), run(grouped_mm_reference, ends, x.double(), w.double())
    magnitudes = run_of_magnitudes(ends, x, w)
    assert not actual[0][sum(sizes) :].any()
    for mine, reference, terms in zip(actual, expected, magnitudes, strict=True):
        assert mine.dtype == dtype
        assert mine.shape == reference.shape
        assert bool(((mine.double() - reference).abs() <= PRODUCT[dtype] * terms).all())


def run_of_magnitudes(ends, x, w):
    """Of the terms of the output's and the gradients' sums."""
    leaves = [t.double().abs().requires_grad_() for t in (x, w)]
    out = grouped_mm_reference(*leaves, ends)
    g = torch.Generator().manual_seed(2)
    out.backward(torch.randn(out.shape, generator=g).bfloat16().double().abs())
    return [out.detach(), *(t.grad for t in leaves)]


@pytest.mark.parametrize("sizes", [[5, 0, 20], [0, 3], [64]])
def test_torchs_kernel_means_the_same(sizes):
    ends, x, w = inputs(0, sizes, 4, torch.bfloat16, ("R", 16), ("E", 24, 16))
    expected = run(grouped_mm_reference, ends, x.double(), w.double())
    for mine, reference, terms in zip(run(grouped_mm_by_torch, ends, x, w), expected, run_of_magnitudes(ends, x, w), strict=True):
        assert bool(((mine.double() - reference).abs() <= PRODUCT[torch.bfloat16] * terms).all())


@pytest.mark.parametrize("dtype", list(SWIGLU))
@given(sizes=group_sizes, spare=st.integers(0, 5), hidden=st.integers(1, 30), width=st.integers(1, 30), seed=st.integers(0, 2**20))
@example(sizes=[70, 0, 1], spare=0, hidden=8, width=300, seed=0)
@example(sizes=[0], spare=1, hidden=2, width=2, seed=1)
def test_grouped_swiglu_equals_fp64(dtype, sizes, spare, hidden, width, seed):
    if dtype == torch.bfloat16:
        hidden, width = 2 * hidden, 2 * width
    ends, x, gate_up, down = inputs(seed, sizes, spare, dtype, ("R", hidden), ("E", 2 * width, hidden), ("E", hidden, width))
    gate_up, down = gate_up * hidden**-0.5, down * width**-0.5
    actual = run(grouped_swiglu, ends, x, gate_up, down)
    expected = run(grouped_swiglu_reference, ends, *(t.double() for t in (x, gate_up, down)))
    for mine, reference in zip(actual, expected, strict=True):
        assert mine.dtype == dtype
        if mine.numel():
            assert float((mine.double() - reference).abs().max()) <= SWIGLU[dtype] * float(reference.abs().max().clamp_min(0.1))


@needs_kernels
def test_deterministic_whatever_the_threads():
    ends, x, gate_up, down = inputs(0, [500, 3, 0, 1200], 7, torch.bfloat16, ("R", 64), ("E", 160, 64), ("E", 64, 80))
    alone = run(grouped_swiglu, ends, x, gate_up, down)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        together = run(grouped_swiglu, ends, x, gate_up, down)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize(("a", "b", "groups"), [(0, 4, 2), (4, 0, 2), (4, 4, 0)])
def test_widths_and_groups_of_nothing(a, b, groups):
    ends, x, w = inputs(0, [3] * groups, 2, torch.bfloat16, ("R", a), ("E", b, a))
    x, w = x.requires_grad_(), w.requires_grad_()
    out = grouped_mm(x, w, ends)
    assert out.shape == (len(x), b)
    assert not out.any()
    if groups:
        dx, dw = torch.autograd.grad(out.sum(), (x, w))
        assert dx.shape == x.shape
        assert dw.shape == w.shape
        assert not dx.any()


def test_nan_stays_in_its_group():
    """What a tile or a packed block keeps of the group before must not reach the next one's sums."""
    sizes = [37, 0, 70, 5, 129]
    ends, x, gate_up, down = inputs(0, sizes, 9, torch.bfloat16, ("R", 34), ("E", 52, 34), ("E", 34, 26))
    clean = run(grouped_swiglu, ends, x, gate_up, down)
    for group in (0, 2, 3, 4):
        rows, others = slice(int(ends[group]) - sizes[group], int(ends[group])), torch.arange(5) != group
        bad = x.clone()
        bad[rows] = bad[sum(sizes) :] = float("nan")
        out, dx, d_gate_up, d_down = run(grouped_swiglu, ends, bad, gate_up, down)
        assert out[rows].isnan().all()
        assert not out[sum(sizes) :].any()
        for mine, before in ((out, clean[0]), (dx, clean[1])):
            assert all(torch.equal(mine[s], before[s]) for s in (slice(0, rows.start), slice(rows.stop, sum(sizes))))
        assert torch.equal(d_gate_up[others], clean[2][others])
        assert torch.equal(d_down[others], clean[3][others])


@needs_kernels
def test_ops_pass_opcheck():
    ends, x, gate_up, down = inputs(0, [5, 0, 20], 2, torch.bfloat16, ("R", 8), ("E", 12, 8), ("E", 8, 6))
    ops = torch.ops.m2_ops
    act, hidden = ops.grouped_swiglu(x, gate_up, ends)
    torch.library.opcheck(ops.grouped_mm, (x.requires_grad_(), gate_up.requires_grad_(), ends, True))
    torch.library.opcheck(ops.grouped_mm, (act.requires_grad_(), down.mT.contiguous().requires_grad_(), ends, False))
    x, gate_up = x.detach(), gate_up.detach()
    torch.library.opcheck(ops.grouped_wgrad, (hidden, x, ends))
    torch.library.opcheck(ops.grouped_swiglu, (x, gate_up, ends))
    torch.library.opcheck(ops.grouped_swiglu_backward, (x, down, hidden, ends))


def test_arguments_that_do_not_fit_are_named():
    ends, x, gate_up, down = inputs(0, [5, 4], 0, torch.float32, ("R", 8), ("E", 12, 8), ("E", 8, 6))
    with pytest.raises(ValueError, match=r"x: torch\.int64"):
        grouped_mm(x.long(), gate_up, ends)
    with pytest.raises(ValueError, match=r"w: .* does not fit x"):
        grouped_mm(x[:, :6], gate_up, ends)
    with pytest.raises(ValueError, match=r"ends: torch\.int64"):
        grouped_mm(x, gate_up, ends.long())
    with pytest.raises(ValueError, match=r"ends: \[5, 10\]"):
        grouped_mm(x, gate_up, torch.tensor([5, 10], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"ends: \[5, 4\]"):
        grouped_mm(x, gate_up, torch.tensor([5, 4], dtype=torch.int32))
    with pytest.raises(ValueError, match="gate_up"):
        grouped_swiglu(x, gate_up[:, :11], down, ends)
    with pytest.raises(ValueError, match="down"):
        grouped_swiglu(x, gate_up, down.mT, ends)


@needs_kernels
def test_kernels_check_for_themselves():
    ends, x, gate_up, down = inputs(0, [5, 4], 0, torch.bfloat16, ("R", 8), ("E", 12, 8), ("E", 8, 6))
    ops = torch.ops.m2_ops
    with pytest.raises(ValueError, match="x: Float"):
        ops.grouped_mm(x.float(), gate_up, ends, True)
    with pytest.raises(ValueError, match="x: width 0"):
        ops.grouped_mm(x[:, :0], gate_up[..., :0], ends, True)
    assert ops.grouped_wgrad(x, x[:, :0], ends).shape == (2, 8, 0)
    with pytest.raises(ValueError, match="x: width 7"):
        ops.grouped_mm(x[:, :7], gate_up, ends, True)
    with pytest.raises(ValueError, match="w: shape"):
        ops.grouped_mm(x, gate_up, ends, False)
    with pytest.raises(ValueError, match=r"ends\[1\]: 3, need 5 to 9"):
        ops.grouped_wgrad(x, x, torch.tensor([5, 3], dtype=torch.int32))
    with pytest.raises(ValueError, match="hidden: shape"):
        ops.grouped_swiglu_backward(x, down, x, ends)

"""Grouping rows by expert and combining them again: layouts, values and gradients against plain indexing in fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_m2.ops.permute import permute, permute_layout, permute_layout_reference, unpermute
from tests.conftest import needs_kernels

# One rounding of sums of up to 4 terms; d_weights are fp32 sums over the width. Gradients of order 1 to 10.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2**-8}


def routes(seed: int, tokens: int, experts: int, top_k: int) -> torch.Tensor:
    """Distinct experts per token, low ones likelier: some experts get none. Odd seeds leave slots without an expert."""
    g = torch.Generator().manual_seed(seed)
    chosen = (torch.rand(tokens, experts, generator=g) * torch.linspace(1, 0.1, experts)).argsort(-1, descending=True)[:, :top_k].int()
    return chosen.masked_fill(torch.rand(chosen.shape, generator=g) < 0.4, -1) if seed % 2 else chosen


cases = given(tokens=st.integers(0, 80), experts=st.integers(1, 9), top_k=st.integers(1, 4), block=st.sampled_from([1, 3, 16]),
              width=st.integers(1, 70), seed=st.integers(0, 2**20))


@cases
@example(tokens=500, experts=5, top_k=4, block=16, width=1, seed=0)
def test_layout(tokens, experts, top_k, block, width, seed):
    chosen = routes(seed, tokens, experts, min(top_k, experts))
    layout = permute_layout(chosen, experts, block)
    for mine, reference in zip(layout, permute_layout_reference(chosen, experts, block), strict=True):
        assert torch.equal(mine, reference)
        assert mine.dtype == torch.int32
    start = 0
    for e, end in enumerate(layout.ends.tolist()):  # the definition, expert by expert
        wanted = [t for t in range(tokens) if e in chosen[t].tolist()]
        assert end - start == -(-len(wanted) // block) * block
        assert layout.token[start:end].tolist() == wanted + [-1] * (end - start - len(wanted))
        start = end
    assert set(layout.token[start:].tolist()) <= {-1}
    placed = (chosen >= 0).flatten()
    assert torch.equal(layout.row.flatten() >= 0, placed)
    wanted = torch.arange(tokens).repeat_interleave(chosen.shape[1]).int()[placed]
    assert torch.equal(layout.token[layout.row.flatten()[placed].long()], wanted)


@cases
def test_layout_for_so_many(tokens, experts, top_k, block, width, seed):
    """Told how many slots have an expert: the same rows, but fewer."""
    chosen = routes(seed, tokens, experts, min(top_k, experts))
    routed = int((chosen >= 0).sum())
    whole, layout = permute_layout(chosen, experts, block), permute_layout(chosen, experts, block, routed)
    assert all(torch.equal(a, b) for a, b in zip(layout, permute_layout_reference(chosen, experts, block, routed), strict=True))
    assert torch.equal(layout.ends, whole.ends)
    assert torch.equal(layout.row, whole.row)
    assert len(layout.token) == -(-(routed + min(routed, experts) * (block - 1)) // block) * block
    assert torch.equal(layout.token, whole.token[: len(layout.token)])


def test_rows_that_lie_apart():
    for width, apart in ((64, 96), (64, 65), (5, 9)):
        layout, x = permute_layout(routes(1, 30, 4, 2), 4, 4), torch.randn(30, apart)[:, :width]
        for dtype in (torch.float32, torch.bfloat16):
            whole = x.to(dtype)
            storage = torch.empty(30, apart, dtype=dtype)
            assert torch.equal(permute(storage[:, :width].copy_(whole), layout), permute(whole.contiguous(), layout))


@pytest.mark.parametrize(("tokens", "experts", "top_k", "block"), [(700, 1500, 3, 16), (5000, 256, 2, 128), (9000, 2, 2, 1)])
def test_layout_of_many(tokens, experts, top_k, block):
    """More experts than a GPU's block has threads, more slots than its warps take at once."""
    chosen = torch.randint(-1, experts, (tokens, top_k), dtype=torch.int32)
    for mine, reference in zip(permute_layout(chosen, experts, block), permute_layout_reference(chosen, experts, block), strict=True):
        assert torch.equal(mine, reference)


def run(x, rows, layout, weights):
    x, rows, weights = x.clone().requires_grad_(), rows.clone().requires_grad_(), weights.clone().requires_grad_()
    spread, combined, plain = permute(x, layout), unpermute(rows, layout, weights), unpermute(rows, layout)
    g = torch.Generator().manual_seed(1)
    upstream = [torch.randint(-4, 5, t.shape, generator=g).to(t.dtype) / 2 for t in (spread, combined, plain)]
    torch.autograd.backward([spread, combined], upstream[:2])
    first = rows.grad
    rows.grad = None
    plain.backward(upstream[2])
    return [t.detach() for t in (spread, combined, plain, x.grad, first, rows.grad, weights.grad)]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@cases
@example(tokens=300, experts=4, top_k=4, block=16, width=64, seed=3)
def test_equals_indexing_in_fp64(dtype, tokens, experts, top_k, block, width, seed):
    layout = permute_layout(routes(seed, tokens, experts, min(top_k, experts)), experts, block)
    g = torch.Generator().manual_seed(seed)
    x, rows = torch.randn(tokens, width, generator=g).to(dtype), torch.randn(len(layout.token), width, generator=g).to(dtype)
    weights = torch.rand(layout.row.shape, generator=g).to(torch.float64 if dtype == torch.float64 else torch.float32)
    actual = run(x, rows, layout, weights)
    assert torch.equal(actual[0], torch.where(layout.token[:, None] >= 0, x[layout.token.long()] if tokens else actual[0], 0.0))
    # fp64: the path in plain torch, differentiated by autograd
    for mine, reference in zip(actual, run(x.double(), rows.double(), layout, weights.double()), strict=True):
        assert mine.shape == reference.shape
        bound = TOLERANCE[dtype] * reference.abs() if mine.dtype == torch.bfloat16 else TOLERANCE[dtype] * width
        assert bool(((mine.double() - reference).abs() <= bound + 1e-5 * (dtype != torch.float64)).all())


def test_large_rows_pass_the_cache():
    """33 MB of rows are written around the cache; the same values must arrive."""
    layout = permute_layout(routes(0, 9000, 4, 2), 4, 16)
    x = torch.randn(9000, 960).bfloat16()
    spread = permute(x, layout)
    assert spread.nbytes > 2**25
    assert torch.equal(unpermute(spread, layout, torch.full((9000, 2), 0.5)), x)


@needs_kernels
def test_ops_pass_opcheck():
    chosen, ops = routes(0, 6, 4, 2), torch.ops.m2_ops
    layout = permute_layout(chosen, 4, 4)
    x, rows = torch.randn(6, 20, requires_grad=True), torch.randn(len(layout.token), 20, requires_grad=True)
    weights = torch.rand(6, 2, requires_grad=True)
    torch.library.opcheck(ops.permute_layout, (chosen, 4, 4))
    torch.library.opcheck(ops.permute_layout, (chosen, 4, 4, 12))
    torch.library.opcheck(ops.permute, (x, layout.token, layout.row))
    torch.library.opcheck(ops.unpermute, (rows, layout.token, layout.row, weights))
    torch.library.opcheck(ops.unpermute, (rows, layout.token, layout.row, None))
    torch.library.opcheck(ops.unpermute_backward, (x.detach(), rows.detach(), layout.token, layout.row, weights.detach()))


def test_arguments_that_do_not_fit_are_named():
    chosen = routes(0, 6, 4, 2)
    layout = permute_layout(chosen, 4)
    with pytest.raises(ValueError, match=r"experts: torch\.int64"):
        permute_layout(chosen.long(), 4)
    with pytest.raises(ValueError, match="block: 0"):
        permute_layout(chosen, 4, 0)
    with pytest.raises(ValueError, match="routed: 13, need 0 to 12"):
        permute_layout(chosen, 4, routed=13)
    with pytest.raises(ValueError, match=r"x: torch\.float32 \[5, 3\]"):
        permute(torch.randn(5, 3), layout)
    with pytest.raises(ValueError, match=r"rows: torch\.float32 \[11, 3\]"):
        unpermute(torch.randn(11, 3), layout)
    with pytest.raises(ValueError, match=r"weights: torch\.bfloat16"):
        unpermute(torch.randn(12, 3), layout, torch.rand(6, 2).bfloat16())


@needs_kernels
def test_kernels_check_for_themselves():
    chosen, ops = routes(0, 6, 4, 2), torch.ops.m2_ops
    layout = permute_layout(chosen, 4)
    with pytest.raises(ValueError, match=r"experts\[5, 1\]: 7, need -1 to 3"):
        permute_layout(chosen.index_put((torch.tensor(5), torch.tensor(1)), torch.tensor(7, dtype=torch.int32)), 4)
    with pytest.raises(ValueError, match="routed: 11, but 12 slots have an expert"):
        permute_layout(chosen, 4, routed=11)
    with pytest.raises(ValueError, match=r"experts: .* rows with their padding, need less than 2"):
        permute_layout(chosen, 10**9, 2**30)
    with pytest.raises(ValueError, match="x: Double"):
        ops.permute(torch.randn(6, 3).double(), layout.token, layout.row)
    with pytest.raises(ValueError, match=r"token\[0\]: 9"):
        ops.permute(torch.randn(6, 3), layout.token + 9 - layout.token[0], layout.row)
    with pytest.raises(ValueError, match=r"row\[0, 0\]: -"):
        ops.unpermute(torch.randn(12, 3), layout.token, layout.row - 100, None)
    with pytest.raises(ValueError, match="grad: "):
        ops.unpermute_backward(torch.randn(6, 4), torch.randn(12, 3), layout.token, layout.row, torch.rand(6, 2))



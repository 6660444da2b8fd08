"""Rows to ranks and their sums back, ranks played by lists of tensors: against the definition token by token, and plain torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_m2.ops.expert_parallel import (
    combine_rows,
    combine_rows_reference,
    dequantize_rows,
    dequantize_rows_reference,
    pack_rows,
    pack_rows_reference,
    plan_rows,
    plan_rows_reference,
)
from megatron_m2.ops.fp8 import quantize_rows
from tests.conftest import needs_kernels
from tests.ops.test_permute import routes

# One rounding of a sum in fp32 or fp64 to the rows' dtype, and those of the sum itself.
TOLERANCE = {torch.float64: 1e-15, torch.float32: 1e-6, torch.bfloat16: 2**-8}

cases = given(tokens=st.integers(0, 60), per_rank=st.integers(1, 4), ranks=st.integers(1, 5), top_k=st.integers(1, 4),
              width=st.integers(1, 70), seed=st.integers(0, 2**20))


def plan(tokens, per_rank, ranks, top_k, seed):
    chosen = routes(seed, tokens, per_rank * ranks, min(top_k, per_rank * ranks))
    return chosen, plan_rows(chosen, per_rank * ranks, ranks)


@cases
@example(tokens=1100, per_rank=2, ranks=3, top_k=2, width=1, seed=1)  # more than one step of the GPU's scan
def test_plan(tokens, per_rank, ranks, top_k, width, seed):
    chosen, mine = plan(tokens, per_rank, ranks, top_k, seed)
    for a, b in zip(mine, plan_rows_reference(chosen, per_rank * ranks, ranks), strict=True):
        assert torch.equal(a, b)
        assert a.dtype == torch.int32
    for r in range(ranks):  # the definition
        here = [[e for e in experts if r * per_rank <= e < (r + 1) * per_rank] for experts in chosen.tolist()]
        tokens_here = [t for t in range(tokens) if here[t]]
        assert mine.counts[r].tolist() == [len(tokens_here), sum(map(len, here))]
        assert mine.row[tokens_here, r].tolist() == list(range(len(tokens_here)))
        assert int((mine.row[:, r] >= 0).sum()) == len(tokens_here)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@cases
@example(tokens=40, per_rank=2, ranks=4, top_k=3, width=64, seed=0)  # whole pieces of 16 bytes
def test_rows_arrive(dtype, tokens, per_rank, ranks, top_k, width, seed):
    """Every byte of every row is the token's; what lies between the parts, and ranks left out, stay as they were."""
    chosen, (counts, row) = plan(tokens, per_rank, ranks, top_k, seed)
    top_k = chosen.shape[1]
    x = torch.randn(tokens, 2 * width).to(dtype)[:, :width]  # rows that lie apart
    weights = torch.rand(tokens, top_k)
    at, size = [0, -(-x.element_size() * width // 16) * 16], x.element_size()
    at.append(at[1] + -(-4 * top_k // 16) * 16)
    row_bytes = at[2] + -(-4 * top_k // 16) * 16
    left_out = seed % ranks if ranks > 1 else None
    out = [torch.full((0 if r == left_out else n, row_bytes), 77, dtype=torch.uint8) for r, n in enumerate(counts[:, 0].tolist())]
    expected = [target.clone() for target in out]
    pack_rows([x, weights], chosen, row, per_rank, at, out)
    pack_rows_reference([x, weights], chosen, row, per_rank, at, expected)
    for r, (target, reference) in enumerate(zip(out, expected, strict=True)):
        assert torch.equal(target, reference)
        if r == left_out:
            continue
        tokens_here = [t for t in range(tokens) if int(row[t, r]) >= 0]
        assert torch.equal(target[:, : size * width].contiguous().view(dtype), x[tokens_here])
        assert torch.equal(target[:, at[1] : at[1] + 4 * top_k].contiguous().view(torch.float32), weights[tokens_here])
        here = [[e - r * per_rank if e // per_rank == r else -1 for e in chosen[t].tolist()] for t in tokens_here]
        assert target[:, at[2] : at[2] + 4 * top_k].contiguous().view(torch.int32).tolist() == here
        assert bool((target[:, size * width : at[1]] == 77).all())


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@cases
@example(tokens=40, per_rank=2, ranks=4, top_k=3, width=64, seed=0)
def test_sums(dtype, tokens, per_rank, ranks, top_k, width, seed):
    _, (counts, row) = plan(tokens, per_rank, ranks, top_k, seed)
    rows = [torch.randn(n, width).to(dtype) for n in counts[:, 0].tolist()]
    out = combine_rows(rows, row)
    expected = torch.zeros(tokens, width, dtype=torch.float64)
    most = torch.zeros_like(expected)  # rounding is of partial sums
    for t in range(tokens):
        for r in range(ranks):
            if int(row[t, r]) >= 0:
                expected[t] += rows[r][row[t, r]].double()
                most[t] += rows[r][row[t, r]].double().abs()
    assert out.dtype == dtype
    bound = TOLERANCE[dtype] * (expected.abs() if dtype == torch.bfloat16 else most) + 1e-6 * most * (dtype == torch.bfloat16)
    assert bool(((out.double() - expected).abs() <= bound).all())
    assert torch.equal(out, combine_rows_reference(rows, row))  # the same additions in the same order


@cases
@example(tokens=5, per_rank=1, ranks=1, top_k=1, width=256, seed=0)
def test_codes_widen(tokens, per_rank, ranks, top_k, width, seed):
    """From rows that lie apart, as in a message; exact products rounded once."""
    x = (torch.randn(tokens, width) * torch.logspace(-9, 9, width)).bfloat16()
    if tokens and seed % 3 == 0:
        x[tokens // 2, width // 2] = float("nan")
    codes, scales = quantize_rows(x)
    row = torch.empty(tokens, width + 13 + 4 * scales.shape[1] + 5, dtype=torch.uint8)
    apart = row[:, :width].copy_(codes.view(torch.uint8)).view(codes.dtype), scales.repeat(1, 2)[:, : scales.shape[1]]
    for views in ((codes, scales), apart):
        out = dequantize_rows(*views)
        assert torch.equal(out.isnan(), dequantize_rows_reference(codes, scales).isnan())
        assert torch.equal(out.nan_to_num(), dequantize_rows_reference(codes, scales).nan_to_num())


@needs_kernels
def test_ops_pass_opcheck():
    ops, (chosen, (counts, row)) = torch.ops.m2_ops, plan(9, 2, 3, 2, 0)
    rows = counts[:, 0].tolist()
    torch.library.opcheck(ops.ep_plan, (chosen, 6, 3))
    out = [torch.zeros(n, 64, dtype=torch.uint8) for n in rows]
    torch.library.opcheck(ops.ep_pack, ([torch.randn(9, 8).bfloat16(), torch.rand(9, 2)], chosen, row, 2, [0, 16, 32], out))
    torch.library.opcheck(ops.ep_pack, ([torch.randn(9, 8)], None, row, 2, [0], out))
    torch.library.opcheck(ops.ep_combine, ([torch.randn(n, 5) for n in rows], row))
    # opcheck's test_schema multiplies tensors by NaN, which torch has not for e4m3
    torch.library.opcheck(ops.ep_dequantize, tuple(quantize_rows(torch.randn(4, 130).bfloat16())),
                          test_utils=("test_autograd_registration", "test_faketensor"))


def test_arguments_that_do_not_fit_are_named():
    chosen, (counts, row) = plan(9, 2, 3, 2, 0)
    x, out = torch.randn(9, 8), [torch.zeros(int(n), 64, dtype=torch.uint8) for n in counts[:, 0]]
    with pytest.raises(ValueError, match=r"experts: torch\.int64"):
        plan_rows(chosen.long(), 6, 3)
    with pytest.raises(ValueError, match="num_experts: 7, need a multiple of the 3 ranks; nearest is 6"):
        plan_rows(chosen, 7, 3)
    with pytest.raises(ValueError, match="ranks: 257, need 1 to 256"):
        plan_rows(chosen, 257, 257)
    with pytest.raises(ValueError, match=r"at: \[0\], need 2 offsets"):
        pack_rows([x], chosen, row, 2, [0], out)
    with pytest.raises(ValueError, match="out: 2 tensors, need one for each of 3 ranks"):
        pack_rows([x], chosen, row, 2, [0, 32], out[:2])
    with pytest.raises(ValueError, match="rows: 1 tensors, need one for each of 3 ranks"):
        combine_rows([x], row)
    with pytest.raises(ValueError, match=r"codes: torch\.float32"):
        dequantize_rows(x, x)
    codes, scales = quantize_rows(torch.randn(4, 130).bfloat16())
    with pytest.raises(ValueError, match=r"scales: torch\.float32 \[4, 1\], need torch\.float32 \[4, 2\]"):
        dequantize_rows(codes, scales[:, :1])


@needs_kernels
def test_kernels_check_for_themselves():
    ops, (chosen, (counts, row)) = torch.ops.m2_ops, plan(9, 2, 3, 2, 0)
    x, out = torch.randn(9, 8), [torch.zeros(int(n), 64, dtype=torch.uint8) for n in counts[:, 0]]
    with pytest.raises(ValueError, match=r"experts\[0, 0\]: 6, need -1 to 5"):
        plan_rows(torch.full_like(chosen, 6), 6, 3)
    with pytest.raises(ValueError, match=r"at: 40, but parts of 32 bytes must end within 64"):
        ops.ep_pack([x], None, row, 2, [40], out)
    with pytest.raises(ValueError, match="at: 34 in rows of 64 bytes, need multiples of 4"):
        ops.ep_pack([x], chosen, row, 2, [0, 34], out)
    with pytest.raises(ValueError, match=r"parts: shape \[8, 8\], need \[9, width\]"):
        ops.ep_pack([x[1:]], None, row, 2, [0], out)
    with pytest.raises(ValueError, match="out: Float"):
        ops.ep_pack([x], None, row, 2, [0], [x, x, x])
    with pytest.raises(ValueError, match=r"row\[0, 0\]: 100, need -1 to"):
        ops.ep_pack([x], None, torch.full_like(row, 100), 2, [0], out)
    with pytest.raises(ValueError, match=r"row\[0, 0\]: 9, need -1 to 8"):
        ops.ep_combine([x, x, x], torch.full_like(row, 9))
    with pytest.raises(ValueError, match="rows: Int"):
        ops.ep_combine([row, row, row], row)
    with pytest.raises(ValueError, match=r"rows: Float \[9, 7\]"):
        ops.ep_combine([x, x[:, 1:].contiguous(), x], row)

"""Tree attention: values and gradients against the dense mask in fp64, over forests of every shape."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_m2.forest import TokenForest
from megatron_m2.ops.tree_attention import AttentionOutput, tree_attention, tree_attention_reference, tree_attention_with_lse, visibility
from tests.conftest import needs_kernels, random_forest

# fp32: sums of up to a few hundred terms; fp64: the order of summation only.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6}


def star(prefix: int, branches: int, length: int) -> torch.Tensor:
    total = prefix + branches * length
    ends = [total] * prefix
    for b in range(branches):
        ends += [prefix + (b + 1) * length] * length
    return torch.tensor(ends, dtype=torch.int32)


def random_tree(seed: int, tokens: int, forks: float) -> torch.Tensor:
    """Token t's parent is the token before it, or, with probability ``forks``, any on the path to it, or none."""
    g = torch.Generator().manual_seed(seed)
    jump, which = torch.rand(tokens, generator=g).tolist(), torch.rand(tokens, generator=g).tolist()
    path: list[int] = []
    ends = [tokens] * tokens
    for t in range(tokens):
        if path and jump[t] < forks:
            keep = int(which[t] * len(path))
            for closed in path[keep:]:
                ends[closed] = t
            del path[keep:]
        path.append(t)
    return torch.tensor(ends, dtype=torch.int32)


def inputs(seed, queries, tokens, heads, kv_heads, dim, dtype):
    g = torch.Generator().manual_seed(seed)
    shapes = (queries, heads, dim), (tokens, kv_heads, dim), (tokens, kv_heads, dim)
    return [torch.randn(shape, generator=g).bfloat16().to(dtype) for shape in shapes]


def run(op, q, k, v, subtree_end, query_start=0):
    """out, lse, dq, dk, dv for fixed gradients of both outputs."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = op(*leaves, subtree_end, query_start)
    g = torch.Generator().manual_seed(3)
    upstream = [torch.randn(x.shape, generator=g).bfloat16().to(x.dtype) for x in out]
    torch.autograd.backward(out, upstream)
    return [*(x.detach() for x in out), *(x.grad for x in leaves)]


def gradient_magnitudes(q, k, v, subtree_end, query_start):
    """Sums of the magnitudes of the terms that out, lse, dq, dk and dv add up, in fp64: what rounding errors are relative to."""
    group, scale = q.shape[1] // k.shape[1], q.shape[2] ** -0.5
    g = torch.Generator().manual_seed(3)
    grad_out = torch.randn(q.shape, generator=g).bfloat16().double()
    grad_lse = torch.randn(q.shape[:2], generator=g).bfloat16().double()
    wide_k, wide_v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, wide_k) * scale
    p = scores.masked_fill(~visibility(subtree_end)[query_start : query_start + len(q)], float("-inf")).softmax(-1)
    d_p = torch.einsum("ihd,jhd->hij", grad_out, wide_v)
    out = torch.einsum("hij,jhd->ihd", p, wide_v)
    # delta is a sum over D of a rounded out: its own terms count, not what remains of them
    delta = torch.einsum("ihd,ihd->hi", grad_out.abs(), out.abs()) + grad_lse.T.abs()
    d_s = p * (d_p.abs() + delta[..., None]) * scale
    fold = lambda x: x.unflatten(1, (-1, group)).sum(2)  # noqa: E731
    return [torch.einsum("hij,jhd->ihd", p, wide_v.abs()), 1 + scores.abs().amax(-1).T, torch.einsum("hij,jhd->ihd", d_s, wide_k.abs()),
            fold(torch.einsum("hij,ihd->jhd", d_s, q.abs())), fold(torch.einsum("hij,ihd->jhd", p, grad_out.abs()))]


def assert_kernel_close_to_fp64(case, subtree_end, query_start=0):
    """bf16: P and dS are rounded by 2^-8 and so is each result (out enters delta too); everything else is fp32."""
    actual = run(tree_attention_with_lse, *case, subtree_end, query_start)
    wide = [x.double() for x in case]
    expected = run(tree_attention_reference, *wide, subtree_end, query_start)
    magnitudes = gradient_magnitudes(*wide, subtree_end, query_start)
    for name, mine, reference, terms in zip(("out", "lse", "dq", "dk", "dv"), actual, expected, magnitudes, strict=True):
        tolerance = 2e-6 if name == "lse" else 2.2 * 2**-8
        assert mine.shape == reference.shape
        worst = ((mine.double() - reference).abs() / (terms + 1e-6)).max() if mine.numel() else 0.0
        assert float(worst) <= tolerance, name


heads = st.sampled_from([(1, 1), (2, 2), (4, 2), (6, 1), (5, 5)])


@needs_kernels
@given(tokens=st.one_of(st.integers(1, 40), st.integers(100, 420)), forks=st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]), heads=heads,
       dim=st.sampled_from([16, 48, 64, 128]), seed=st.integers(0, 2**20))
@example(tokens=1, forks=0.0, heads=(1, 1), dim=64, seed=0)
@example(tokens=257, forks=0.0, heads=(8, 2), dim=128, seed=1)
def test_kernel_on_random_forests(tokens, forks, heads, dim, seed):
    assert_kernel_close_to_fp64(inputs(seed, tokens, tokens, *heads, dim, torch.bfloat16), random_tree(seed, tokens, forks))


@needs_kernels
@pytest.mark.parametrize("ends", [
    torch.full((1000,), 1000, dtype=torch.int32), star(300, 9, 77), star(1, 2000, 1), random_tree(5, 4000, 0.01),
    torch.arange(1, 500, dtype=torch.int32),  # every token a tree of its own
], ids=["chain", "star", "fan", "tree", "single tokens"])
def test_kernel_on_large_forests(ends):
    assert_kernel_close_to_fp64(inputs(0, len(ends), len(ends), 2, 1, 64, torch.bfloat16), ends)


@needs_kernels
@given(tokens=st.integers(1, 400), share=st.floats(0, 1), length=st.floats(0, 1), heads=heads, seed=st.integers(0, 2**20))
@example(tokens=300, share=1.0, length=0.0, heads=(6, 1), seed=0)  # decoding: the last token asks
@example(tokens=300, share=0.5, length=0.0, heads=(4, 2), seed=1)  # keys that no query sees get no gradient
def test_kernel_on_a_block_of_queries(tokens, share, length, heads, seed):
    start = int(share * (tokens - 1))
    queries = max(1, int(length * (tokens - start)))
    assert_kernel_close_to_fp64(inputs(seed, queries, tokens, *heads, 64, torch.bfloat16), random_tree(seed, tokens, 0.02), start)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@given(seed=st.integers(0, 999), heads=st.sampled_from([(2, 2), (4, 2), (6, 1)]))
def test_wide_types_on_random_forests(dtype, seed, heads):
    forest = random_forest(seed)
    case = inputs(seed, len(forest), len(forest), *heads, 8, dtype)
    leaves = [[x.clone().to(t).requires_grad_() for x in case] for t in (dtype, torch.float64)]
    out, expected = tree_attention(*leaves[0], forest.subtree_end), tree_attention_reference(*leaves[1], forest.subtree_end).out
    for x in (out, expected):
        x.backward(torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape))
    for mine, reference in zip([out, *(x.grad for x in leaves[0])], [expected, *(x.grad for x in leaves[1])], strict=True):
        assert float((mine - reference).detach().abs().max()) < TOLERANCE[dtype] * float(reference.detach().abs().max().clamp_min(1.0))


def test_blocks_of_queries_equal_the_whole():
    ends = random_tree(1, 50, 0.1)
    for dtype, dim in ((torch.float64, 8), (torch.bfloat16, 16)):
        q, k, v = inputs(0, 50, 50, 4, 2, dim, dtype)
        whole = tree_attention_with_lse(q, k, v, ends)
        blocks = [tree_attention_with_lse(q[a : a + 20], k, v, ends, a) for a in (0, 20, 40)]
        joined = AttentionOutput(*(torch.cat(x) for x in zip(*blocks, strict=True)))
        assert float((joined.lse - whole.lse).abs().max()) < (1e-12 if dtype == torch.float64 else 1e-5)
        assert float((joined.out - whole.out).abs().max()) < (1e-12 if dtype == torch.float64 else 2**-8 * float(v.abs().max()))


@needs_kernels
def test_invisible_keys_change_nothing():
    ends = star(100, 3, 60)
    q, k, v = inputs(0, 280, 280, 2, 1, 32, torch.bfloat16)
    out = tree_attention(q, k, v, ends)
    k[160:220], v[160:220] = 7.0, 1e9  # the second branch
    changed = tree_attention(q, k, v, ends)
    kept = torch.cat([torch.arange(160), torch.arange(220, 280)])
    assert torch.equal(out[kept], changed[kept])


@needs_kernels
def test_deterministic_whatever_the_threads():
    ends = random_tree(9, 900, 0.01)
    case = inputs(1, 900, 900, 4, 2, 64, torch.bfloat16)
    alone = run(tree_attention_with_lse, *case, ends)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for _ in range(5):
            assert all(torch.equal(a, b) for a, b in zip(alone, run(tree_attention_with_lse, *case, ends), strict=True))
    finally:
        torch.set_num_threads(threads)


@needs_kernels
def test_any_strides():
    ends = random_tree(2, 70, 0.1)
    q, k, v = inputs(0, 70, 70, 4, 2, 32, torch.bfloat16)
    packed = torch.cat([q.flatten(1), k.flatten(1), v.flatten(1)], 1)
    views = [x.unflatten(1, (-1, 32)) for x in packed.split([128, 64, 64], 1)]
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    expected = run(tree_attention_with_lse, q, k, v, ends)
    for other in (views, turned, [x.mT.contiguous().mT for x in (q, k, v)]):
        assert all(torch.equal(a, b) for a, b in zip(expected, run(tree_attention_with_lse, *other, ends), strict=True))


@needs_kernels
def test_ops_pass_opcheck():
    ends = random_tree(2, 20, 0.2)
    q, k, v = (x.requires_grad_() for x in inputs(0, 20, 20, 2, 1, 16, torch.bfloat16))
    ops = torch.ops.m2_ops
    torch.library.opcheck(ops.tree_attention, (q, k, v, ends, 0))
    torch.library.opcheck(ops.tree_attention, (q[5:9].detach(), k, v, ends, 5))
    q, k, v = q.detach(), k.detach(), v.detach()
    out, lse = ops.tree_attention(q, k, v, ends, 0)
    torch.library.opcheck(ops.tree_attention_backward, (torch.randn_like(out), torch.randn_like(lse), q, k, v, out, lse, ends, 0))


def test_no_tokens():
    for dtype in (torch.float32, torch.bfloat16):
        empty = torch.empty(0, 2, 16, dtype=dtype, requires_grad=True)
        out = tree_attention(empty, empty, empty, torch.empty(0, dtype=torch.int32))
        assert out.shape == (0, 2, 16)
        out.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_arguments_that_do_not_fit_are_named(dtype):
    q, kv, ends = torch.randn(4, 4, 16, dtype=dtype), torch.randn(4, 2, 16, dtype=dtype), torch.full((4,), 4, dtype=torch.int32)
    for name, arguments in {
        r"q: torch\.int64": (q.long(), kv, kv, ends), r"k: .* does not fit q": (q, kv[..., :8], kv, ends),
        r"v: .* as k": (q, kv, kv[:3], ends),
        r"subtree_end: torch\.int64": (q, kv, kv, ends.long()), r"subtree_end\[0\] = 9": (q, kv, kv, ends + 5),
        r"subtree_end\[2\] = 4: must lie in \(2, 3\]": (q, kv, kv, torch.tensor([4, 3, 4, 4], dtype=torch.int32)),
        r"subtree_end\[1\] = 1": (q, kv, kv, torch.tensor([4, 1, 4, 4], dtype=torch.int32)), r"query_start: 1": (q, kv, kv, ends, 1),
    }.items():
        with pytest.raises(ValueError, match=name):
            tree_attention(*arguments)


@needs_kernels
def test_kernels_check_for_themselves():
    q, kv, ends = torch.randn(4, 4, 16).bfloat16(), torch.randn(4, 2, 16).bfloat16(), torch.full((4,), 4, dtype=torch.int32)
    ops = torch.ops.m2_ops
    for name, arguments in {
        "q: Float": (q.float(), kv, kv, ends, 0), "q: head_dim 8": (q[..., :8], kv[..., :8], kv[..., :8], ends, 0),
        "k: 3 heads": (q, torch.randn(4, 3, 16).bfloat16(), kv, ends, 0), "v: shape": (q, kv, kv[:3], ends, 0),
        "subtree_end: Long": (q, kv, kv, ends.long(), 0), "query_start: 2": (q, kv, kv, ends, 2),
    }.items():
        with pytest.raises(ValueError, match=name):
            ops.tree_attention(*arguments)
    out, lse = ops.tree_attention(q, kv, kv, ends, 0)
    with pytest.raises(ValueError, match="lse: shape"):
        ops.tree_attention_backward(out, None, q, kv, kv, out, lse[:2], ends, 0)


def test_chains_equal_causal_attention():
    forest = TokenForest.from_documents([range(n) for n in (8, 9, 7)])
    q, k, v = inputs(0, 24, 24, 4, 2, 16, torch.bfloat16)
    out, start = tree_attention(q, k, v, forest.subtree_end), 0
    for n in (8, 9, 7):
        part = [x[start : start + n].transpose(0, 1).double() for x in (q, k, v)]
        expected = torch.nn.functional.scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True).transpose(0, 1)
        assert float((out[start : start + n] - expected).abs().max()) < 2**-7 * float(expected.abs().max())
        start += n

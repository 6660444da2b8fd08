"""Log-probs and entropies without logits: values and gradients against the written-out fp64 softmax, whole and in parts."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_m2.ops import linear_cross_entropy
from megatron_m2.ops.linear_cross_entropy import (
    SoftmaxParts,
    combine_parts,
    linear_logprobs,
    linear_logprobs_and_entropy,
    parts_of_logits,
    softmax_parts,
    softmax_parts_reference,
)
from tests.conftest import needs_kernels, relative_error

# Values: fp32 sums of a few hundred terms of order 1 and, in the kernel, an exponential good to 20 ulp. Its operands are bf16 in both.
# Without the kernel (odd widths) bf16 logits up to about 40 are rounded to 2^-8 of themselves.
VALUE_TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-5}
# Gradients, of the sum of the magnitudes of their terms. bf16: each logit's gradient is rounded by 2^-8, the sum of each chunk of the
# vocabulary by as much, and the sum of those.
GRADIENT_TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3 * 2**-8}
# Beside that, a logit of order 20 is known to 2^-24 of itself, and each of its gradients to as much of its terms, which may cancel.
NOISE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 1e-5}


def inputs(seed: int, tokens: int, hidden: int, vocab: int, predictions: int | None, dtype: torch.dtype):
    g = torch.Generator().manual_seed(seed)
    h, w = torch.randn(tokens, hidden, generator=g).to(dtype), torch.randn(vocab, hidden, generator=g).to(dtype)
    n = tokens if predictions is None else predictions
    sources = None if predictions is None else torch.randint(0, max(1, tokens), (n,), generator=g)
    return h, w, torch.randint(0, vocab, (n,), generator=g), sources


def weighted_sum(parts: SoftmaxParts) -> torch.Tensor:
    g = torch.Generator().manual_seed(5)
    return sum((p * torch.randn(p.shape, generator=g, dtype=torch.float64).to(p.dtype)).sum() for p in parts)


def run(op, h, w, targets, sources, **options):
    h, w = h.clone().requires_grad_(), w.clone().requires_grad_()
    parts = op(h, w, targets, sources_N=sources, **options)
    weighted_sum(parts).backward()
    return [p.detach() for p in parts], h.grad, w.grad


def gradient_magnitudes(h, w, targets, sources, vocab_start=0, with_mean=False):
    """Of the terms whose sums are the gradients of hidden and weight."""
    rows = h if sources is None else h[sources]
    logits = (rows @ w.T).detach().requires_grad_()
    parts = parts_of_logits(logits, targets - vocab_start, with_mean)
    d_logits = torch.autograd.grad(weighted_sum(parts), logits)[0].abs()
    d_rows = d_logits @ w.abs()
    return d_rows if sources is None else torch.zeros_like(h).index_add(0, sources, d_rows), d_logits.T @ rows.abs()


def assert_equals_reference(case, dtype, op=softmax_parts, **options):
    values, dh, dw = run(op, *case, **options)
    wide = [t.double() if t is not None and t.is_floating_point() else t for t in case]
    expected, expected_dh, expected_dw = run(softmax_parts_reference, *wide, **options)
    assert dh.dtype == dw.dtype == dtype
    for value, reference in zip(values, expected, strict=True):
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert value.shape == reference.shape
        if value.numel():
            assert float((value - reference).abs().max()) < VALUE_TOLERANCE[dtype] * float(reference.abs().max().clamp_min(1.0))
    for grad, reference, terms in zip((dh, dw), (expected_dh, expected_dw), gradient_magnitudes(*wide, **options), strict=True):
        assert bool(((grad - reference).abs() <= GRADIENT_TOLERANCE[dtype] * terms + NOISE[dtype]).all())


@pytest.mark.parametrize("dtype", list(VALUE_TOLERANCE))
@given(tokens=st.integers(1, 150), hidden=st.integers(1, 40), vocab=st.integers(1, 600), predictions=st.none() | st.integers(0, 150),
       with_mean=st.booleans(), seed=st.integers(0, 2**20))
@example(tokens=65, hidden=8, vocab=257, predictions=None, with_mean=True, seed=0)  # one beyond every block
@example(tokens=2100, hidden=4, vocab=40 * 256, predictions=None, with_mean=True, seed=1)  # tasks, splits and chunks beyond one
@example(tokens=1, hidden=2, vocab=1, predictions=None, with_mean=True, seed=2)
def test_equals_fp64_reference(dtype, tokens, hidden, vocab, predictions, with_mean, seed):
    if dtype == torch.bfloat16:
        hidden += hidden % 2
    assert_equals_reference(inputs(seed, tokens, hidden, vocab, predictions, dtype), dtype, with_mean=with_mean)


def test_odd_width_in_bf16_rounds_its_logits():
    h, w, targets, _ = inputs(0, 9, 7, 300, None, torch.bfloat16)
    expected = F.linear(h, w).float().log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    assert relative_error(linear_logprobs(h, w, targets), expected) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_logits_at_a_time(dtype, monkeypatch):
    monkeypatch.setattr(linear_cross_entropy, "_CHUNK_ELEMENTS", 1)
    assert_equals_reference(inputs(4, 20, 6, 900, 33, dtype), dtype, with_mean=True)


def test_agrees_with_torch_cross_entropy():
    h, w, targets, _ = inputs(1, 70, 16, 300, None, torch.bfloat16)
    logits = h.double() @ w.double().T
    logprobs, entropy = linear_logprobs_and_entropy(h, w, targets)
    assert relative_error(logprobs, -F.cross_entropy(logits, targets, reduction="none")) < 1e-5
    assert relative_error(entropy, torch.distributions.Categorical(logits=logits).entropy()) < 1e-4
    assert torch.equal(logprobs, linear_logprobs(h, w, targets))


@pytest.mark.parametrize("dtype", list(VALUE_TOLERANCE))
@given(cuts=st.lists(st.integers(1, 299), max_size=3, unique=True).map(sorted), seed=st.integers(0, 99))
def test_parts_of_the_vocabulary_equal_the_whole(dtype, cuts, seed):
    """Each rank's share of the head, combined as an all-reduce would."""
    h, w, targets, sources = inputs(seed, 30, 8, 300, 40, dtype)
    edges = [0, *cuts, 300]

    def in_parts(h, w, targets, *, sources_N, with_mean) -> SoftmaxParts:
        return combine_parts([softmax_parts(h, w[a:b], targets, sources_N=sources_N, vocab_start=a, with_mean=with_mean)
                              for a, b in itertools.pairwise(edges)])

    assert_equals_reference((h, w, targets, sources), dtype, in_parts, with_mean=True)


def test_survives_two_backwards():
    for dtype in (torch.float32, torch.bfloat16):
        h, w, targets, _ = inputs(0, 3, 4, 6, None, dtype)
        h.requires_grad_()
        out = linear_logprobs(h, w, targets).sum()
        out.backward(retain_graph=True)
        first, h.grad = h.grad.clone(), None
        out.backward()
        assert torch.equal(first, h.grad)


def test_certain_and_hopeless_targets():
    """Logits of +-3000: no overflow, and a certain target has log-prob 0 and no gradient."""
    h, w = torch.tensor([[30.0, 0.0]]).bfloat16().requires_grad_(), torch.tensor([[100.0, 0.0], [-100.0, 0.0]]).bfloat16()
    for target, expected in ((0, 0.0), (1, -6000.0)):
        logprob, entropy = linear_logprobs_and_entropy(h, w, torch.tensor([target]))
        assert float(logprob.detach()) == pytest.approx(expected, abs=1e-3)
        assert float(entropy.detach()) == pytest.approx(0.0, abs=1e-3)
        h.grad = None
        logprob.sum().backward()
        assert h.grad.flatten().tolist() == [-200.0 * target, 0.0]


@needs_kernels
def test_deterministic_whatever_the_threads():
    case = inputs(7, 300, 32, 1000, 280, torch.bfloat16)
    alone = run(softmax_parts, *case, with_mean=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        together = run(softmax_parts, *case, with_mean=True)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(alone[0], together[0], strict=True))
    assert torch.equal(alone[1], together[1])


@needs_kernels
@pytest.mark.parametrize("with_mean", [True, False])
def test_ops_pass_opcheck(with_mean):
    h, w, targets, sources = inputs(0, 5, 6, 11, 7, torch.bfloat16)
    h.requires_grad_()
    w.requires_grad_()
    ops = torch.ops.m2_ops
    torch.library.opcheck(ops.linear_cross_entropy, (h, w, targets, sources, 3, with_mean))
    target, lse, mean = (t.detach() for t in ops.linear_cross_entropy(h, w, targets, None if len(targets) == 5 else sources, 0, with_mean))
    torch.library.opcheck(ops.linear_cross_entropy_backward,
                          (torch.ones(7), torch.ones(7), torch.ones_like(mean), h.detach(), w.detach(), targets, sources, lse, mean, 0))
    assert target.shape == lse.shape


def test_arguments_that_do_not_fit_are_named():
    h, w, targets = torch.randn(4, 6), torch.randn(9, 6), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="weight"):
        linear_logprobs(h, w[:, :5], targets)
    with pytest.raises(ValueError, match="hidden"):
        softmax_parts(h.long(), w, targets)
    with pytest.raises(ValueError, match=r"targets: torch\.int64 \[3\]"):
        linear_logprobs(h, w, targets[:3])
    with pytest.raises(ValueError, match=r"sources: torch\.int32"):
        linear_logprobs(h, w, targets, targets.int())
    with pytest.raises(ValueError, match="id 9 outside the vocabulary of 9"):
        linear_logprobs(h, w, targets + 9)


@needs_kernels
def test_kernels_check_for_themselves():
    h, w, targets, ops = torch.randn(4, 6).bfloat16(), torch.randn(9, 6).bfloat16(), torch.zeros(4, dtype=torch.int64), torch.ops.m2_ops
    with pytest.raises(ValueError, match="hidden: Float"):
        ops.linear_cross_entropy(h.float(), w, targets, None, 0, False)
    with pytest.raises(ValueError, match=r"hidden: shape .* even"):
        ops.linear_cross_entropy(h[:, :5], w[:, :5], targets, None, 0, False)
    with pytest.raises(ValueError, match="weight: shape"):
        ops.linear_cross_entropy(h, w[:, :4], targets, None, 0, False)
    with pytest.raises(ValueError, match=r"sources\[1\]: 4, need 0 to 3"):
        ops.linear_cross_entropy(h, w, targets, torch.tensor([0, 4, 1, 1]), 0, False)

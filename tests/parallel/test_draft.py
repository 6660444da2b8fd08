"""The drafts' loss beside KL and acceptance of logits written out, differentiated by autograd; whole vocabulary and split."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_m2.parallel import draft as module
from megatron_m2.parallel.collectives import gather_rows, total
from megatron_m2.parallel.draft import draft_loss
from megatron_m2.parallel.layout import ParallelConfig, part
from megatron_m2.parallel.mesh import ONE, build_mesh
from tests.conftest import relative_error
from tests.parallel.ranks import on_ranks

HIDDEN, VOCAB = 6, 23


def operands(rows, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, HIDDEN, generator=generator, dtype=torch.float64).to(dtype) for n in (rows, rows, VOCAB)]


def written_out(draft, policy, weight, top_k):
    q, p = (torch.softmax(x @ weight.T, -1) for x in (draft, policy))
    kl = []
    for row_q, row_p in zip(q, p, strict=True):
        best = row_p.argsort(descending=True)[:top_k]
        share = row_p[best] / row_p[best].sum()
        kl.append((share * (share.log() - row_q[best].log())).sum())
    return torch.stack(kl), torch.minimum(p, q).sum(-1)


@given(st.integers(1, 9), st.integers(1, VOCAB + 5), st.sampled_from([1, 50, 1 << 24]), st.integers(0, 99))
def test_equals_logits_written_out(rows, top_k, chunk, seed):
    draft, policy, weight = operands(rows, seed=seed)
    draft.requires_grad_()
    upstream = torch.randn(rows, dtype=torch.float64)
    kl, acceptance = written_out(draft, policy, weight, top_k)
    (expected,) = torch.autograd.grad((kl * upstream).sum(), draft)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK_ELEMENTS", chunk)
        mine, share = draft_loss(draft, policy, weight, top_k, 0, ONE.tp)
    assert share == slice(0, rows)
    assert relative_error(mine.kl, kl) < 1e-12
    assert relative_error(mine.acceptance, acceptance) < 1e-12
    (actual,) = torch.autograd.grad((mine.kl * upstream).sum(), draft)
    assert relative_error(actual, expected) < 1e-12


def test_a_draft_like_the_policy_is_always_accepted():
    _, policy, weight = operands(4)
    mine, _ = draft_loss(policy, policy, weight, VOCAB, 0, ONE.tp)
    assert float(mine.kl.abs().max()) < 1e-14
    assert relative_error(mine.acceptance, torch.ones(4, dtype=torch.float64)) < 1e-14


def test_no_rows_and_bf16():
    draft, policy, weight = operands(0)
    mine, _ = draft_loss(draft.requires_grad_(), policy, weight, 3, 0, ONE.tp)
    assert torch.autograd.grad(mine.kl.sum(), draft)[0].shape == (0, HIDDEN)
    draft, policy, weight = operands(5, torch.bfloat16)
    mine, _ = draft_loss(draft.requires_grad_(), policy, weight, 3, 0, ONE.tp)
    exact, _ = written_out(draft.double(), policy.double(), weight.double(), 3)
    assert mine.kl.dtype == torch.float32
    assert relative_error(mine.kl, exact) < 0.03  # logits are rounded to 8 bits, as a bf16 head's are
    assert torch.autograd.grad(mine.kl.sum(), draft)[0].dtype == torch.bfloat16


def split_vocabulary():
    tp = build_mesh(ParallelConfig(tp=3), "cpu", 3).tp
    start, stop = part(VOCAB, tp.size, tp.rank)
    for rows, top_k in ((7, 4), (2, 1), (5, VOCAB)):
        draft, policy, weight = operands(rows)
        draft.requires_grad_()
        upstream = torch.arange(1.0, rows + 1, dtype=torch.float64)
        kl, acceptance = written_out(draft, policy, weight, top_k)
        (expected,) = torch.autograd.grad((kl * upstream).sum(), draft)
        mine, share = draft_loss(draft, policy, weight[start:stop], top_k, start, tp)
        counts = [b - a for a, b in (part(rows, tp.size, r) for r in range(tp.size))]
        assert relative_error(gather_rows(mine.kl.detach(), tp, counts), kl) < 1e-12
        assert relative_error(gather_rows(mine.acceptance, tp, counts), acceptance) < 1e-12
        (partial,) = torch.autograd.grad((mine.kl * upstream[share]).sum(), draft)
        assert relative_error(total(partial, tp), expected) < 1e-12


def test_a_split_vocabulary_gives_the_same():
    on_ranks(3, split_vocabulary)

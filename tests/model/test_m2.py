"""The model on forests: merged samples equal separate ones, MTP equals DeepSeek-V3's shift, counts and refusals."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from megatron_m2.forest import TokenForest, merge_samples
from megatron_m2.model.generate import logits
from megatron_m2.model.layers import Tokens, balance_loss
from megatron_m2.model.m2 import build_model
from megatron_m2.ops.tree_attention import tree_attention
from tests.conftest import random_samples, relative_error, tiny_config


def model_with_bias(config, dtype=torch.float64):
    """A model whose router biases are not zero, as after some training."""
    model = build_model(config, dtype, seed=1)
    for i, router in enumerate(model.routers()):
        router.bias.copy_(torch.randn(config.num_experts, generator=torch.Generator().manual_seed(i)) * 0.05)
    return model


def loss_and_gradients(model, forests):
    model.zero_grad()
    total, counts = 0.0, 0
    for forest in forests:
        out = model(forest)
        loss = -(forest.weight * out.logprobs).sum() - 0.3 * sum((forest.weight * lp).sum() for lp in out.mtp_logprobs)
        loss.backward()
        total, counts = total + float(loss), counts + out.expert_counts
    return total, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, counts


@given(seed=st.integers(0, 500), mtp=st.integers(0, 2))
def test_merged_samples_equal_separate_samples(seed, mtp):
    model = model_with_bias(tiny_config(num_mtp_modules=mtp))
    samples = random_samples(seed)
    merged, grads, counts = loss_and_gradients(model, [merge_samples(samples)[0]])
    separate, expected, expected_counts = loss_and_gradients(model, [TokenForest.from_documents([s]) for s in samples])
    assert merged == pytest.approx(separate, rel=1e-12, abs=1e-12)
    assert torch.equal(counts, expected_counts)
    for name, grad in expected.items():
        assert (grads[name] - grad).abs().max() <= 1e-11 * grad.abs().max().clamp_min(1e-3), name


def test_logprobs_agree_with_the_full_logits():
    model = model_with_bias(tiny_config())
    documents = [torch.randint(0, 97, (n,)) for n in (1, 6, 13)]
    out = model(TokenForest.from_documents([d.numpy() for d in documents]))
    expected = []
    for d in documents:
        full = logits(model, d[None])[0].log_softmax(-1)
        expected += [torch.zeros(1, dtype=torch.float64), full[:-1].gather(1, d[1:, None]).squeeze(1)]
    assert relative_error(out.logprobs, torch.cat(expected)) < 1e-12


def attend(forest):
    return partial(tree_attention, subtree_end_T=forest.subtree_end)


def test_mtp_on_a_chain_is_deepseek_v3s_shift():
    """Module k at position i joins the embedding of token i + k with module k - 1's output at i, and predicts token i + k + 1."""
    model = model_with_bias(tiny_config(num_mtp_modules=2))
    tokens = torch.randint(0, 97, (12,))
    forest = TokenForest.from_documents([tokens.numpy()])
    out = model(forest)
    hidden, _ = model.trunk(model.embed_tokens(tokens), forest.depth, [attend(forest)] * len(model.layers))
    for k, module in enumerate(model.mtp, start=1):
        length = len(tokens) - k
        chain = TokenForest.from_documents([tokens[:length].numpy()])
        embedding, previous = model.embed_tokens(tokens[k:]), hidden[:length]
        hidden, _ = module(embedding, previous, Tokens(model._rotary(torch.arange(length)), attend(chain), None, (length,)))
        scores = F.linear(module.final_layernorm(hidden), model.lm_head.weight).log_softmax(-1)
        expected = scores[:-1].gather(1, tokens[k + 1 :, None]).squeeze(1)
        assert relative_error(out.mtp_logprobs[k - 1][k + 1 :], expected) < 1e-12
        assert (out.mtp_logprobs[k - 1][: k + 1] == 0).all()


def test_forests_too_shallow_for_mtp():
    model = model_with_bias(tiny_config(num_mtp_modules=3))
    out = model(TokenForest.from_documents([[1, 2], [3]]))
    assert [float(lp.abs().sum()) for lp in out.mtp_logprobs] == [0.0, 0.0, 0.0]
    assert out.expert_counts[:, :].sum(1).tolist() == [6, 6, 2, 0, 0]


def test_a_token_without_weight_is_not_predicted():
    model = model_with_bias(tiny_config())
    forest = TokenForest.from_documents([[1, 2, 3, 4]])
    some = replace(forest, weight=torch.tensor([0.0, 0.0, 2.0, 0.0]))
    out, every = model(some), model(forest)
    assert out.logprobs[[0, 1, 3]].tolist() == [0, 0, 0]
    assert float(out.logprobs[2].detach()) == pytest.approx(float(every.logprobs[2].detach()), rel=1e-12)


def test_fp32_head_in_a_bf16_model():
    config = tiny_config()
    forest = TokenForest.from_documents([torch.randint(0, 97, (40,)).numpy()])
    plain = build_model(config, torch.bfloat16, seed=3)
    exact = build_model(replace(config, fp32_head=True), torch.bfloat16, seed=3)
    hidden = exact(forest).hidden_states.detach()
    logits = F.linear(hidden.double(), exact.lm_head.weight.double())
    assert relative_error(exact.head(hidden), logits) < 1e-6
    assert relative_error(plain.head(hidden), logits) > 1e-5
    expected = logits[:-1].log_softmax(-1).gather(1, forest.tokens[1:, None]).squeeze(1)
    assert relative_error(exact(forest).logprobs[1:].detach(), expected) < 1e-6
    assert exact.layers[0].moe.router.weight.dtype == torch.float32


def test_balance_loss_is_one_when_balanced_and_pushes_down_the_overloaded():
    logits_TE = torch.zeros(6, 4, dtype=torch.float64, requires_grad=True)
    assert float(balance_loss(logits_TE, torch.tensor([3, 3, 3, 3]), None).detach()) == pytest.approx(1.0)
    balance_loss(logits_TE, torch.tensor([9, 1, 1, 1]), None).backward()
    assert (logits_TE.grad[:, 0] > 0).all()
    assert (logits_TE.grad[:, 1:] < 0).all()
    twice = torch.randn(3, 4, dtype=torch.float64)
    multiplicity = torch.tensor([2, 1, 3], dtype=torch.int32)
    counts = torch.tensor([5, 1, 2, 4])
    repeated = balance_loss(twice.repeat_interleave(multiplicity.long(), 0), counts, None)
    assert float(balance_loss(twice, counts, multiplicity)) == pytest.approx(float(repeated))


def test_aux_loss_is_off_without_a_coefficient():
    forest = TokenForest.from_documents([[1, 2, 3]])
    assert float(build_model(tiny_config(), seed=0)(forest).aux_loss) == 0
    with_aux = build_model(tiny_config(router_aux_loss_coef=0.01), seed=0)(forest).aux_loss
    assert 0.01 < float(with_aux.detach()) < 0.01 * 2 * 8


def test_tokens_and_positions_out_of_range_are_refused():
    model = build_model(tiny_config(max_position_embeddings=4), seed=0)
    with pytest.raises(ValueError, match=r"forest.tokens: id 97 outside the vocabulary of 97"):
        model(TokenForest.from_documents([[1, 97]]))
    with pytest.raises(ValueError, match=r"forest.depth: 4 reaches beyond max_position_embeddings = 4"):
        model(TokenForest.from_documents([[1, 2, 3, 4, 5]]))


def test_same_seed_same_weights():
    first, second, other = (build_model(tiny_config(), torch.float32, seed=s).state_dict() for s in (5, 5, 6))
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


@pytest.mark.parametrize("recompute", [False, True])
def test_recorded_routes_are_used(recompute):
    """Counted by hand; those that were not recorded are as the router has them, and its own choices replayed change nothing."""
    config = tiny_config(num_mtp_modules=1)
    model = model_with_bias(config)
    model.recompute = recompute
    forest = merge_samples(random_samples(3))[0]
    plain, chosen = model(forest), []
    hooks = [layer.moe.router.register_forward_hook(lambda router, _, logits: chosen.append(
        (logits.sigmoid() + router.bias).topk(2).indices)) for layer in model.layers]
    model(forest)
    for hook in hooks:
        hook.remove()
    own = torch.stack(chosen, 1).to(torch.int16)
    assert torch.equal(model(replace(forest, routes=own)).logprobs, plain.logprobs)
    assert torch.equal(model(replace(forest, routes=torch.full_like(own, -1))).logprobs, plain.logprobs)
    other = torch.stack([torch.randperm(8)[:2] for _ in range(len(forest) * 2)]).view(len(forest), 2, 2).to(torch.int16)
    other[3, 1] = -1
    replayed = model(replace(forest, routes=other))
    assert not torch.equal(replayed.logprobs, plain.logprobs)
    for layer in range(2):
        counts = torch.zeros(8, dtype=torch.int64)
        for t, row in enumerate(other[:, layer].tolist()):
            for expert in row if row[0] >= 0 else []:
                counts[expert] += int(forest.multiplicity[t])
        left = replayed.expert_counts[layer] - counts  # of the token without routes
        assert left.sum() == (2 * int(forest.multiplicity[3]) if layer == 1 else 0)
        assert (left >= 0).all()
    assert torch.equal(replayed.expert_counts[2].sum(), plain.expert_counts[2].sum())  # MTP modules have no recorded routes

"""Schedules at their corners, losses against plain formulas, the optimizer against torch's AdamW."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from megatron_m2.forest import TokenForest, merge_samples
from megatron_m2.model.m2 import build_model
from megatron_m2.training import schedule
from megatron_m2.training.config import OptimConfig, StageConfig
from megatron_m2.training.losses import LossWeights, forest_loss
from megatron_m2.training.optimizer import MasterAdamW
from tests.conftest import random_samples, tiny_config

STAGE = StageConfig(steps=100, warmup_steps=10, decay_steps=40, mtp_weight=0.3, mtp_weight_end=0.1, router_bias_rate=1e-2)


def test_warmup_stable_decay():
    optim = OptimConfig(lr=2.0, min_lr_ratio=0.1)
    lr = [schedule.learning_rate(s, optim, STAGE) for s in range(100)]
    assert lr[0] == pytest.approx(0.2)
    assert lr[4] == pytest.approx(1.0)
    assert lr[9:60] == [2.0] * 51
    assert lr[79] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert lr[99] == pytest.approx(0.2)
    assert all(a >= b for a, b in itertools.pairwise(lr[9:]))


def test_mtp_weight_and_bias_rate_move_in_the_decay_only():
    assert {schedule.mtp_weight(s, STAGE) for s in range(60)} == {0.3}
    assert schedule.mtp_weight(79, STAGE) == pytest.approx(0.2)
    assert schedule.mtp_weight(99, STAGE) == pytest.approx(0.1)
    assert schedule.router_bias_rate(0, STAGE) == 1e-2
    assert schedule.router_bias_rate(99, STAGE) == pytest.approx(1e-3)


def test_no_warmup_and_no_decay():
    flat = StageConfig(steps=3)
    assert [schedule.wsd(s, flat) for s in range(3)] == [1.0, 1.0, 1.0]


def test_losses_of_two_forests_are_the_means_over_all_their_tokens():
    model = build_model(tiny_config(num_mtp_modules=2, router_aux_loss_coef=0.01), torch.float64, seed=0)
    forests = [merge_samples(random_samples(s))[0] for s in (1, 2)]
    weights = LossWeights.of(forests, 2)
    losses = [forest_loss(model(f), f, weights, 0.25, 2) for f in forests]
    outputs = [model(f) for f in forests]
    lm = sum(-(f.weight * o.logprobs).sum() for f, o in zip(forests, outputs, strict=True)) / sum(f.weight.sum() for f in forests)
    assert float(sum(x.lm for x in losses)) == pytest.approx(float(lm.detach()), rel=1e-12)
    mtp = 0.0
    for k in (1, 2):
        deep = [f.weight * (f.depth > k) for f in forests]
        total = sum(-(w * o.mtp_logprobs[k - 1]).sum() for w, o in zip(deep, outputs, strict=True))
        mtp += float(total.detach()) / float(sum(w.sum() for w in deep)) / 2
    assert float(sum(x.mtp for x in losses)) == pytest.approx(mtp, rel=1e-12)
    aux = sum(float(o.aux_loss.detach()) for o in outputs) / 2
    assert float(sum(x.total for x in losses).detach()) == pytest.approx(float(lm.detach()) + 0.25 * mtp + aux, rel=1e-12)


def test_a_step_with_nothing_to_predict_is_refused():
    with pytest.raises(ValueError, match="nothing to predict"):
        LossWeights.of([TokenForest.from_documents([[1], [2]])], 0)


def test_fp32_master_step_is_torchs_adamw():
    model = build_model(tiny_config(), torch.float32, seed=0)
    twin = copy.deepcopy(model)
    config = OptimConfig(lr=1e-2, grad_clip=0.5)
    ours = MasterAdamW(model.named_parameters(), config)
    decayed = [p for p in twin.parameters() if p.dim() > 1]
    rest = [p for p in twin.parameters() if p.dim() == 1]
    theirs = torch.optim.AdamW([{"params": decayed}, {"params": rest, "weight_decay": 0.0}], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    forest = TokenForest.from_documents([torch.randint(0, 97, (30,)).numpy()])
    for _ in range(3):
        norm = None
        for m in (model, twin):
            (-m(forest).logprobs.sum()).backward()
        norm = ours.step(1e-2)
        expected = torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        theirs.step()
        theirs.zero_grad()
        assert norm == pytest.approx(float(expected), rel=1e-6)
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (a - b).abs().max() < 1e-5, name  # three steps of 1e-2 each; tiny gradients have a rounded direction


def test_bf16_gradients_are_summed_in_fp32():
    model = build_model(tiny_config(), torch.bfloat16, seed=0)
    optimizer = MasterAdamW(model.named_parameters(), OptimConfig())
    weight, master = model.lm_head.weight, optimizer.masters["lm_head.weight"]
    assert master.dtype == torch.float32
    for value in (1.0, 2.0**-9, 2.0**-9):  # each small part alone would vanish in a bf16 sum
        (weight * value).sum().backward()
        assert weight.grad is None
    optimizer.gradients.finish()
    sums = {n: g for b in optimizer.gradients.buckets for n, g in zip(b.names, b.gradients(), strict=True)}
    assert (sums["lm_head.weight"] == 1 + 2.0**-8).all()
    optimizer.gradients.reset()
    for p in model.parameters():
        if p is not weight and p.requires_grad:
            p.sum().backward()
    optimizer.step(1e-3)
    assert torch.equal(weight, master.bfloat16())
    assert not torch.equal(weight.float(), master)


def test_a_gradient_that_is_not_finite_changes_nothing():
    model = build_model(tiny_config(), torch.float32, seed=0)
    optimizer = MasterAdamW(model.named_parameters(), OptimConfig())
    before = copy.deepcopy(model.state_dict())
    (model.lm_head.weight.sum() * float("nan")).backward()
    with pytest.raises(FloatingPointError, match="nan"):
        optimizer.step(1e-3)
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())

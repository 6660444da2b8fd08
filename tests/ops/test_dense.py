"""Which product the dense projections take, and that the seam to TransformerEngine changes nothing but the product.

TransformerEngine runs on GPUs only: a stand-in of its interface, computing in bf16, shows here what reaches it and what becomes of it.
"""

from __future__ import annotations

import logging
import sys
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from megatron_m2.forest import TokenForest
from megatron_m2.model.m2 import build_model
from megatron_m2.ops.dense import Linear, TELinear, dense_linear, transformer_engine
from tests.conftest import tiny_config


class StandIn(torch.nn.Module):
    def __init__(self, in_features, out_features, bias, params_dtype, device):
        super().__init__()
        assert not bias
        self.weight = torch.nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype, device=device))

    def forward(self, x):
        assert stand_in.inside, "outside of fp8_autocast"
        assert len(x) % 16 == 0
        return F.linear(x, self.weight)


@contextmanager
def fp8_autocast(enabled, fp8_recipe):
    stand_in.inside = enabled and fp8_recipe == "blocks"
    yield
    stand_in.inside = False


stand_in = SimpleNamespace(inside=False, Linear=StandIn, fp8_autocast=fp8_autocast)


@pytest.fixture
def engine(monkeypatch):
    recipe = ModuleType("transformer_engine.common.recipe")
    recipe.Float8BlockScaling = lambda: "blocks"
    monkeypatch.setitem(sys.modules, "transformer_engine.common.recipe", recipe)
    return stand_in


def test_torch_without_a_gpu_or_the_module(caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    for gpu, said in ((False, "needs a GPU"), (True, "not importable")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", None)
        transformer_engine.cache_clear()
        caplog.clear()
        assert [type(dense_linear(4, 3, torch.bfloat16, fp8=True)) for _ in range(3)] == [Linear] * 3
        assert len(caplog.messages) == 1
        assert said in caplog.messages[0]
    assert type(dense_linear(4, 3, torch.bfloat16, fp8=False)) is Linear
    transformer_engine.cache_clear()


def test_the_weight_stays_ours_and_ragged_rows_are_padded(engine):
    ours, theirs = Linear(32, 24, torch.bfloat16), TELinear(32, 24, torch.bfloat16, engine)
    with torch.no_grad():
        theirs.weight.copy_(ours.weight)
    assert list(theirs.state_dict()) == ["weight"]
    assert [n for n, _ in theirs.named_parameters()] == ["weight"]
    x = torch.randn(21, 32, dtype=torch.bfloat16, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    out, expected = theirs(x), ours(twin)
    assert torch.equal(out, expected)
    out.float().square().sum().backward()
    expected.float().square().sum().backward()
    assert torch.equal(x.grad, twin.grad)
    # the padded rows add zeros to a sum of products: fp32 sums in another order, rounded to bf16
    assert (theirs.weight.grad - ours.weight.grad).abs().max() <= 2**-7 * ours.weight.grad.abs().max()


def test_the_model_takes_it_for_the_attention(engine, monkeypatch):
    monkeypatch.setattr("megatron_m2.ops.dense.transformer_engine", lambda: engine)
    forest = TokenForest.from_documents([torch.randint(0, 97, (37,)).numpy()])
    plain = build_model(tiny_config(), torch.bfloat16, seed=0)
    with_engine = build_model(tiny_config(fp8_dense=True), torch.bfloat16, seed=0)
    assert isinstance(with_engine.layers[0].self_attn.o_proj, TELinear)
    assert with_engine.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(plain(forest).logprobs, with_engine(forest).logprobs)

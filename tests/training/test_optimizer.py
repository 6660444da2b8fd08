"""AdamW on one rank: masters of a bf16 model, and whose implementation runs. On ranks: tests/parallel/test_data.py."""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from megatron_m2.training import optimizer as module
from megatron_m2.training.config import OptimConfig
from megatron_m2.training.optimizer import MasterAdamW, make_adamw
from tests.conftest import relative_error

CONFIG = OptimConfig(weight_decay=0.2, grad_clip=1.0)


def parameters(dtype: torch.dtype) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return {"matrix": nn.Parameter(torch.randn(6, 5, generator=generator).to(dtype)),
            "norm": nn.Parameter(torch.randn(7, generator=generator).to(dtype)),
            "router": nn.Parameter(torch.randn(3, 5, generator=generator))}


def test_gradients_sum_in_fp32_and_masters_keep_what_bf16_loses():
    named = parameters(torch.bfloat16)
    optimizer = MasterAdamW(named.items(), CONFIG)
    wide = {n: nn.Parameter(p.detach().float()) for n, p in named.items()}
    adamw = torch.optim.AdamW([{"params": [wide["matrix"], wide["router"]], "weight_decay": 0.2},
                               {"params": [wide["norm"]], "weight_decay": 0.0}], betas=(0.9, 0.95), eps=1e-8, foreach=False)
    for step in range(5):
        for p in wide.values():
            p.grad = torch.zeros_like(p)
        for microbatch in range(3):
            for i, (name, p) in enumerate(named.items()):
                gradient = torch.randn(p.shape, generator=torch.Generator().manual_seed(9 * step + 3 * microbatch + i)).to(p.dtype) * 1e-3
                (p * gradient).sum().backward()
                wide[name].grad += gradient.float()
        assert named["matrix"].grad is None  # freed as soon as the backward had it
        norm = torch.nn.utils.clip_grad_norm_(wide.values(), 1.0)
        adamw.param_groups[0]["lr"] = adamw.param_groups[1]["lr"] = 1e-4
        adamw.step()
        assert optimizer.step(1e-4) == pytest.approx(float(norm), rel=1e-6)
        for name, p in named.items():
            assert torch.allclose(optimizer.masters[name], wide[name], rtol=1e-6, atol=1e-7), name
            assert torch.equal(p, optimizer.masters[name].to(p.dtype))
    assert optimizer.masters["router"] is named["router"]
    assert optimizer.masters["matrix"].dtype == torch.float32


@pytest.mark.parametrize("factor", [1e-3, 10.0])
def test_weights_apart_are_clipped_by_their_own_norm(factor):
    named, twin = parameters(torch.float64), parameters(torch.float64)
    optimizer = MasterAdamW(named.items(), CONFIG, apart="ma")
    for (name, p), q in zip(named.items(), twin.values(), strict=True):
        p.grad = torch.full_like(p, factor * (3 if name == "matrix" else 1))
        q.grad = p.grad.clone()
    apart = torch.nn.utils.clip_grad_norm_([twin["matrix"]], CONFIG.grad_clip)
    others = torch.nn.utils.clip_grad_norm_([twin["norm"], twin["router"]], CONFIG.grad_clip)
    adamw = torch.optim.AdamW([{"params": [twin["matrix"], twin["router"]], "weight_decay": 0.2},
                               {"params": [twin["norm"]], "weight_decay": 0.0}], lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    adamw.step()
    assert optimizer.step(1e-2) == pytest.approx(float(others), rel=1e-12)
    assert optimizer.norm_apart == pytest.approx(float(apart), rel=1e-12)
    for name, p in named.items():
        moments = optimizer.state_dict()[name]["exp_avg"]  # of the first step: a tenth of the clipped gradient, which AdamW's step hides
        assert relative_error(moments, adamw.state[twin[name]]["exp_avg"]) < 1e-12, name
        assert relative_error(p.detach(), twin[name].detach()) < 1e-12, name


def test_clipping_is_torchs():
    for factor in (1e-3, 10.0):
        named, twin = parameters(torch.float64), parameters(torch.float64)
        optimizer = MasterAdamW(named.items(), CONFIG)
        for p, q in zip(named.values(), twin.values(), strict=True):
            p.grad = torch.full_like(p, factor)
            q.grad = p.grad.clone()
        norm = torch.nn.utils.clip_grad_norm_(twin.values(), CONFIG.grad_clip)
        seen = {}
        optimizer.adamw = SimpleNamespace(step=lambda lr, o=optimizer, s=seen: s.update({n: m.grad.clone() for n, m in o.masters.items()}))
        assert optimizer.step(1.0) == pytest.approx(float(norm), rel=1e-12)
        for name, q in twin.items():
            assert torch.allclose(seen[name], q.grad, rtol=1e-12), name


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nothing_moves_when_the_norm_is_not_finite(bad):
    named = parameters(torch.bfloat16)
    optimizer = MasterAdamW(named.items(), CONFIG)
    before = {n: p.detach().clone() for n, p in named.items()}
    for p in named.values():
        (p * bad).sum().backward()
    with pytest.raises(FloatingPointError, match=f"gradient norm is {bad}"):
        optimizer.step(1e-3)
    assert all(torch.equal(p, before[n]) for n, p in named.items())
    assert all(float(values["step"]) == 0 for values in optimizer.state_dict().values())
    for p in named.values():
        p.sum().backward()
    assert optimizer.step(1e-3) == pytest.approx(52**0.5, rel=1e-6)  # the bad gradients are gone


class StandInFusedAdam(torch.optim.Optimizer):
    """A stand-in for apex, which needs a GPU: its constructor, its state and its way to count steps around the textbook's AdamW. It shows
    which implementation is chosen and that it is fed rightly; apex's own arithmetic is apex's to prove."""

    def __init__(self, params, lr, betas, eps, adam_w_mode, weight_decay=0.0):
        assert adam_w_mode
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        assert all(g["params"] for g in self.param_groups)  # apex looks at the first of each

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            (beta1, beta2), lr = group["betas"], group["lr"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                state["exp_avg"].mul_(beta1).add_((1 - beta1) * p.grad)
                state["exp_avg_sq"].mul_(beta2).add_((1 - beta2) * p.grad**2)
                mean = state["exp_avg"] / (1 - beta1 ** group["step"])
                square = state["exp_avg_sq"] / (1 - beta2 ** group["step"])
                p -= lr * (mean / (square.sqrt() + group["eps"]) + group["weight_decay"] * p)


def test_apex_is_chosen_on_a_gpu_where_it_is_installed(monkeypatch, caplog):
    stand_in = SimpleNamespace(FusedAdam=StandInFusedAdam)
    tensors = {device: [nn.Parameter(torch.linspace(-1, 1, 6).view(2, 3)), nn.Parameter(torch.ones(2))] for device in ("cpu", "cuda")}
    made = {}
    monkeypatch.setitem(sys.modules, "apex.optimizers", stand_in)
    monkeypatch.setitem(sys.modules, "apex", SimpleNamespace(optimizers=stand_in))
    for device, (matrix, vector) in tensors.items():
        groups = [{"params": [matrix], "weight_decay": 0.2}, {"params": [vector], "weight_decay": 0.0}, {"params": []}]
        made[device] = make_adamw(groups, CONFIG, device)
    assert [m.name for m in made.values()] == ["torch.optim.AdamW(fused=True)", "apex.optimizers.FusedAdam"]
    for step in range(4):
        if step == 2:  # what a resumed run does: a new optimizer, into which the state is read
            matrix, vector = tensors["cuda"]
            fresh = make_adamw([{"params": [matrix], "weight_decay": 0.2}, {"params": [vector], "weight_decay": 0.0}], CONFIG, "cuda")
            for p, q in zip(*tensors.values(), strict=True):
                fresh.steps(q).copy_(made["cpu"].steps(p))
                for key, value in made["cpu"].moments(p).items():
                    fresh.moments(q)[key].copy_(value)
            made["cuda"] = fresh
        for device, (matrix, vector) in tensors.items():
            matrix.grad, vector.grad = torch.full((2, 3), 0.1 * (step + 1)), torch.full((2,), -0.3)
            made[device].step(1e-2)
            assert float(made[device].steps(matrix)) == step + 1
        for p, q in zip(*tensors.values(), strict=True):
            assert torch.allclose(p, q, rtol=1e-6)
            for key, value in made["cpu"].moments(p).items():
                assert torch.allclose(value, made["cuda"].moments(q)[key], rtol=1e-6)
    # fp64 is torch's, and so is everything where apex does not import
    assert make_adamw([{"params": [nn.Parameter(torch.ones(1, dtype=torch.float64))]}], CONFIG, "cuda").name.startswith("torch")
    monkeypatch.setitem(sys.modules, "apex.optimizers", None)
    assert make_adamw([{"params": [nn.Parameter(torch.ones(1))]}], CONFIG, "cuda").name.startswith("torch")
    with caplog.at_level(logging.INFO, logger=module.__name__):
        MasterAdamW(parameters(torch.bfloat16).items(), CONFIG)
    assert [r.getMessage() for r in caplog.records] == ["optimizer: torch.optim.AdamW(fused=True)"]


def test_a_rank_without_any_state():
    """Where there are more ranks than rows, some have nothing to update."""
    adamw = make_adamw([{"params": [], "weight_decay": 0.1}, {"params": [], "weight_decay": 0.0}], CONFIG, "cuda")
    adamw.step(1e-3)

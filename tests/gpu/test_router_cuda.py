"""The CUDA router beside the fp64 reference and the CPU kernel, over every template and both ways of reading rows."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from megatron_m2.ops.router import router_reference, sigmoid_router, update_router_bias
from tests.conftest import relative_error
from tests.gpu import DEVICE, needs_gpu, needs_real_gpu
from tests.ops.test_router import forward_backward, inputs

pytestmark = needs_gpu

SHAPES = [(0, 16, 2), (1, 256, 8), (1, 1, 1), (7, 3, 3), (33, 8, 2), (50, 32, 32), (65, 100, 6), (64, 128, 8), (70, 129, 7), (40, 254, 8),
          (9000, 256, 8), (300, 384, 8), (130, 511, 16), (99, 512, 32), (200, 1000, 9), (150, 1023, 32), (20000, 1024, 32)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.parametrize("with_multiplicity", [False, True])
def test_equals_fp64_reference(shape, replay, with_multiplicity):
    tokens, experts, top_k = shape
    logits, bias, multiplicity = (x.to(DEVICE) for x in inputs(tokens + experts, tokens, experts))
    options = {"multiplicity": multiplicity if with_multiplicity else None}
    if replay:
        options["routes"] = torch.rand(tokens, experts, device=DEVICE).argsort(-1)[:, :top_k].int()
    output, grad = forward_backward(sigmoid_router, logits, bias, top_k, **options)
    expected, expected_grad = forward_backward(router_reference, logits.double(), bias.double(), top_k, **options)
    assert torch.equal(output.experts, expected.experts)
    assert torch.equal(output.counts, expected.counts)
    if tokens:
        assert relative_error(output.weights.detach(), expected.weights.detach()) < 1e-6
        assert float((grad - expected_grad).abs().max()) < 1e-6


def test_equals_cpu_kernel_on_continuous_logits():
    """Away from grids, choices may differ only where two choices lie within rounding of each other."""
    logits, bias = 3 * torch.randn(4096, 256), 0.1 * torch.randn(256)
    cpu, gpu = sigmoid_router(logits, bias, 8), sigmoid_router(logits.to(DEVICE), bias.to(DEVICE), 8)
    differ = (cpu.experts != gpu.experts.cpu()).any(-1)
    choice = (logits.double().sigmoid() + bias.double())[differ]
    gap = choice.gather(1, cpu.experts[differ].long()) - choice.gather(1, gpu.experts.cpu()[differ].long())
    assert float(differ.float().mean()) < 0.01
    assert gap.numel() == 0 or float(gap.abs().max()) < 1e-6
    torch.testing.assert_close(cpu.weights[~differ], gpu.weights.cpu()[~differ], rtol=1e-5, atol=1e-7)


def test_unaligned_rows_and_strides():
    """A view that starts off a 16-byte boundary reads element by element; a strided one is copied."""
    storage, bias = torch.randn(1 + 300 * 64, device=DEVICE), torch.randn(64, device=DEVICE)
    logits = storage[1:].view(300, 64)
    assert logits.data_ptr() % 16
    for view in (logits, logits[::3], torch.randn(64, 300, device=DEVICE).t()):
        output, grad = forward_backward(sigmoid_router, view, bias, 8)
        expected, expected_grad = forward_backward(sigmoid_router, view.contiguous().clone(), bias, 8)
        assert all(torch.equal(a, b) for a, b in zip((*output, grad), (*expected, expected_grad), strict=True))


@pytest.mark.parametrize("experts", [20, 200, 500, 1000])
def test_ties_nan_and_infinity(experts):
    bias = torch.zeros(experts, device=DEVICE)
    assert sigmoid_router(torch.zeros(40, experts, device=DEVICE), bias, 18).experts.tolist() == [list(range(18))] * 40
    for nan in (float("nan"), -float("nan")):
        logits = torch.randn(4, experts, device=DEVICE)
        logits[1, 17] = nan
        output = sigmoid_router(logits, bias, 3)
        assert output.experts[1, 0] == 17
        assert output.weights.isnan().all(-1).tolist() == [False, True, False, False]
        assert sigmoid_router(torch.full((2, experts), nan, device=DEVICE), bias, 3).experts.tolist() == [[0, 1, 2]] * 2
    logits = torch.full((1, experts), -float("inf"), device=DEVICE)
    logits[0, [3, 19]] = float("inf")
    output = sigmoid_router(logits, bias, 3)
    assert output.experts.tolist() == [[3, 19, 0]]
    assert output.weights.tolist() == [[0.5, 0.5, 0.0]]


def test_a_lane_that_holds_every_choice():
    """All choices among the few experts of one warp lane, which then has to look for its next ones again and again."""
    for experts in (128, 256, 512, 1024):
        mine = [128 * g + 4 * 5 + r for g in range(experts // 128) for r in range(4)]
        logits = torch.full((3, experts), -4.0)
        logits[:, mine] = torch.randn(3, len(mine))
        output = sigmoid_router(logits.to(DEVICE), torch.zeros(experts).to(DEVICE), len(mine))
        expected = router_reference(logits.double(), torch.zeros(experts).double(), len(mine))
        assert torch.equal(output.experts.cpu(), expected.experts)


def test_runs_repeat():
    logits, bias = torch.randn(9000, 256, device=DEVICE), torch.randn(256, device=DEVICE)
    multiplicity = torch.randint(0, 2**31 - 1, (9000,), dtype=torch.int32, device=DEVICE)
    first, grad = forward_backward(sigmoid_router, logits, bias, 8, multiplicity=multiplicity)
    assert int(first.counts.sum()) == 8 * int(multiplicity.sum())
    for _ in range(3):
        again, grad_again = forward_backward(sigmoid_router, logits, bias, 8, multiplicity=multiplicity)
        assert all(torch.equal(a, b) for a, b in zip((*first, grad), (*again, grad_again), strict=True))


@pytest.mark.parametrize("experts", [1, 8, 256, 1000])
def test_bias_update(experts):
    counts, bias = torch.randint(0, 9, (experts,)), torch.randn(experts)
    on_gpu = bias.to(DEVICE)
    update_router_bias(on_gpu, counts.to(DEVICE), 1e-3)
    update_router_bias(bias, counts, 1e-3)
    assert torch.equal(on_gpu.cpu(), bias)


@needs_real_gpu
def test_other_device_is_named():
    with pytest.raises(ValueError, match=r"^bias: on cpu, need cuda:0"):
        sigmoid_router(torch.zeros(2, 4, device=DEVICE), torch.zeros(4), 2)
    with pytest.raises(ValueError, match=r"^counts: .* on cpu"):
        update_router_bias(torch.zeros(4, device=DEVICE), torch.zeros(4, dtype=torch.int64), 0.1)


@needs_real_gpu
def test_bad_routes_stop_the_device():
    """In a process of its own, since a device assert ends its CUDA context."""
    for route in ([0, 4], [-1, 2], [1, 1]):
        program = ("import torch; from megatron_m2.ops.router import sigmoid_router as r; "
                   f"r(torch.zeros(1, 4).cuda(), torch.zeros(4).cuda(), 2, routes=torch.tensor([{route}], dtype=torch.int32).cuda()); "
                   "torch.cuda.synchronize()")
        result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert result.returncode != 0
        assert "router: experts" in result.stderr


def test_opcheck():
    logits, bias = torch.randn(6, 20, device=DEVICE, requires_grad=True), torch.randn(20, device=DEVICE)
    multiplicity = torch.randint(0, 5, (6,), dtype=torch.int32, device=DEVICE)
    ops = torch.ops.m2_ops
    torch.library.opcheck(ops.router_topk, (logits, bias, 4, multiplicity))
    weights, experts, counts = ops.router_topk(logits.detach(), bias, 4)
    torch.library.opcheck(ops.router_replay, (logits, experts, multiplicity))
    torch.library.opcheck(ops.router_backward, (torch.randn(6, 4, device=DEVICE), logits.detach(), weights, experts))
    torch.library.opcheck(ops.router_bias_update, (bias, counts, 0.1))

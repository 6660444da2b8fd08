"""What Python puts together on the GPU: experts on torch's grouped product or in FP8, log-probs, widths that no kernel takes."""

from __future__ import annotations

import pytest
import torch

from megatron_m2.ops import experts, linear_cross_entropy
from megatron_m2.ops.fp8 import quantize_columns, quantize_rows
from megatron_m2.ops.grouped_gemm_fp8 import grouped_mm_fp8
from tests.conftest import relative_error
from tests.gpu import DEVICE, needs_gpu
from tests.ops import test_experts, test_fp8, test_linear_cross_entropy

pytestmark = needs_gpu


@pytest.mark.parametrize(("tokens", "hidden", "width"), [(300, 64, 48), (1, 16, 8), (50, 6, 10)])
def test_experts_equal_fp64(tokens, hidden, width):
    x, gate_up, down = (torch.randn(s).bfloat16() for s in ((tokens, hidden), (8, 2 * width, hidden), (8, hidden, width)))
    weights, routes = torch.rand(tokens, 2), torch.rand(tokens, 8).argsort(-1)[:, :2].int()
    expected = test_experts.run(experts.experts_reference, *(t.double() for t in (x, gate_up, down, weights)), routes)
    actual = test_experts.run(experts.swiglu_experts, *(t.to(DEVICE) for t in (x, gate_up, down, weights)), routes.to(DEVICE))
    for mine, reference in zip(actual, expected, strict=True):
        assert relative_error(mine.cpu(), reference) < test_experts.TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("vocab", [7, 5000])
def test_logprobs_and_entropy(vocab):
    h, w, targets, sources = test_linear_cross_entropy.inputs(0, 300, 64, vocab, 400, torch.float32)
    expected = linear_cross_entropy.linear_logprobs_and_entropy(h.double(), w.double(), targets, sources)
    actual = linear_cross_entropy.linear_logprobs_and_entropy(h.to(DEVICE), w.to(DEVICE), targets.to(DEVICE), sources.to(DEVICE))
    for mine, reference in zip(actual, expected, strict=True):
        assert relative_error(mine.cpu(), reference) < 1e-4


def test_fp8_equals_the_cpu():
    x, w = test_fp8.rows_of_all_sizes(0, 256, 200), torch.randn(2, 64, 200).bfloat16()
    ends = torch.tensor([128, 256], dtype=torch.int32)
    for op in (quantize_rows, quantize_columns):
        codes, scales = op(x.to(DEVICE))
        assert test_fp8.same(op(x), type(op(x))(codes.cpu(), scales.cpu()))
    assert relative_error(grouped_mm_fp8(x.to(DEVICE), w.to(DEVICE), ends.to(DEVICE)).cpu(), grouped_mm_fp8(x, w, ends)) < 2 * 2**-8

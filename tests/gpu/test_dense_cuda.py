"""norm_rope and permute on the GPU beside the CPU kernels, which the fp64 references hold to rounding."""

from __future__ import annotations

import pytest
import torch

from megatron_m2.ops.norm_rope import norm_rope, row_sum_squares
from megatron_m2.ops.permute import permute, permute_layout, unpermute
from tests.conftest import relative_error
from tests.gpu import DEVICE, needs_gpu
from tests.ops.test_norm_rope import inputs
from tests.ops.test_norm_rope import run as run_norm_rope
from tests.ops.test_permute import routes
from tests.ops.test_permute import run as run_permute

pytestmark = needs_gpu

# A flipped rounding of one intermediate: 2^-8 of it in bf16.
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 2 * 2**-8}


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("tokens", "heads", "head_dim", "half"),
                         [(0, 2, 64, 16), (1, 1, 33, 4), (5, 48, 128, 32), (1000, 3, 64, 32), (40_000, 1, 64, 0)])
def test_norm_rope_equals_the_cpu_kernel(dtype, tokens, heads, head_dim, half):
    case = inputs(0, tokens, heads, head_dim, half, dtype)
    expected = run_norm_rope(norm_rope, *case, heads)
    for mine, reference in zip(run_norm_rope(norm_rope, *(x.to(DEVICE) for x in case), heads), expected, strict=True):
        assert mine.shape == reference.shape
        if mine.numel() and reference.any():
            assert relative_error(mine.cpu(), reference) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_norm_rope_in_parts(dtype):
    x, weight, grad, cos, sin = (t.to(DEVICE) for t in inputs(1, 50, 4, 32, 8, dtype))
    whole = run_norm_rope(norm_rope, x, weight, grad, cos, sin, 4)
    leaves = [(x[:, p].clone().requires_grad_(), weight[p].clone().requires_grad_()) for p in (slice(0, 32), slice(32, 128))]
    squares = sum(row_sum_squares(a) for a, _ in leaves)
    out = torch.cat([norm_rope(a, w, 1e-6, a.shape[1] // 32, (cos, sin), squares, 128) for a, w in leaves], 1)
    out.backward(grad)
    parts = out.detach(), torch.cat([a.grad for a, _ in leaves], 1), torch.cat([w.grad for _, w in leaves])
    for mine, reference in zip(parts, whole, strict=True):
        assert relative_error(mine, reference) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("tokens", "experts", "top_k", "block", "width"),
                         [(0, 4, 2, 16, 8), (1, 1, 1, 1, 1), (77, 9, 3, 16, 70), (5000, 256, 8, 128, 64), (300, 5, 2, 1, 1024)])
def test_permute_equals_the_cpu_kernel(dtype, tokens, experts, top_k, block, width):
    chosen = routes(0, tokens, experts, top_k)
    layout, layout_gpu = permute_layout(chosen, experts, block), permute_layout(chosen.to(DEVICE), experts, block)
    assert all(torch.equal(a, b.cpu()) for a, b in zip(layout, layout_gpu, strict=True))
    x, rows, weights = torch.randn(tokens, width).to(dtype), torch.randn(len(layout.token), width).to(dtype), torch.rand(tokens, top_k)
    expected = run_permute(x, rows, layout, weights)
    for mine, reference in zip(run_permute(x.to(DEVICE), rows.to(DEVICE), layout_gpu, weights.to(DEVICE)), expected, strict=True):
        assert mine.shape == reference.shape
        if mine.numel():
            assert relative_error(mine.cpu(), reference) < TOLERANCE[dtype]


def test_rows_that_start_anywhere():
    """Off a 16-byte boundary rows move element by element."""
    layout = permute_layout(routes(0, 30, 4, 2).to(DEVICE), 4)
    x = torch.randn(30 * 64 + 1, device=DEVICE).bfloat16()[1:].view(30, 64)
    assert torch.equal(permute(x, layout), permute(x.clone(), layout))
    assert torch.equal(unpermute(permute(x, layout), layout, torch.full((30, 2), 0.5, device=DEVICE)), x)

"""FP8 on the GPU: the tests of the CPU kernels at the widths that the GPU takes, codes bit for bit, products within its sums' rounding."""

from __future__ import annotations

import pytest
import torch

from megatron_m2.ops.fp8 import (
    Quantized,
    dequantize_blocks,
    permute_quantize,
    quantize_columns,
    quantize_reference,
    quantize_rows,
    quantize_rows_columns,
    quantize_weights,
    requantize_columns,
    swiglu_backward_quantize,
    swiglu_backward_reference,
    swiglu_quantize,
)
from megatron_m2.ops.grouped_gemm import grouped_mm_reference
from megatron_m2.ops.grouped_gemm_fp8 import grouped_mm_fp8, grouped_wgrad_codes
from megatron_m2.ops.permute import permute, permute_layout
from tests.gpu import DEVICE, EMULATED, needs_gpu
from tests.ops.test_fp8 import check_fused_swiglu, check_products, codes_off_by_one, rows_of_all_sizes, same

pytestmark = needs_gpu

# Hopper's FP8 products align terms to the largest of 32 and keep 13 bits below it before they are added (arXiv:2412.19437, 3.5.2).
TERMS = 2e-6 if EMULATED else 2**-12


@pytest.mark.parametrize(("sizes", "a", "b"), [([1], 16, 16), ([9, 0, 1], 256, 384), ([2, 0, 3], 272, 144), ([0, 0, 1, 0], 128, 1040)],
                         ids=str)
def test_products_equal_those_of_the_values(sizes, a, b):
    check_products(sizes, a, b, 0, DEVICE, TERMS)


@pytest.mark.parametrize(("rows", "width"), [(0, 16), (1, 1), (130, 70), (300, 257), (256, 128)])
def test_codes_equal_torch_conversion(rows, width):
    x = rows_of_all_sizes(rows, rows, width)
    x[: rows // 2, : width // 2] = 0
    for op, block in ((quantize_rows, (1, 128)), (quantize_columns, (128, 1))):
        codes, scales = op(x.to(DEVICE))
        assert same(quantize_reference(x, block), type(op(x))(codes.cpu().contiguous(), scales.cpu()))
    if rows:
        codes, scales = quantize_weights(x[None].to(DEVICE))
        assert same(quantize_reference(x, (128, 128)), type(quantize_rows(x))(codes[0].cpu(), scales[0].cpu()))


def test_permute_and_swiglu_quantise_what_they_make():
    layout = permute_layout(torch.rand(50, 5).argsort(-1)[:, :2].int().to(DEVICE), 5, 128)
    x = rows_of_all_sizes(1, 50, 260).to(DEVICE)
    assert same(permute_quantize(x, layout), quantize_rows(permute(x, layout)))
    gate, up = (torch.randn(40, 150).bfloat16().to(DEVICE) for _ in range(2))
    act = (torch.nn.functional.silu(gate.float()) * up.float()).bfloat16()
    assert codes_off_by_one(swiglu_quantize(torch.cat([gate, up], 1)), quantize_rows(act)) < 0.02


def on_cpu(q: Quantized) -> Quantized:
    return Quantized(q.codes.cpu().contiguous(), q.scales.cpu())


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (130, 70), (300, 257), (256, 128), (384, 272)])
def test_both_ways_in_one_reading(rows, width):
    x = rows_of_all_sizes(rows, rows, width)
    by_rows, by_columns = (on_cpu(q) for q in quantize_rows_columns(x.to(DEVICE)))
    assert same(by_rows, quantize_reference(x, (1, 128)))
    assert same(by_columns, quantize_reference(x, (128, 1)))
    again = on_cpu(requantize_columns(Quantized(*(t.to(DEVICE) for t in by_rows))))
    assert same(again, quantize_reference(dequantize_blocks(*by_rows, (1, 128)).bfloat16(), (128, 1)))


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (130, 6), (256, 128), (70, 150)])
def test_swiglu_gradient_is_quantised_as_it_is_made(rows, width):
    d_act, hidden = torch.randn(rows, width).bfloat16(), (2 * torch.randn(rows, 2 * width)).bfloat16()
    exact = swiglu_backward_reference(d_act.double(), hidden.double()).bfloat16()
    for mine, block in zip(swiglu_backward_quantize(d_act.to(DEVICE), hidden.to(DEVICE)), ((1, 128), (128, 1)), strict=True):
        assert codes_off_by_one(on_cpu(mine), quantize_reference(exact, block)) < 0.02


@pytest.mark.parametrize(("sizes", "depth", "width"), [([1], 16, 128), ([2, 0, 1], 144, 256), ([0], 32, 128)], ids=str)
def test_swiglu_in_the_product_changes_no_number(sizes, depth, width):
    check_fused_swiglu(sizes, depth, width, DEVICE)


def test_gradients_are_those_of_the_bf16_product_to_fp8_rounding():
    ends = torch.tensor([128, 128, 384], dtype=torch.int32)
    x, w, grad = torch.randn(384, 256).bfloat16(), torch.randn(3, 144, 256).bfloat16(), torch.randn(384, 144).bfloat16()
    results = []
    for op, dtype, device in ((grouped_mm_fp8, torch.bfloat16, DEVICE), (grouped_mm_reference, torch.float64, "cpu")):
        leaves = [t.to(device, dtype, copy=True).requires_grad_() for t in (x, w)]
        out = op(*leaves, ends.to(device))
        out.backward(grad.to(device, dtype))
        results.append([out.detach().cpu(), *(t.grad.cpu() for t in leaves)])
    for mine, exact in zip(*results, strict=True):
        assert float((mine.double() - exact).pow(2).mean().sqrt() / exact.pow(2).mean().sqrt()) < 0.045
    assert not results[0][2][1].any()


def test_codes_in_any_layout():
    """Codes by columns lie column by column; where they do not, the product copies them."""
    ends = torch.tensor([128, 256], dtype=torch.int32, device=DEVICE)
    dy, x = (quantize_columns(rows_of_all_sizes(i, 256, 48).to(DEVICE)) for i in (0, 1))
    copied = [type(q)(q.codes.contiguous(), q.scales) for q in (dy, x)]
    assert torch.equal(grouped_wgrad_codes(dy, x, ends), grouped_wgrad_codes(*copied, ends))


def test_widths_of_the_kernel():
    q = quantize_rows(torch.randn(128, 24, device=DEVICE).bfloat16())
    w = quantize_weights(torch.randn(1, 16, 24, device=DEVICE).bfloat16())
    with pytest.raises(ValueError, match="x: width 24, need a multiple of 16 on a GPU"):
        torch.ops.m2_ops.grouped_mm_fp8(*q, *w, torch.tensor([128], dtype=torch.int32, device=DEVICE), True)

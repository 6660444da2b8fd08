"""Tree attention on the GPU beside the dense mask in fp64."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from megatron_m2.ops.tree_attention import tree_attention_reference, tree_attention_with_lse
from tests.gpu import DEVICE, EMULATED, needs_gpu
from tests.ops.test_tree_attention import gradient_magnitudes, inputs, random_tree, run, star

pytestmark = needs_gpu

FORESTS = {"one token": random_tree(0, 1, 0.0), "chain": random_tree(0, 700, 0.0), "star": star(300, 9, 77), "fan": star(1, 500, 1),
           "tree": random_tree(5, 1500, 0.01), "bushes": random_tree(6, 333, 0.5), "single tokens": torch.arange(1, 200, dtype=torch.int32)}


@pytest.mark.parametrize("name", list(FORESTS))
@pytest.mark.parametrize("heads", [(1, 1), (6, 1), (8, 2)], ids=str)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("start", [0.0, 0.4, 1.0])
def test_equals_fp64_reference(name, heads, dim, start):
    ends = FORESTS[name]
    query_start = int(start * (len(ends) - 1))
    case = inputs(0, len(ends) - query_start, len(ends), *heads, dim, torch.bfloat16)
    actual = run(tree_attention_with_lse, *(x.to(DEVICE) for x in case), ends.to(DEVICE), query_start)
    wide = [x.double() for x in case]
    expected, magnitudes = run(tree_attention_reference, *wide, ends, query_start), gradient_magnitudes(*wide, ends, query_start)
    for what, mine, reference, terms in zip(("out", "lse", "dq", "dk", "dv"), actual, expected, magnitudes, strict=True):
        # P, dS and each result are rounded by 2^-8, as in the CPU kernel
        tolerance = 4e-6 if what == "lse" else 2.2 * 2**-8
        assert float(((mine.cpu().double() - reference).abs() / (terms + 1e-6)).max()) <= tolerance, what


def test_repeats_bit_for_bit():
    ends = random_tree(9, 2000, 0.01).to(DEVICE)
    case = [x.to(DEVICE) for x in inputs(1, 2000, 2000, 8, 2, 128, torch.bfloat16)]
    first = run(tree_attention_with_lse, *case, ends)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(tree_attention_with_lse, *case, ends), strict=True))


def test_any_strides():
    ends = random_tree(2, 70, 0.1).to(DEVICE)
    q, k, v = (x.to(DEVICE) for x in inputs(0, 70, 70, 4, 2, 64, torch.bfloat16))
    expected = run(tree_attention_with_lse, q, k, v, ends)
    for other in ([x.mT.contiguous().mT for x in (q, k, v)], [torch.nn.functional.pad(x, (1, 0))[..., 1:] for x in (q, k, v)]):
        assert all(torch.equal(a, b) for a, b in zip(expected, run(tree_attention_with_lse, *other, ends), strict=True))


def test_head_dim_of_the_kernel():
    q, k, v = (x.to(DEVICE) for x in inputs(0, 8, 8, 2, 1, 96, torch.bfloat16))
    with pytest.raises(ValueError, match="head_dim 96, need 64 or 128"):
        torch.ops.m2_ops.tree_attention(q, k, v, torch.full((8,), 8, dtype=torch.int32, device=DEVICE), 0)


NO_FORESTS = {"ends before it begins": [4, 1, 4, 4], "ends beyond its parent": [4, 3, 4, 4], "ends beyond the tokens": [5, 2, 3, 4],
              "crosses another, tiles later": [*[200] * 100, *[150] * 50, *[200] * 49, 201],
              "crosses the end of a subtree far before": [300, 200, *range(3, 151), *[250] * 50, *[300] * 100]}


@pytest.mark.parametrize("name", list(NO_FORESTS))
def test_what_is_no_forest_stops_the_device(name):
    """On a GPU in a process of its own, since a device assert ends its CUDA context."""
    ends = NO_FORESTS[name]
    if EMULATED:
        x = torch.randn(len(ends), 1, 64).bfloat16()
        with pytest.raises(ValueError, match="subtree_end: no forest"):
            tree_attention_with_lse(x, x, x, torch.tensor(ends, dtype=torch.int32))
        return
    program = ("import torch; from megatron_m2.ops.tree_attention import tree_attention as a; "
               f"x = torch.randn({len(ends)}, 1, 64).bfloat16().cuda(); "
               f"a(x, x, x, torch.tensor({ends}, dtype=torch.int32).cuda()); torch.cuda.synchronize()")
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode != 0
    assert "subtree_end: no forest" in result.stderr


@pytest.mark.parametrize("seed", range(4))
def test_forests_with_siblings_far_apart_are_none_of_those(seed):
    for forks in (0.003, 0.03, 0.3):
        ends = random_tree(seed, 900, forks).to(DEVICE)
        x = torch.randn(1, 1, 64, device=DEVICE).bfloat16()
        keys = torch.randn(900, 1, 64, device=DEVICE).bfloat16()
        assert tree_attention_with_lse(x, keys, keys, ends, 899).out.isfinite().all()

"""The CUDA kernels, run thread by thread on the CPU (``cuda_on_cpu/``), pass the tests of their operations."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import needs_kernels

ROOT = Path(__file__).parents[2]

# Not: what the CPU kernels say of a bad index (a device assert on a GPU), long forests, the slow rest of the attention's shapes.
SELECTIONS = {
    "router": (["tests/ops/test_router.py"], "not bad_routes and not large"),
    "permute": (["tests/ops/test_permute.py"], "not check_for_themselves and not large"),
    "expert_parallel": (["tests/ops/test_expert_parallel.py", "tests/gpu/test_expert_parallel_cuda.py"], "not check_for_themselves"),
    "norm_rope": (["tests/ops/test_norm_rope.py"], "not threads"),
    "linear_cross_entropy": (["tests/ops/test_linear_cross_entropy.py"], "dtype2 or backwards or certain or opcheck"),
    "fp8": (["tests/gpu/test_fp8_cuda.py"], "test"),
    "tree_attention": (["tests/gpu/test_tree_attention_cuda.py"], "(bushes and 6) or token or strides or head_dim or forest"),
}


@pytest.fixture(scope="session")
def library() -> Path:
    """Kept between runs: ninja rebuilds what has changed."""
    folder = ROOT / "build" / f"cuda-on-cpu-torch-{torch.__version__}"
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    result = subprocess.run([sys.executable, "-m", "tests.csrc.cuda_on_cpu", str(folder)], cwd=ROOT, capture_output=True, text=True,
                            env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


@needs_kernels
@pytest.mark.parametrize("order", ["ascending", "descending"])
@pytest.mark.parametrize("name", list(SELECTIONS))
def test_kernels_pass_their_tests(name, order, library):
    files, selection = SELECTIONS[name]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "tests.csrc.cuda_on_cpu", "-p", "no:cacheprovider", *files, "-k", selection],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "M2_CUDA_ON_CPU": str(library), "M2_CUDA_ORDER": order})
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert " passed" in result.stdout

"""The build itself: every .cu compiles for Hopper without a GPU, and a machine without a compiler still installs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import COMMON_NVCC_FLAGS, CUDA_HOME, include_paths

ROOT = Path(__file__).parents[2]
NVCC = shutil.which("nvcc") or (CUDA_HOME and shutil.which("nvcc", path=f"{CUDA_HOME}/bin"))


@pytest.mark.skipif(not NVCC, reason="no nvcc on this machine")
@pytest.mark.parametrize("source", sorted((ROOT / "csrc").rglob("*.cu")), ids=lambda path: path.name)
def test_cuda_source_compiles_for_hopper(source, tmp_path):
    """Against this torch's headers, CPU-only ones too: they lack only a file that CMake generates."""
    command = [NVCC, "-std=c++20", *COMMON_NVCC_FLAGS, "-gencode=arch=compute_90a,code=sm_90a",
               "-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE",
               *(f"-I{path}" for path in include_paths()), "-c", str(source), "-o", str(tmp_path / "out.o")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def build(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)


def test_missing_compiler_is_one_line_and_no_failure(tmp_path):
    result = build(tmp_path, CXX="/nonexistent/c++", M2_FORCE_CUDA="0")
    assert result.returncode == 0, result.stderr
    said = [line for line in result.stderr.splitlines() if line.startswith("megatron_m2:") and "CPU kernels only" not in line]
    assert said == ["megatron_m2: no C++ compiler (/nonexistent/c++ not found): the reference ops will run"]
    assert not list(tmp_path.rglob("*.so"))


# setup.py as it runs where torch has CUDA: what it asks torch for is set before.
AS_WITH_CUDA = """
import runpy, sys, torch
from torch.utils import cpp_extension
torch.version.cuda, cpp_extension.CUDA_HOME = sys.argv[1], sys.argv[2] or None
sys.argv = ["setup.py", "-q", "build_ext", "--build-lib", sys.argv[3], "--build-temp", sys.argv[3]]
runpy.run_path("setup.py", run_name="__main__")
"""


@pytest.mark.parametrize(("says", "message"), [
    ("echo 'Cuda compilation tools, release 12.4, V12.4.1'",
     "torch was built with CUDA 13.0, but {home}/bin/nvcc is 12.4: the major versions must be equal"),
    ("echo release 13.0", "{home} has bin/nvcc but no lib64/libcudart.so: set CUDA_HOME to the toolkit itself"),
    ("echo Oracle", "{home}/bin/nvcc --version names no release"),
    (None, "torch has CUDA 13.0, but {home}/bin/nvcc does not run: No such file or directory"),
    ("", "torch has CUDA 13.0, but no toolkit was found (set CUDA_HOME)"),
])
def test_toolkit_that_does_not_fit_is_one_line(says, message, tmp_path):
    if says:
        toolkit = tmp_path / "bin" / "nvcc"
        toolkit.parent.mkdir()
        toolkit.write_text(f"#!/bin/sh\n{says}\n")
        toolkit.chmod(0o755)
    home = "" if says == "" else str(tmp_path)
    result = subprocess.run([sys.executable, "-c", AS_WITH_CUDA, "13.0", home, str(tmp_path / "out")], cwd=ROOT, capture_output=True,
                            text=True, env={**os.environ, "M2_FORCE_CUDA": "1"})
    assert result.returncode == 1
    assert result.stderr.splitlines() == ["megatron_m2: M2_FORCE_CUDA=1, but " + message.format(home=home)]


def test_cuda_is_not_forced_on_a_torch_without_it(tmp_path):
    if torch.version.cuda is not None:
        pytest.skip("this torch has CUDA")
    result = build(tmp_path, M2_FORCE_CUDA="1")
    assert result.returncode == 1
    assert result.stderr.splitlines() == [f"megatron_m2: M2_FORCE_CUDA=1, but torch {torch.__version__} has no CUDA"]

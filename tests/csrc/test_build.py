"""The build itself: every .cu compiles for Hopper without a GPU, and a machine without a compiler still installs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.cpp_extension import CUDA_HOME, include_paths

ROOT = Path(__file__).parents[2]
NVCC = shutil.which("nvcc") or (CUDA_HOME and shutil.which("nvcc", path=f"{CUDA_HOME}/bin"))


@pytest.mark.skipif(not NVCC, reason="no nvcc on this machine")
@pytest.mark.parametrize("source", sorted((ROOT / "csrc").rglob("*.cu")), ids=lambda path: path.name)
def test_cuda_source_compiles_for_hopper(source, tmp_path):
    """Against this torch's headers, CPU-only ones too: they lack only a file that CMake generates."""
    command = [NVCC, "-std=c++20", "--expt-relaxed-constexpr", "-gencode=arch=compute_90a,code=sm_90a",
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


def test_cuda_that_cannot_be_built_is_one_line(tmp_path):
    """A toolkit of another major version when torch has CUDA; torch without CUDA otherwise."""
    toolkit = tmp_path / "bin" / "nvcc"
    toolkit.parent.mkdir()
    toolkit.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 3.2, V3.2.1'\n")
    toolkit.chmod(0o755)
    result = build(tmp_path, CUDA_HOME=str(tmp_path), M2_FORCE_CUDA="1")
    assert result.returncode == 1
    assert [line.startswith("megatron_m2: M2_FORCE_CUDA=1, but torch") for line in result.stderr.splitlines()[-1:]] == [True], result.stderr

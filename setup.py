"""Builds the extension ``megatron_m2._C`` from ``csrc/``: the CPU kernels always, the CUDA kernels when torch and a toolkit have CUDA.

Environment:
    CXX: the C++ compiler (default c++). Without one the package installs without the extension and the reference ops run.
    M2_MARCH: ``-march`` of the CPU kernels, default ``native``; name an older one for a build that runs elsewhere.
    M2_FORCE_CUDA=1: fail when the CUDA kernels cannot be built, instead of building the CPU part alone.
    TORCH_CUDA_ARCH_LIST: GPU architectures, default 9.0a.
    MAX_JOBS: compilers at one time (torch's own variable).
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from setuptools import setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension, get_cxx_compiler

ROOT = Path(__file__).parent


def say(line: str) -> None:
    print(f"megatron_m2: {line}", file=sys.stderr)


def cuda_obstacle() -> str | None:
    """Why the CUDA kernels cannot be built here, None when they can. Whether a GPU is present does not matter."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    if CUDA_HOME is None:
        return f"torch has CUDA {torch.version.cuda}, but no toolkit was found (set CUDA_HOME)"
    nvcc = Path(CUDA_HOME, "bin", "nvcc")
    try:
        report = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    except OSError as error:
        return f"torch has CUDA {torch.version.cuda}, but {nvcc} does not run: {error.strerror}"
    toolkit = re.search(r"release (\d+)\.(\d+)", report)
    if toolkit is None:
        return f"{nvcc} --version names no release"
    if toolkit[1] != torch.version.cuda.split(".")[0]:
        return f"torch was built with CUDA {torch.version.cuda}, but {nvcc} is {toolkit[1]}.{toolkit[2]}: the major versions must be equal"
    if not any(True for name in ("lib64", "lib") for _ in Path(CUDA_HOME, name).glob("libcudart.so*")):
        return f"{CUDA_HOME} has bin/nvcc but no lib64/libcudart.so: set CUDA_HOME to the toolkit itself"
    return None


def extension() -> CppExtension:
    obstacle = cuda_obstacle()
    if obstacle and os.environ.get("M2_FORCE_CUDA") == "1":
        raise SystemExit(f"megatron_m2: M2_FORCE_CUDA=1, but {obstacle}")
    if obstacle and torch.version.cuda:
        say(f"building the CPU kernels only: {obstacle}")
    suffixes = (".cpp",) if obstacle else (".cpp", ".cu")
    sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.suffix in suffixes)
    # -fopenmp: at::parallel_for is a header template and runs serially without it.
    # -Wno-...: pragmas of other compilers in torch's headers; GCC 12 suspects its own AVX-512 headers (GCC bug 105593).
    cxx = ["-O3", "-std=c++20", "-fopenmp", "-Wall", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]
    if platform.machine() in ("x86_64", "AMD64"):
        cxx.append(f"-march={os.environ.get('M2_MARCH', 'native')}")
    nvcc = ["-O3", "-std=c++20", "-lineinfo"]
    kind = CppExtension if obstacle else CUDAExtension
    return kind(
        "megatron_m2._C", sources, extra_compile_args={"cxx": cxx, "nvcc": nvcc}, extra_link_args=["-fopenmp"],
        define_macros=[] if obstacle else [("M2_WITH_CUDA", None)],
    )


class Build(BuildExtension):
    """Keeps object files between builds, and installs without the extension when there is no compiler."""

    def initialize_options(self) -> None:
        super().initialize_options()
        self.force = True  # ninja knows what changed, headers and flags included; setuptools compares a few dates

    def finalize_options(self) -> None:
        if self.build_temp is None:  # an editable install would use a new temporary folder each time
            self.build_temp = str(ROOT / "build" / f"torch-{torch.__version__}-python-{platform.python_version()}")
        super().finalize_options()
        self.force = True

    def run(self) -> None:
        compiler = shlex.split(get_cxx_compiler())[0]
        if shutil.which(compiler) is None:
            say(f"no C++ compiler ({compiler} not found): the reference ops will run")
            self.extensions = []
            return
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "9.0a")
        super().run()


setup(ext_modules=[extension()], cmdclass={"build_ext": Build})

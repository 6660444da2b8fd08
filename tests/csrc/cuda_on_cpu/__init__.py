"""Runs the CUDA kernels of ``csrc/`` on the CPU, thread by thread, so that their logic is tested where no GPU is.

``python -m tests.csrc.cuda_on_cpu FOLDER`` builds them into ``FOLDER/_C.so`` with a C++ compiler and ``include/``; as a pytest plugin
(``-p tests.csrc.cuda_on_cpu``, with ``M2_CUDA_ON_CPU=FOLDER``) this module puts that library in the place of ``megatron_m2._C``.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
INCLUDE = Path(__file__).parent / "include"


def _balanced(text: str, start: int, opening: str, closing: str) -> int:
    """One past the bracket that closes the one at ``start``."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == opening) - (text[i] == closing)
        if depth == 0:
            return i + 1
    raise ValueError(f"no {closing} for the {opening} at {start}")


def translated(source: str) -> str:
    """C++ of a ``.cu``: launches become calls, dynamic shared memory a pointer, the CUDA dispatch key the CPU's."""
    source = source.replace("TORCH_LIBRARY_IMPL(m2_ops, CUDA, m)", "TORCH_LIBRARY_IMPL(m2_ops, CPU, m)")
    source = source.replace('"../common/hopper.cuh"', '"hopper_on_cpu.h"').replace("at::mm(", "::cuda_on_cpu::mm(")
    source = re.sub(r"extern __shared__ (?:__align__\(\d+\) )?char (\w+)\[\];", r"char* \1 = ::cuda_on_cpu::shared_memory;", source)
    while (at := source.find("<<<")) >= 0:
        closing = source.index(">>>", at)
        kernel = re.search(r"(\w+(?:<[^;{}()]*>)?)\s*$", source[:at])
        assert kernel is not None, source[at - 100 : at]
        opening = source.index("(", closing)
        end = _balanced(source, opening, "(", ")")
        arguments = source[opening + 1 : end - 1].strip()
        call = f"[&](auto... arguments) {{ {kernel[1]}(arguments...); }}"
        launch = f"::cuda_on_cpu::launch({source[at + 3 : closing]}, {call}{', ' if arguments else ''}{arguments})"
        source = source[: kernel.start()] + launch + source[end:]
    return source


def build(folder: Path) -> None:
    """The schemas, every CUDA kernel, and the CPU kernels of operations that have no CUDA yet, into ``folder/_C.so``."""
    from torch.utils import cpp_extension

    folder.mkdir(parents=True, exist_ok=True)
    sources = [ROOT / "csrc/m2_ops.cpp"]
    for kernel in sorted((ROOT / "csrc").rglob("*.cu")):
        out = folder / f"{kernel.stem}.cpp"
        text = f'#include "cuda_on_cpu.h"\n#line 1 "{kernel}"\n' + translated(kernel.read_text())
        if not out.exists() or out.read_text() != text:
            out.write_text(text)
        sources.append(out)
    covered = {path.stem.removesuffix("_cuda") for path in sources}
    for kernel in sorted((ROOT / "csrc").rglob("*.cpp")):
        operation = kernel.stem.removesuffix("_cpu").removesuffix("_backward")
        if kernel not in sources and operation not in covered:
            sources.append(kernel)
    folders = {path.parent for path in (ROOT / "csrc").rglob("*.cu")}
    cpp_extension.load(
        "_C", [str(path) for path in sources], build_directory=str(folder), is_python_module=False,
        extra_include_paths=[str(INCLUDE), *map(str, sorted(folders)), str(ROOT / "csrc/common")],
        extra_cflags=["-std=c++20", "-O2", "-march=native", "-fopenmp", "-w"], extra_ldflags=["-fopenmp"])


def _install(library: Path) -> None:
    import torch  # noqa: F401  # the library needs its libraries

    spec = importlib.util.spec_from_file_location("megatron_m2._C", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["megatron_m2._C"] = module
    spec.loader.exec_module(module)


if "M2_CUDA_ON_CPU" in os.environ:
    _install(Path(os.environ["M2_CUDA_ON_CPU"]) / "_C.so")

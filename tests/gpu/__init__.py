"""Tests of the CUDA kernels: on a GPU, or on the CPU thread by thread (``tests/csrc/cuda_on_cpu``), where ``DEVICE`` is the CPU."""

from __future__ import annotations

import os

import pytest
import torch

EMULATED = "M2_CUDA_ON_CPU" in os.environ
if EMULATED:  # in processes that pytest did not start, too
    import tests.csrc.cuda_on_cpu  # noqa: F401

from megatron_m2.ops import _extension  # noqa: E402  # after what takes the place of its library

DEVICE = "cpu" if EMULATED else "cuda"

needs_gpu = [] if EMULATED else [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU on this machine"),
    pytest.mark.skipif(not _extension.available("cuda"), reason="megatron_m2._C is built without CUDA"),
]
needs_real_gpu = pytest.mark.skipif(EMULATED, reason="about the GPU itself")

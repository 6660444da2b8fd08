"""Loads the compiled extension ``megatron_m2._C`` once and says, once, where the plain-torch reference ops run in its place."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from types import ModuleType

import torch

_BUILD = "pip install --no-build-isolation -e ."
_log = logging.getLogger(__name__)


def _load() -> frozenset[str]:
    """Device types that have kernels; on "meta" they have shapes."""
    if importlib.util.find_spec("megatron_m2._C") is None:
        _log.warning("megatron_m2._C is not built: the slower reference ops run. With a C++ compiler, build it by: %s", _BUILD)
        return frozenset()
    try:
        extension = importlib.import_module("megatron_m2._C")
    except ImportError as error:  # most often a torch other than the one it was built with
        raise ImportError(f"megatron_m2._C does not load with torch {torch.__version__}; rebuild it by: {_BUILD}") from error
    if extension.with_cuda:
        return frozenset({"cpu", "cuda", "meta"})
    if torch.version.cuda is not None:
        _log.warning("megatron_m2._C is built without CUDA: on a GPU the slower reference ops run. With nvcc, build it by: %s", _BUILD)
    return frozenset({"cpu", "meta"})


_DEVICES = _load()


def available(device_type: str = "cpu") -> bool:
    """Whether ``torch.ops.m2_ops`` has kernels for ``device_type`` (``tensor.device.type``)."""
    return device_type in _DEVICES


def module() -> ModuleType:
    """The extension itself, for what takes no tensors; only where :func:`available`."""
    return importlib.import_module("megatron_m2._C")

"""megatron_m2: train MiniMax-M2-class models, from the first pre-training token to agentic RL.

The stable API: :func:`load`, :func:`save_hf`, :func:`logits`, :func:`generate`, :class:`TokenForest`; ``model(forest)`` is
documented at :meth:`megatron_m2.model.m2.M2Model.forward`. Names are imported when first used, so that a piece of the package (the
ops on a GPU machine, say) needs only what it imports itself.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_m2.api import load, save_hf
    from megatron_m2.forest import TokenForest
    from megatron_m2.model.config import ModelConfig
    from megatron_m2.model.generate import generate, logits

__version__ = "0.1.0"
__all__ = ["ModelConfig", "TokenForest", "generate", "load", "logits", "save_hf"]

_HOME = {"load": "megatron_m2.api", "save_hf": "megatron_m2.api", "TokenForest": "megatron_m2.forest",
         "ModelConfig": "megatron_m2.model.config", "generate": "megatron_m2.model.generate", "logits": "megatron_m2.model.generate"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'megatron_m2' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)

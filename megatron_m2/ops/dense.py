"""The dense projections' products: torch's in the weights' dtype, or TransformerEngine's in FP8 where that is asked for and can be had."""

from __future__ import annotations

import importlib
import logging
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_m2.ops.weight_grad import Linear

_log = logging.getLogger(__name__)

_ROWS = 16  # what its FP8 products need the number of rows to be a multiple of


@lru_cache(maxsize=1)
def transformer_engine() -> Any:
    """The module ``transformer_engine.pytorch``, or None where there is none or no GPU; says once which product runs."""
    if torch.cuda.is_available():
        try:
            found = importlib.import_module("transformer_engine.pytorch")
        except ImportError as error:
            _log.info("dense projections: torch (FP8 was asked for, but transformer_engine.pytorch is not importable: %s)", error)
            return None
        _log.info("dense projections: TransformerEngine %s, blockwise FP8", importlib.import_module("transformer_engine").__version__)
        return found
    _log.info("dense projections: torch (FP8 was asked for, but TransformerEngine needs a GPU)")
    return None


class TELinear(Linear):
    """A bias-free map whose products TransformerEngine computes in blockwise FP8 (e4m3, 1x128 by 128x128, as in DeepSeek-V3).

    The weight stays this module's own, so that placement, optimizer and checkpoints see no difference.
    """

    _product: tuple[Any, Any, Any]  # the engine, its linear map, its FP8 recipe

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype, engine: Any) -> None:
        super().__init__(in_features, out_features, dtype)
        product = engine.Linear(in_features, out_features, bias=False, params_dtype=dtype, device=self.weight.device)
        product.weight = self.weight
        recipe = importlib.import_module("transformer_engine.common.recipe").Float8BlockScaling()
        # not registered as a part of this module: its state would join the checkpoints
        object.__setattr__(self, "_product", (engine, product, recipe))

    def forward(self, input: Tensor) -> Tensor:
        engine, product, recipe = self._product
        rows = len(input)
        with engine.fp8_autocast(enabled=True, fp8_recipe=recipe):
            out: Tensor = product(F.pad(input, (0, 0, 0, -rows % _ROWS)))
        return out[:rows]


def dense_linear(in_features: int, out_features: int, dtype: torch.dtype, fp8: bool) -> Linear:
    """A bias-free map; with ``fp8`` through TransformerEngine where it runs here."""
    engine = transformer_engine() if fp8 and dtype == torch.bfloat16 else None
    return Linear(in_features, out_features, dtype) if engine is None else TELinear(in_features, out_features, dtype, engine)

"""``config.json`` of a MiniMax-M2 checkpoint, both ways: what transformers, vLLM and SGLang each read in it."""

from __future__ import annotations

import math
from typing import Any

import torch

from megatron_m2.model.config import ModelConfig
from megatron_m2.ops.fp8 import BLOCK

# ours -> theirs; every one of them is required on import
_SAME = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
         "max_position_embeddings", "intermediate_size", "rms_norm_eps")
_RENAMED = {"num_experts": "num_local_experts", "top_k": "num_experts_per_tok"}

# What this model computes. A checkpoint that says otherwise is another model; one that is silent means this.
_FIXED: dict[str, Any] = {
    "hidden_act": "silu", "scoring_func": "sigmoid", "use_routing_bias": True, "use_qk_norm": True, "qk_norm_type": "per_layer",
    "shared_intermediate_size": 0, "tie_word_embeddings": False, "mtp_transformer_layers": 1,
}
# The same for what M2 never has; not worth a line in an export.
_ABSENT: dict[str, tuple[Any, ...]] = {
    "rope_scaling": (None, {}), "sliding_window": (None,), "attention_dropout": (0,), "attention_bias": (False,),
    "routed_scaling_factor": (1,), "router_jitter_noise": (0,),
}


def config_from_hf(values: dict[str, Any]) -> ModelConfig:
    """Our config from the object in ``config.json``.

    ``router_aux_loss_coef``, ``fp32_head``, ``fp8_experts`` and ``fp8_dense`` are choices of a run, not of the weights: they keep their
    defaults.

    Raises:
        ValueError: naming the field: missing, of another model, or something M2 does not have.
    """
    if values.get("model_type") != "minimax_m2":
        raise ValueError(f"model_type = {values.get('model_type')!r}: only 'minimax_m2' can be read")
    for field, allowed in {**{k: (v,) for k, v in _FIXED.items()}, **_ABSENT}.items():
        if field in values and values[field] not in allowed:
            raise ValueError(f"{field} = {values[field]!r}: MiniMax-M2 has {allowed[0]!r}")
    if any(kind != 1 for kind in values.get("attn_type_list") or []):
        raise ValueError(f"attn_type_list = {values['attn_type_list']!r}: only full attention (all 1) is supported")
    names = {**{name: name for name in _SAME}, **_RENAMED}
    ours = {name: _number(values, theirs, float if name == "rms_norm_eps" else int) for name, theirs in names.items()}
    theta, rotary_dim = _rope(values, int(ours["head_dim"]))
    ours |= {"rope_theta": theta, "rotary_dim": rotary_dim}
    if "initializer_range" in values:
        ours["initializer_range"] = _number(values, "initializer_range", float)
    if values.get("use_mtp", "num_mtp_modules" in values):
        ours["num_mtp_modules"] = _number(values, "num_mtp_modules", int)
    return ModelConfig(**ours)


def _number(values: dict[str, Any], field: str, kind: type[int] | type[float]) -> Any:
    value = values.get(field)
    if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
        raise ValueError(f"{field} = {value!r}: " + ("missing" if field not in values else f"must be of type {kind.__name__}"))
    return kind(value)


def _rope(values: dict[str, Any], head_dim: int) -> tuple[float, int]:
    """(theta, rotary_dim) from the released form (``rope_theta``, ``rotary_dim``), transformers 5's (``rope_parameters``), or both."""
    rope = values.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"rope_parameters.rope_type = {rope['rope_type']!r}: M2 has 'default', scaled positions are not supported")
    theta = _number(rope, "rope_theta", float) if "rope_theta" in rope else _number(values, "rope_theta", float)
    if "rope_theta" in values and _number(values, "rope_theta", float) != theta:
        raise ValueError(f"rope_theta = {values['rope_theta']!r}: rope_parameters.rope_theta says {theta!r}")
    factor = rope.get("partial_rotary_factor", values.get("partial_rotary_factor"))
    if "rotary_dim" in values:
        rotary_dim = _number(values, "rotary_dim", int)
        if factor is not None and int(head_dim * factor) != rotary_dim:
            raise ValueError(f"rotary_dim = {rotary_dim}: partial_rotary_factor says {int(head_dim * factor)}")
        return theta, rotary_dim
    if factor is None and not rope:
        raise ValueError("rotary_dim = None: missing, and so is rope_parameters")
    return theta, head_dim if factor is None else int(head_dim * factor)  # transformers' own reading of rope_parameters


def config_to_hf(config: ModelConfig, dtype: torch.dtype = torch.bfloat16, fp8: bool = False, bos_token_id: int | None = None,
                 eos_token_id: int | None = None) -> dict[str, Any]:
    """The object for ``config.json``, complete for transformers, vLLM and SGLang.

    vLLM and SGLang read ``rotary_dim``, transformers ``rope_parameters``; without the latter's ``partial_rotary_factor`` some versions
    (5.12 to 5.16) rotate the whole head in silence.

    Args:
        dtype: of the weights (before FP8).
        fp8: add the ``quantization_config`` of the block-FP8 layout.
    """
    name = str(dtype).removeprefix("torch.")
    values: dict[str, Any] = {"architectures": ["MiniMaxM2ForCausalLM"], "model_type": "minimax_m2"}
    values |= {field: getattr(config, field) for field in _SAME}
    values |= {theirs: getattr(config, ours) for ours, theirs in _RENAMED.items()}
    values |= _FIXED
    values |= {
        "rotary_dim": config.rotary_dim, "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta,
                            "partial_rotary_factor": _rotary_factor(config.rotary_dim, config.head_dim)},
        "attn_type_list": [1] * config.num_hidden_layers,
        "use_mtp": config.num_mtp_modules > 0, "num_mtp_modules": config.num_mtp_modules,
        "initializer_range": config.initializer_range, "router_aux_loss_coef": config.router_aux_loss_coef,
        "bos_token_id": bos_token_id, "eos_token_id": eos_token_id, "use_cache": True, "dtype": name, "torch_dtype": name,
    }
    if fp8:
        values["quantization_config"] = {
            "quant_method": "fp8", "fmt": "float8_e4m3fn", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK),
            "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"] + ["eh_proj"] * (config.num_mtp_modules > 0)}
    return values


def _rotary_factor(rotary_dim: int, head_dim: int) -> float:
    """``rotary_dim / head_dim``, a rounding higher where ``int(head_dim * factor)``, which is what readers compute, would fall short."""
    factor = rotary_dim / head_dim
    return factor if int(head_dim * factor) == rotary_dim else math.nextafter(factor, 1.0)


def block_size(values: dict[str, Any]) -> tuple[int, int]:
    """The FP8 block of a ``config.json``; the released 128x128 where it names none.

    Raises:
        ValueError: another kind of quantisation.
    """
    quantization = values.get("quantization_config")
    if quantization is None:
        return BLOCK
    if quantization.get("quant_method") != "fp8":
        raise ValueError(f"quantization_config.quant_method = {quantization.get('quant_method')!r}: only 'fp8' can be read")
    block = quantization.get("weight_block_size")
    if not (isinstance(block, list) and len(block) == 2 and all(isinstance(b, int) and b > 0 for b in block)):
        raise ValueError(f"quantization_config.weight_block_size = {block!r}: need two block sizes, such as [128, 128]")
    return block[0], block[1]

"""Hugging Face checkpoints of MiniMax-M2, both ways, tensor by tensor: bf16, fp32 and the released block-FP8 layout.

A multi-token-prediction module k is kept as decoder layer L + k with four tensors more (``enorm``, ``hnorm``, ``eh_proj``,
``final_layernorm``): vLLM and SGLang skip those keys by name. No released checkpoint holds any, whatever its ``num_mtp_modules`` says.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_m2.model.config import ModelConfig
from megatron_m2.model.hf_config import block_size, config_from_hf, config_to_hf
from megatron_m2.model.m2 import M2Model, build_model
from megatron_m2.model.shards import ShardReader, complete_folder, read_json, write_json, write_shards
from megatron_m2.ops.fp8 import E4M3, dequantize_blocks, quantize_blocks, scale_shape

__all__ = ["config_from_hf", "config_to_hf", "convert_shards", "load_hf", "save_hf", "write_hf"]

_log = logging.getLogger(__name__)
_SCALE = "_scale_inv"  # what FP8 weights' factors add to the name
_FP8_KEY = re.compile(r"(self_attn\.[qkvo]_proj|experts\.\d+\.w[123])\.weight$")
_FP32_KEY = re.compile(r"block_sparse_moe\.(gate\.weight|e_score_correction_bias)$")
_MAX_SHARD_BYTES = 4 << 30
_COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
               "tokenizer.model", "chat_template.jinja", "generation_config.json")


# ---- names ------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slot:
    """Where one tensor of a Hugging Face checkpoint lives in ``M2Model.state_dict()``.

    Attributes:
        key: its name there.
        name: ours.
        shape: of the tensor, the same on both sides.
        index: which part of ours it is; ours stacks the experts.
    """

    key: str
    name: str
    shape: tuple[int, ...]
    index: tuple[int | slice, ...] = ()

    def view(self, state: Mapping[str, Tensor]) -> Tensor:
        """The part of the state dict, sharing its memory."""
        return state[self.name].detach()[self.index]


def layout(config: ModelConfig) -> list[Slot]:
    """Every tensor of a checkpoint of this shape, in the order in which it is written; nothing is allocated."""
    state = build_model(config, device="meta").state_dict()
    return [slot for name, tensor in state.items() for slot in _slots(name, tuple(tensor.shape), config.num_hidden_layers)]


def _slots(name: str, shape: tuple[int, ...], num_layers: int) -> list[Slot]:
    match = re.fullmatch(r"(layers|mtp)\.(\d+)\.(?:layer\.)?(.+)", name)
    if match is None:
        return [Slot(name if name == "lm_head.weight" else f"model.{name}", name, shape)]
    kind, number, rest = match.groups()
    prefix = f"model.layers.{int(number) + (num_layers if kind == 'mtp' else 0)}."
    moe = prefix + "block_sparse_moe."
    if rest == "moe.gate_up_proj":
        experts, double_width, hidden = shape
        width = double_width // 2
        return [Slot(f"{moe}experts.{e}.{w}.weight", name, (width, hidden), (e, rows)) for e in range(experts)
                for w, rows in (("w1", slice(0, width)), ("w3", slice(width, double_width)))]
    if rest == "moe.down_proj":
        return [Slot(f"{moe}experts.{e}.w2.weight", name, shape[1:], (e,)) for e in range(shape[0])]
    router = {"moe.router.weight": "gate.weight", "moe.router.bias": "e_score_correction_bias"}
    return [Slot(moe + router[rest] if rest in router else prefix + rest, name, shape)]


# ---- reading ----------------------------------------------------------------------------------------------------------------------


class _Checkpoint:
    """A folder whose ``config.json`` and tensor headers have been checked against each other; weights come out dequantised.

    Raises:
        ValueError: on construction, naming the file, and the field or tensor.
    """

    def __init__(self, path: str | Path) -> None:
        folder = Path(path)
        self.hf_config = read_json(folder / "config.json")
        try:
            config = config_from_hf(self.hf_config)
            self._block = block_size(self.hf_config)
        except ValueError as error:
            raise ValueError(f"{folder / 'config.json'}: {error}") from error
        self._reader = ShardReader(folder)
        self.config = self._without_absent_mtp(config)
        slots = {slot.key: slot for slot in layout(self.config)}
        self._check(slots)
        self.slots = [slots[key] for key in self._reader.file_of if key in slots]

    def _without_absent_mtp(self, config: ModelConfig) -> ModelConfig:
        first = f"model.layers.{config.num_hidden_layers}."
        if config.num_mtp_modules == 0 or any(key.startswith(first) for key in self._reader.file_of):
            return config
        _log.info("%s: config.json promises %d MTP modules, the checkpoint holds none: loading without",
                  self._reader.folder, config.num_mtp_modules)
        return replace(config, num_mtp_modules=0)

    def _check(self, slots: dict[str, Slot]) -> None:
        reader = self._reader
        quantised = {key for key, dtype in reader.dtype_of.items() if dtype == E4M3}
        for key in quantised:
            if not _FP8_KEY.search(key):
                raise ValueError(f"{reader.folder / reader.file_of[key]}: {key} is FP8; only attention projections and experts can be")
        want = {key: slot.shape for key, slot in slots.items()}
        want |= {key + _SCALE: scale_shape(slots[key].shape, self._block) for key in want if key in quantised}
        missing = [key for key in want if key not in reader.file_of]
        if missing:
            raise ValueError(f"{reader.folder}: tensor {missing[0]} is missing ({len(missing)} are, of {len(want)})")
        for key, shape in reader.shape_of.items():
            file = reader.folder / reader.file_of[key]
            if key not in want:
                raise ValueError(f"{file}: unexpected tensor {key}; config.json asks for {self.config.num_hidden_layers} layers, "
                                 f"{self.config.num_experts} experts and {self.config.num_mtp_modules} MTP modules")
            if shape != want[key]:
                raise ValueError(f"{file}: {key} is {list(shape)}, config.json asks for {list(want[key])}")

    @property
    def dtype(self) -> torch.dtype:
        """Of what is not quantised: the head's."""
        return self._reader.dtype_of["lm_head.weight"]

    def weight(self, key: str) -> Tensor:
        """A tensor as stored, or fp32 if stored in FP8."""
        tensor = self._reader.tensor(key)
        return dequantize_blocks(tensor, self._reader.tensor(key + _SCALE), self._block) if tensor.dtype == E4M3 else tensor


def load_hf(path: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> M2Model:
    """A model from a Hugging Face folder, one tensor at a time beside the model itself.

    Args:
        dtype: of weights and compute; default: as stored (that of the unquantised weights of an FP8 checkpoint). The router stays fp32.

    Raises:
        ValueError: another kind of model, something M2 does not have, or a shard or tensor missing, damaged, unexpected or of another
            shape; the message names the file and the field or tensor. Everything is checked before the model is built.
    """
    source = _Checkpoint(path)
    model = build_model(source.config, dtype or source.dtype, device)
    state = model.state_dict()
    for slot in source.slots:
        slot.view(state).copy_(source.weight(slot.key))
    return model


# ---- writing ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Encoding:
    """How tensors are stored: ``dtype``, FP8 where that is asked for and fits, the router always in fp32 (fp64 in an fp64 export)."""

    dtype: torch.dtype
    fp8: bool

    def _stored(self, key: str) -> torch.dtype:
        if _FP32_KEY.search(key):
            return torch.promote_types(self.dtype, torch.float32)
        return E4M3 if self.fp8 and _FP8_KEY.search(key) else self.dtype

    def size(self, slot: Slot) -> int:
        """Bytes on disk."""
        scale = 4 * torch.Size(scale_shape(slot.shape)).numel() if self._stored(slot.key) == E4M3 else 0
        return torch.Size(slot.shape).numel() * self._stored(slot.key).itemsize + scale

    def encode(self, key: str, tensor: Tensor) -> dict[str, Tensor]:
        """The tensors to store, contiguous, on the CPU and not sharing memory with the model's."""
        if self._stored(key) == E4M3:
            weight, scale = quantize_blocks(tensor)
            return {key: weight.cpu(), key + _SCALE: scale.cpu()}
        return {key: tensor.to("cpu", self._stored(key), copy=True, memory_format=torch.contiguous_format)}


def _write(path: str | Path, hf_config: dict[str, Any], slots: list[Slot], weight: Callable[[Slot], Tensor], encoding: _Encoding,
           companions: Path | None, max_shard_bytes: int) -> None:
    by_key = {slot.key: slot for slot in slots}
    with complete_folder(path) as folder:
        write_json(folder / "config.json", hf_config)
        for file in _COMPANIONS:
            if companions is not None and (companions / file).is_file():
                shutil.copyfile(companions / file, folder / file)
        if not (folder / "generation_config.json").exists():
            # Without one, transformers takes use_mtp for a wish to speculate with MTP weights, which it cannot load for this model.
            write_json(folder / "generation_config.json", {k: hf_config.get(k) for k in ("bos_token_id", "eos_token_id")})
        write_shards(folder, {slot.key: encoding.size(slot) for slot in slots},
                     lambda key: encoding.encode(key, weight(by_key[key])), max_shard_bytes)


def save_hf(model: M2Model, path: str | Path, tokenizer_dir: str | Path | None = None, *, dtype: torch.dtype | None = None,
            fp8: bool = False, max_shard_bytes: int = _MAX_SHARD_BYTES) -> None:
    """Writes a folder that transformers, vLLM and SGLang load. It appears only when complete and replaces an earlier export.

    Args:
        tokenizer_dir: its tokenizer files are copied, and its special tokens named in ``config.json``.
        dtype: of the weights on disk; default: the model's.
        fp8: attention projections and experts as e4m3 in 128x128 blocks, as MiniMax releases them.
        max_shard_bytes: at most so much is held in memory beside the model.

    Raises:
        ValueError: ``path`` holds something else, or could not be written; no part of the export is left then.
    """
    state = model.state_dict()
    write_hf(path, model.config, lambda slot: slot.view(state), dtype or model.dtype, tokenizer_dir, fp8=fp8,
             max_shard_bytes=max_shard_bytes)


def write_hf(path: str | Path, config: ModelConfig, weight: Callable[[Slot], Tensor], dtype: torch.dtype,
             tokenizer_dir: str | Path | None = None, *, fp8: bool = False, max_shard_bytes: int = _MAX_SHARD_BYTES) -> None:
    """:func:`save_hf` of tensors that ``weight`` gives one at a time, in the order of :func:`layout`."""
    tokenizer = None if tokenizer_dir is None else Path(tokenizer_dir)
    special = {} if tokenizer is None else special_token_ids(tokenizer)
    hf_config = config_to_hf(config, dtype, fp8, **special)
    _write(path, hf_config, layout(config), weight, _Encoding(dtype, fp8), tokenizer, max_shard_bytes)


def convert_shards(source: str | Path, path: str | Path, tokenizer_dir: str | Path | None = None, *, dtype: torch.dtype | None = None,
                   fp8: bool = False, max_shard_bytes: int = _MAX_SHARD_BYTES) -> None:
    """Rewrites a Hugging Face folder in another dtype without building the model: memory for one shard is enough.

    ``config.json`` keeps what it held and gains what servers need; tokenizer files are the source's own unless others are given.
    Arguments as of :func:`save_hf`.

    Raises:
        ValueError: as :func:`load_hf` of ``source`` and :func:`save_hf` to ``path``.
    """
    read = _Checkpoint(source)
    encoding = _Encoding(dtype or read.dtype, fp8)
    tokenizer = Path(tokenizer_dir or source)
    hf_config = {k: v for k, v in read.hf_config.items() if k != "quantization_config"}
    carried = ["router_aux_loss_coef"] if tokenizer_dir is not None else ["router_aux_loss_coef", "bos_token_id", "eos_token_id"]
    special = {} if tokenizer_dir is None else special_token_ids(tokenizer)
    hf_config |= {k: v for k, v in config_to_hf(read.config, encoding.dtype, fp8, **special).items()
                  if k not in carried or k not in hf_config}
    _write(path, hf_config, read.slots, lambda slot: read.weight(slot.key), encoding, tokenizer, max_shard_bytes)


def special_token_ids(tokenizer_dir: Path) -> dict[str, int]:
    """``bos_token_id`` and ``eos_token_id``, where ``tokenizer_config.json`` names the tokens and ``tokenizer.json`` holds them.

    Raises:
        ValueError: no ``tokenizer.json`` there, or a named token is not in it.
    """
    tokenizer = read_json(tokenizer_dir / "tokenizer.json")
    config_file = tokenizer_dir / "tokenizer_config.json"
    named = read_json(config_file) if config_file.is_file() else {}
    ids = {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
    found: dict[str, int] = {}
    for which in ("bos_token", "eos_token"):
        token = named.get(which)
        token = token["content"] if isinstance(token, dict) else token
        if token is not None:
            if token not in ids:
                raise ValueError(f"{config_file}: {which} = {token!r} is not among added_tokens of tokenizer.json")
            found[f"{which}_id"] = ids[token]
    return found

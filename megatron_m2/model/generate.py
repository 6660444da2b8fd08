"""Plain generation with a key/value cache, and full logits: for samples, tests and tools. The rollout engine of forge is another thing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_m2.model.m2 import M2Model

# Shape suffixes: B sequences, T tokens of a sequence so far, N new tokens.


class _Cache:
    """Keys and values of one layer for B sequences of equal length; called as a layer's ``Attend``."""

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(0, (self.batch, -1)).transpose(1, 2) for x in (q, k, v))  # [B, heads, N, d]
        if self.k is not None and self.v is not None:
            k, v = torch.cat([self.k, k], 2), torch.cat([self.v, v], 2)
        self.k, self.v = k, v
        new, total = q.shape[2], k.shape[2]
        mask = torch.ones(new, total, dtype=torch.bool, device=q.device).tril(total - new) if 1 < new < total else None
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=new == total, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)


class _Decoder:
    """Feeds tokens of B sequences through the model, remembering keys and values."""

    def __init__(self, model: M2Model, batch: int) -> None:
        self.model, self.batch, self.length = model, batch, 0
        self.caches = [_Cache(batch) for _ in model.layers]

    def hidden(self, tokens_BN: Tensor) -> Tensor:
        """Hidden states [B, N, H] after the final norm of the next N tokens."""
        new = tokens_BN.shape[1]
        if self.length + new > self.model.config.max_position_embeddings:
            raise ValueError(f"tokens: {self.length + new} positions, max_position_embeddings = "
                             f"{self.model.config.max_position_embeddings}")
        position = torch.arange(self.length, self.length + new, device=tokens_BN.device).repeat(self.batch)
        x, _ = self.model.trunk(self.model.embed_tokens(tokens_BN.flatten()), position, self.caches)
        self.length += new
        return self.model.norm(x).unflatten(0, (self.batch, new))


def _check_tokens(model: M2Model, tokens_BT: Tensor) -> None:
    if tokens_BT.dim() != 2 or tokens_BT.dtype != torch.int64 or tokens_BT.numel() == 0:
        raise ValueError(f"tokens: {tokens_BT.dtype} {list(tokens_BT.shape)}, need a non-empty torch.int64 [B, T]")
    low, high = (int(x) for x in torch.aminmax(tokens_BT))
    if low < 0 or high >= model.config.vocab_size:
        raise ValueError(f"tokens: id {low if low < 0 else high} outside the vocabulary of {model.config.vocab_size}")


@torch.no_grad()
def logits(model: M2Model, tokens: Tensor) -> Tensor:
    """Logits of every position: fp32 [B, T, vocab] (fp64 for an fp64 model) for int64 [B, T].

    Raises:
        ValueError: tokens of another dtype or shape, outside the vocabulary, or beyond the model's positions.
    """
    _check_tokens(model, tokens)
    return model.head(_Decoder(model, tokens.shape[0]).hidden(tokens))


@torch.no_grad()
def generate(model: M2Model, tokens: Tensor, max_new_tokens: int, *, temperature: float = 1.0, top_k: int | None = None,
             top_p: float = 1.0, eos_id: int | None = None, seed: int | None = None) -> Tensor:
    """Continues B prompts of equal length.

    Args:
        tokens: int64 [B, T].
        temperature: 0 is greedy.
        top_k: keep the k most likely tokens only.
        top_p: then keep the smallest set of tokens whose probabilities reach p.
        eos_id: a sequence that emitted it is filled with it; generation ends when all have.
        seed: repeats the draw.

    Returns:
        int64 [B, T + n], n <= max_new_tokens.

    Raises:
        ValueError: bad tokens or sampling parameters, naming them.
    """
    _check_tokens(model, tokens)
    if max_new_tokens < 0 or temperature < 0 or not 0 < top_p <= 1 or (top_k is not None and top_k < 1):
        raise ValueError(f"generate: max_new_tokens = {max_new_tokens} and temperature = {temperature} must be >= 0, "
                         f"0 < top_p = {top_p} <= 1, top_k = {top_k} >= 1")
    generator = None if seed is None else torch.Generator(device=tokens.device).manual_seed(seed)
    decoder = _Decoder(model, tokens.shape[0])
    done = torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
    step = tokens
    for _ in range(max_new_tokens):
        row = model.head(decoder.hidden(step)[:, -1])
        step = _sample(row, temperature, top_k, top_p, generator)
        if eos_id is not None:
            step[done] = eos_id
            done |= step[:, 0] == eos_id
        tokens = torch.cat([tokens, step], dim=1)
        if done.all():
            break
    return tokens


def _sample(logits_BV: Tensor, temperature: float, top_k: int | None, top_p: float, generator: torch.Generator | None) -> Tensor:
    if temperature == 0:
        return logits_BV.argmax(-1, keepdim=True)
    logits_BV = logits_BV / temperature
    if top_k is not None and top_k < logits_BV.shape[-1]:
        kth = logits_BV.topk(top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth, float("-inf"))
    if top_p < 1:
        ordered, order = logits_BV.sort(dim=-1, descending=True)
        probs = ordered.softmax(-1)
        beyond = probs.cumsum(-1) - probs >= top_p  # the first token is always kept
        logits_BV = logits_BV.masked_fill(beyond.scatter(1, order, beyond), float("-inf"))
    return logits_BV.softmax(-1).multinomial(1, generator=generator)

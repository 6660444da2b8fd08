"""Causal attention on the token forest: token i sees token j exactly when ``j <= i < subtree_end[j]``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Shape suffixes: T tokens, H query heads, G key/value heads (H a multiple of G), D head_dim, P padded places.


def visibility(subtree_end_T: Tensor) -> Tensor:
    """The whole mask, bool [T, T]: row i marks what token i sees. For references and small trees only."""
    index = torch.arange(subtree_end_T.numel(), device=subtree_end_T.device)
    return (index[None, :] <= index[:, None]) & (index[:, None] < subtree_end_T[None, :])


def tree_attention_reference(q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, subtree_end_T: Tensor) -> Tensor:
    """Softmax over visible keys, scale ``D ** -0.5``, written out with a dense mask in fp32 (fp64 for fp64 inputs)."""
    wide = torch.float64 if q_THD.dtype == torch.float64 else torch.float32
    group = q_THD.shape[1] // k_TGD.shape[1]
    k, v = (x.to(wide).repeat_interleave(group, dim=1) for x in (k_TGD, v_TGD))
    scores = torch.einsum("ihd,jhd->hij", q_THD.to(wide), k) * q_THD.shape[2] ** -0.5
    scores = scores.masked_fill(~visibility(subtree_end_T), float("-inf"))
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).to(q_THD.dtype)


def trees_of(subtree_end_T: Tensor) -> list[tuple[int, bool]]:
    """(length, is it a chain) of each tree of the forest, in order.

    Raises:
        ValueError: an entry of ``subtree_end`` does not lie beyond its own index.
    """
    ends = subtree_end_T.cpu().numpy()
    trees, start = [], 0
    while start < len(ends):
        end = int(ends[start])
        if not start < end <= len(ends):
            raise ValueError(f"subtree_end[{start}] = {end}: must lie in ({start}, {len(ends)}]")
        trees.append((end - start, bool((ends[start:end] == end).all())))
        start = end
    return trees


# Chains are padded to the longest when that makes at most so many times the tokens: torch's kernel spreads a batch over the cores,
# but runs the backward of a single sequence on as many cores as it has key/value heads.
_MOST_PADDING = 1.5


def _chains_side_by_side(q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, lengths: list[int]) -> Tensor:
    """Causal attention of all chains as one padded batch. Padding follows a chain's own tokens, where causality hides it."""
    chains, longest = len(lengths), max(lengths)
    if min(lengths) == longest:
        q, k, v = (x.unflatten(0, (chains, longest)).transpose(1, 2) for x in (q_THD, k_TGD, v_TGD))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(0, 1)
    counts, device = torch.tensor(lengths), q_THD.device
    shift = torch.arange(chains) * longest - (counts.cumsum(0) - counts)  # of each chain's places against its tokens
    place_T = (torch.arange(len(q_THD)) + shift.repeat_interleave(counts)).to(device)
    token_P = torch.zeros(chains * longest, dtype=torch.int64, device=device)
    token_P[place_T] = torch.arange(len(q_THD), device=device)
    q, k, v = (x.index_select(0, token_P).unflatten(0, (chains, longest)).transpose(1, 2) for x in (q_THD, k_TGD, v_TGD))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2).flatten(0, 1).index_select(0, place_T)


def tree_attention(q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, subtree_end_T: Tensor) -> Tensor:
    """Attention on a forest. Chains are plain causal attention, a branching tree takes a mask of its own size.

    Args:
        q_THD: [T, H, D]; k_TGD, v_TGD: [T, G, D] with H a multiple of G; one float dtype.
        subtree_end_T: int32 [T] (:class:`megatron_m2.forest.TokenForest`).

    Returns:
        [T, H, D] in q's dtype.

    Raises:
        ValueError: shapes that do not fit, or a ``subtree_end`` that is no forest.
    """
    tokens, heads, head_dim = q_THD.shape
    if k_TGD.shape != v_TGD.shape or k_TGD.shape[0] != tokens or k_TGD.shape[2] != head_dim or heads % k_TGD.shape[1]:
        raise ValueError(f"k: {list(k_TGD.shape)}, v: {list(v_TGD.shape)} do not fit q {list(q_THD.shape)}")
    if subtree_end_T.shape != (tokens,) or subtree_end_T.dtype != torch.int32:
        raise ValueError(f"subtree_end: {subtree_end_T.dtype} {list(subtree_end_T.shape)}, need torch.int32 [{tokens}]")
    trees = trees_of(subtree_end_T)
    lengths = [length for length, _ in trees]
    if all(is_chain for _, is_chain in trees) and len(trees) * max(lengths) <= _MOST_PADDING * tokens:
        return _chains_side_by_side(q_THD, k_TGD, v_TGD, lengths)
    outputs, start = [], 0
    parts = zip(trees, *(x.transpose(0, 1).split(lengths, dim=1) for x in (q_THD, k_TGD, v_TGD)), strict=True)
    for (length, is_chain), q, k, v in parts:
        mask = None if is_chain else visibility(subtree_end_T[start : start + length] - start)
        out = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, is_causal=is_chain, enable_gqa=True)
        outputs.append(out[0])
        start += length
    return torch.cat(outputs, dim=1).transpose(0, 1)

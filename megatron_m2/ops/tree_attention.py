"""Causal attention on the token forest: token i sees token j exactly when ``j <= i < subtree_end[j]``. Kernel: ``csrc/tree_attention/``."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_m2.ops import _extension
from megatron_m2.ops._checks import check_devices

# Shape suffixes: T tokens, Q those of them whose queries are asked, H query heads, G key/value heads (H a multiple of G), D head_dim.


def visibility(subtree_end_T: Tensor) -> Tensor:
    """The whole mask, bool [T, T]: row i marks what token i sees. For references and small trees only."""
    index = torch.arange(subtree_end_T.numel(), device=subtree_end_T.device)
    return (index[None, :] <= index[:, None]) & (index[:, None] < subtree_end_T[None, :])


class AttentionOutput(NamedTuple):
    """Attributes:
        out: [Q, H, D] in q's dtype.
        lse: fp32 [Q, H] (fp64 for fp64), natural logarithm of each softmax's denominator.
    """

    out: Tensor
    lse: Tensor


def tree_attention_reference(q_QHD: Tensor, k_TGD: Tensor, v_TGD: Tensor, subtree_end_T: Tensor, query_start: int = 0
                             ) -> AttentionOutput:
    """Softmax over visible keys, scale ``D ** -0.5``, written out with a dense mask in fp32 (fp64 for fp64 inputs)."""
    wide = torch.float64 if q_QHD.dtype == torch.float64 else torch.float32
    group = q_QHD.shape[1] // k_TGD.shape[1]
    k, v = (x.to(wide).repeat_interleave(group, dim=1) for x in (k_TGD, v_TGD))
    scores = torch.einsum("ihd,jhd->hij", q_QHD.to(wide), k) * q_QHD.shape[2] ** -0.5
    mask = visibility(subtree_end_T)[query_start : query_start + len(q_QHD)]
    scores = scores.masked_fill(~mask, float("-inf"))
    out = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).to(q_QHD.dtype)
    return AttentionOutput(out, scores.logsumexp(-1).transpose(0, 1))


def tree_attention_with_lse(q_QHD: Tensor, k_TGD: Tensor, v_TGD: Tensor, subtree_end_T: Tensor, query_start: int = 0) -> AttentionOutput:
    """:func:`tree_attention` and the log-sum-exp, by which parts of the keys can be joined; both carry gradients."""
    _check(q_QHD, k_TGD, v_TGD, subtree_end_T, query_start)
    if _kernel_takes(q_QHD):
        return AttentionOutput(*torch.ops.m2_ops.tree_attention(q_QHD, k_TGD, v_TGD, subtree_end_T, query_start))
    check_forest(subtree_end_T)
    return tree_attention_reference(q_QHD, k_TGD, v_TGD, subtree_end_T, query_start)


def tree_attention(q_QHD: Tensor, k_TGD: Tensor, v_TGD: Tensor, subtree_end_T: Tensor, query_start: int = 0) -> Tensor:
    """Attention on a forest: work and memory follow the visible pairs.

    Args:
        q_QHD: [Q, H, D], the queries of tokens ``query_start + [0, Q)``: all tokens, or a block against a longer prefix (decoding,
            chunked prefill). Keys after the last query are not read.
        k_TGD, v_TGD: [T, G, D] with H a multiple of G; one float dtype. bf16 with D a multiple of 16 up to 256 (64 or 128 on a GPU)
            runs the kernel, whose tiles of unseen pairs cost nothing and whose backward is deterministic; else torch's attention
            runs, tree by tree.
        subtree_end_T: int32 [T] (:class:`megatron_m2.forest.TokenForest`).

    Returns:
        [Q, H, D] in q's dtype.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a ``subtree_end`` that is no forest (on a GPU a device assert),
            naming the argument.
    """
    _check(q_QHD, k_TGD, v_TGD, subtree_end_T, query_start)
    if _kernel_takes(q_QHD):
        out: Tensor = torch.ops.m2_ops.tree_attention(q_QHD, k_TGD, v_TGD, subtree_end_T, query_start)[0]
        return out
    check_forest(subtree_end_T)
    if query_start or len(q_QHD) != len(k_TGD):
        return tree_attention_reference(q_QHD, k_TGD, v_TGD, subtree_end_T, query_start).out
    return _tree_by_tree(q_QHD, k_TGD, v_TGD, subtree_end_T)


def check_forest(subtree_end_T: Tensor) -> None:
    """Raises ValueError unless the subtrees ``[t, subtree_end[t])`` nest."""
    open_ends: list[int] = []  # of the subtrees that hold token t, the innermost last
    ends = subtree_end_T.tolist()
    for t, end in enumerate(ends):
        while open_ends and open_ends[-1] <= t:
            open_ends.pop()
        most = open_ends[-1] if open_ends else len(ends)
        if not t < end <= most:
            raise ValueError(f"subtree_end[{t}] = {end}: must lie in ({t}, {most}]")
        open_ends.append(end)


def _tree_by_tree(q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, subtree_end_T: Tensor) -> Tensor:
    """By torch's attention: a chain is plain causal attention, a branching tree takes a mask of its own size."""
    outputs, start, ends = [], 0, subtree_end_T.tolist()
    while start < len(ends):
        end = ends[start]
        q, k, v = (x[start:end].transpose(0, 1)[None] for x in (q_THD, k_TGD, v_TGD))
        is_chain = min(ends[start:end]) == end
        mask = None if is_chain else visibility(subtree_end_T[start:end] - start)
        outputs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_chain, enable_gqa=True)[0])
        start = end
    return torch.cat(outputs, dim=1).transpose(0, 1) if outputs else q_THD.clone()


def _kernel_takes(q: Tensor) -> bool:
    dims = (64, 128) if q.device.type == "cuda" else range(16, 257, 16)
    return q.dtype == torch.bfloat16 and _extension.available(q.device.type) and q.shape[2] in dims


def _check(q: Tensor, k: Tensor, v: Tensor, subtree_end: Tensor, query_start: int) -> None:
    if q.dim() != 3 or not q.is_floating_point():
        raise ValueError(f"q: {q.dtype} {list(q.shape)}, need floats [queries, heads, head_dim]")
    if k.dim() != 3 or k.shape[2] != q.shape[2] or k.shape[1] < 1 or q.shape[1] % k.shape[1] or k.dtype != q.dtype:
        raise ValueError(f"k: {k.dtype} {list(k.shape)} does not fit q {q.dtype} {list(q.shape)}")
    if v.shape != k.shape or v.dtype != k.dtype:
        raise ValueError(f"v: {v.dtype} {list(v.shape)}, need {k.dtype} {list(k.shape)} as k")
    if subtree_end.shape != k.shape[:1] or subtree_end.dtype != torch.int32:
        raise ValueError(f"subtree_end: {subtree_end.dtype} {list(subtree_end.shape)}, need torch.int32 [{len(k)}]")
    if not 0 <= query_start <= len(k) - len(q):
        raise ValueError(f"query_start: {query_start}, need 0 to {len(k) - len(q)} for {len(q)} queries of {len(k)} tokens")
    check_devices(q, k=k, v=v, subtree_end=subtree_end)


# ---- torch.library: shapes for tracing, gradients ---------------------------------------------------------------------------------


def _fake(q: Tensor, k: Tensor, v: Tensor, subtree_end: Tensor, query_start: int) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, subtree_end, ctx.query_start = inputs
    ctx.save_for_backward(q, k, v, *output, subtree_end)
    ctx.set_materialize_grads(False)  # most often nothing flows into lse


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_out is None and grad_lse is None:
        return None, None, None, None, None
    grad_out = torch.zeros_like(ctx.saved_tensors[0]) if grad_out is None else grad_out
    dq, dk, dv = torch.ops.m2_ops.tree_attention_backward(grad_out, grad_lse, *ctx.saved_tensors, ctx.query_start)
    return dq, dk, dv, None, None


if _extension.available():
    torch.library.register_fake("m2_ops::tree_attention", _fake)
    torch.library.register_autograd("m2_ops::tree_attention", _backward, setup_context=_save)
    torch.library.register_fake("m2_ops::tree_attention_backward", lambda grad_out, grad_lse, q, k, v, out, lse, subtree_end, query_start: (
        q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)))

"""Tokens to rows grouped by expert, and the weighted sum back. Kernels: ``csrc/permute/``."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_m2.ops import _extension
from megatron_m2.ops._checks import check_devices

# Shape suffixes: T tokens, K experts per token, E experts, R rows grouped by expert (padding included), W width.


class Layout(NamedTuple):
    """Where the T * K routed rows lie; rows of one expert keep the order of tokens and slots, so that sums repeat bit for bit.

    Attributes:
        ends: int32 [E], one past the last row of each expert, its padding included.
        token: int32 [R], token of each row, -1 for padding. R is as many rows as any routing can need, so it does not depend on the data.
        row: int32 [T, K], row of each (token, slot), -1 where the slot has no expert.
    """

    ends: Tensor
    token: Tensor
    row: Tensor


def permute_layout_reference(experts_TK: Tensor, num_experts: int, block: int = 1, routed: int | None = None) -> Layout:
    """:func:`permute_layout` in plain torch."""
    flat, device = experts_TK.flatten().long(), experts_TK.device
    counts = torch.bincount(flat + 1, minlength=num_experts + 1)[1:]
    padded = (counts + block - 1) // block * block
    ends = padded.cumsum(0)
    order = flat.argsort(stable=True)[len(flat) - int(counts.sum()) :]
    shift = (ends - padded) - (counts.cumsum(0) - counts)  # of each expert's first row, by the padding before it
    row_sorted = torch.arange(len(order), device=device) + shift[flat[order]]
    routed = flat.numel() if routed is None else routed
    if len(order) > routed:
        raise ValueError(f"routed: {routed}, but {len(order)} slots have an expert")
    rows = routed + min(routed, num_experts) * (block - 1)
    token = torch.full((-(-rows // block) * block,), -1, dtype=torch.int32, device=device)
    token[row_sorted] = (order // experts_TK.shape[1]).int()
    row = torch.full_like(flat, -1).index_copy(0, order, row_sorted)
    return Layout(ends.int(), token, row.view(experts_TK.shape).int())


def permute_reference(x_TW: Tensor, layout: Layout) -> Tensor:
    rows = x_TW.index_select(0, layout.token.clamp_min(0).long())
    return rows.masked_fill((layout.token < 0)[:, None], 0.0)


def unpermute_reference(rows_RW: Tensor, layout: Layout, weights_TK: Tensor | None = None) -> Tensor:
    wide = torch.float64 if rows_RW.dtype == torch.float64 else torch.float32
    rows = rows_RW.index_select(0, layout.row.flatten().clamp_min(0).long()).unflatten(0, layout.row.shape).to(wide)
    rows = rows.masked_fill((layout.row < 0)[..., None], 0.0)
    return (rows if weights_TK is None else rows * weights_TK.to(wide)[..., None]).sum(1).to(rows_RW.dtype)


def _kernel_takes(x: Tensor) -> bool:
    return x.dtype in (torch.bfloat16, torch.float32) and _extension.available(x.device.type)


def permute_layout(experts_TK: Tensor, num_experts: int, block: int = 1, routed: int | None = None) -> Layout:
    """Groups (token, slot) pairs by expert.

    Args:
        experts_TK: int32 [T, K], each in [0, num_experts), or -1: the slot goes nowhere.
        block: rows of each expert are padded to a multiple of it.
        routed: at most so many slots have an expert; default all. There are rows for so many.

    Raises:
        ValueError: dtype or shape does not fit, more slots have an expert or one is out of range (both on the CPU), naming the argument.
    """
    if experts_TK.dim() != 2 or experts_TK.dtype != torch.int32:
        raise ValueError(f"experts: {experts_TK.dtype} {list(experts_TK.shape)}, need torch.int32 [tokens, top_k]")
    if num_experts < 1 or block < 1:
        raise ValueError(f"num_experts: {num_experts}, block: {block}; need 1 or more of each")
    if routed is not None and not 0 <= routed <= experts_TK.numel():
        raise ValueError(f"routed: {routed}, need 0 to {experts_TK.numel()}")
    if _extension.available(experts_TK.device.type):
        return Layout(*torch.ops.m2_ops.permute_layout(experts_TK, num_experts, block, routed))
    return permute_layout_reference(experts_TK, num_experts, block, routed)


def permute(x_TW: Tensor, layout: Layout) -> Tensor:
    """Row r of the result is ``x[layout.token[r]]``, 0 for padding: [R, W] in x's dtype; differentiable.

    Raises:
        ValueError: x is not [T, W] floats with the layout's T.
    """
    if x_TW.dim() != 2 or not x_TW.is_floating_point() or len(x_TW) != len(layout.row):
        raise ValueError(f"x: {x_TW.dtype} {list(x_TW.shape)}, need floats [{len(layout.row)}, width]")
    check_devices(x_TW, layout=layout.token)
    if _kernel_takes(x_TW):
        return torch.ops.m2_ops.permute(x_TW, layout.token, layout.row)
    return permute_reference(x_TW, layout)


def unpermute(rows_RW: Tensor, layout: Layout, weights_TK: Tensor | None = None) -> Tensor:
    """``sum_k weights[t, k] * rows[layout.row[t, k]]`` over the slots that have a row, in fp32 (fp64 for fp64).

    Returns:
        [T, W] in the rows' dtype; differentiable.

    Args:
        rows_RW: [R, W].
        weights_TK: fp32 [T, K] (fp64 for fp64 rows); None: 1 each.

    Raises:
        ValueError: shapes or dtypes that do not fit, naming the argument.
    """
    if rows_RW.dim() != 2 or not rows_RW.is_floating_point() or len(rows_RW) != len(layout.token):
        raise ValueError(f"rows: {rows_RW.dtype} {list(rows_RW.shape)}, need floats [{len(layout.token)}, width]")
    wide = torch.float64 if rows_RW.dtype == torch.float64 else torch.float32
    if weights_TK is not None and (weights_TK.shape != layout.row.shape or weights_TK.dtype != wide):
        raise ValueError(f"weights: {weights_TK.dtype} {list(weights_TK.shape)}, need {wide} {list(layout.row.shape)}")
    check_devices(rows_RW, layout=layout.row, weights=weights_TK)
    if _kernel_takes(rows_RW):
        return torch.ops.m2_ops.unpermute(rows_RW, layout.token, layout.row, weights_TK)
    return unpermute_reference(rows_RW, layout, weights_TK)


# ---- torch.library: shapes for tracing, gradients ---------------------------------------------------------------------------------


def _layout_fake(experts: Tensor, num_experts: int, block: int, routed: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    routed = experts.numel() if routed is None else routed
    rows = routed + min(routed, num_experts) * (block - 1)
    return experts.new_empty(num_experts), experts.new_empty((rows + block - 1) // block * block), torch.empty_like(experts)


def _permute_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.m2_ops.unpermute(grad, *ctx.saved_tensors, None), None, None


def _save_unpermute(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, token, row, weights = inputs
    ctx.save_for_backward(rows if weights is not None else None, token, row, weights)


def _unpermute_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    rows, token, row, weights = ctx.saved_tensors
    if weights is None:
        return torch.ops.m2_ops.permute(grad, token, row), None, None, None
    d_rows, d_weights = torch.ops.m2_ops.unpermute_backward(grad, rows, token, row, weights)
    return d_rows, None, None, d_weights


if _extension.available():
    torch.library.register_fake("m2_ops::permute_layout", _layout_fake)
    torch.library.register_fake("m2_ops::permute", lambda x, token, row: x.new_empty(len(token), x.shape[1]))
    torch.library.register_autograd("m2_ops::permute", _permute_backward,
                                    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[1:]))
    torch.library.register_fake("m2_ops::unpermute", lambda rows, token, row, weights: rows.new_empty(len(row), rows.shape[1]))
    torch.library.register_autograd("m2_ops::unpermute", _unpermute_backward, setup_context=_save_unpermute)
    torch.library.register_fake("m2_ops::unpermute_backward",
                                lambda grad, rows, token, row, weights: (torch.empty_like(rows), torch.empty_like(weights)))

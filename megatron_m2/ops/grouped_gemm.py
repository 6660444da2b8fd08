"""One matrix product per group of rows, and the experts' SwiGLU between two of them. Kernels: ``csrc/grouped_gemm/``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_m2.ops import _extension
from megatron_m2.ops._checks import check_devices
from megatron_m2.ops.weight_grad import now_or_later

# Shape suffixes: R rows grouped by expert, E experts (groups), A and B widths of a product's input and output, H hidden, F expert width.


Product = Callable[[Tensor, Tensor, Tensor], Tensor]


def group_slices(ends_E: Tensor) -> Iterator[slice]:
    """The rows of each group."""
    start = 0
    for end in ends_E.tolist():
        yield slice(start, end)
        start = end


def grouped_mm_reference(x_RA: Tensor, w_EBA: Tensor, ends_E: Tensor) -> Tensor:
    """:func:`grouped_mm` group by group, differentiated by autograd."""
    parts = [F.linear(x_RA[rows], w) for rows, w in zip(group_slices(ends_E), w_EBA, strict=True)]
    rest = x_RA.new_zeros(len(x_RA) - sum(map(len, parts)), w_EBA.shape[1])
    return torch.cat([*parts, rest])


def grouped_mm_by_torch(x_RA: Tensor, w_EBA: Tensor, ends_E: Tensor) -> Tensor:
    """:func:`grouped_mm` by torch's own kernel: bf16, A and B multiples of 8."""
    beyond = (torch.arange(len(x_RA), device=x_RA.device) >= ends_E[-1])[:, None]
    # torch leaves rows beyond the last group as it found them, in the output and in the gradient of its input
    out: Tensor = _TorchGrouped.apply(x_RA.masked_fill(beyond, 0.0), w_EBA, ends_E)
    return out.masked_fill(beyond, 0.0)


class _TorchGrouped(torch.autograd.Function):
    """torch's grouped product; its own backward cannot leave the weights' gradient for later."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(x, ends)
        ctx.weight = w
        return F.grouped_mm(x, w.mT, offs=ends)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (x, ends), w = ctx.saved_tensors, ctx.weight
        return F.grouped_mm(dy, w, offs=ends), now_or_later(w, lambda: F.grouped_mm(dy.mT, x, offs=ends)), None


def grouped_swiglu_reference(x_RH: Tensor, gate_up_E2FH: Tensor, down_EHF: Tensor, ends_E: Tensor, product: Product = grouped_mm_reference
                             ) -> Tensor:
    """:func:`grouped_swiglu` from two grouped products."""
    gate, up = product(x_RH, gate_up_E2FH, ends_E).chunk(2, dim=-1)
    return product(F.silu(gate) * up, down_EHF, ends_E)


def _kernel_takes(x: Tensor, *widths: int) -> bool:
    here = x.device.type in ("cpu", "meta") and _extension.available()
    return here and x.dtype == torch.bfloat16 and all(w and w % 2 == 0 for w in widths)


def _product_of(x: Tensor, *widths: int) -> Product:
    """Where our kernel does not run: torch's, which needs a GPU to be fast, or the reference."""
    by_torch = x.dtype == torch.bfloat16 and x.device.type == "cuda" and not any(w % 8 for w in widths)
    return grouped_mm_by_torch if by_torch else grouped_mm_reference


def grouped_mm(x_RA: Tensor, w_EBA: Tensor, ends_E: Tensor) -> Tensor:
    """Rows of group e times ``w[e].T``; rows beyond the last group give 0. Differentiable; a group without rows gets a zero gradient.

    Args:
        x_RA: [R, A]; w_EBA: [E, B, A]; bf16 with even A and B on a CPU (kernel: fp32 sums), bf16 with A and B multiples of 8 on a GPU
            (torch's kernel), or any float dtype (reference).
        ends_E: int32 [E], one past each group's last row, not descending, at most R.

    Returns:
        [R, B] in x's dtype.

    Raises:
        ValueError: shapes, dtypes or ends that do not fit, naming the argument.
    """
    check_groups(x_RA, ends_E, len(w_EBA))
    if w_EBA.dim() != 3 or w_EBA.shape[2] != x_RA.shape[1] or w_EBA.dtype != x_RA.dtype:
        raise ValueError(f"w: {w_EBA.dtype} {list(w_EBA.shape)} does not fit x {x_RA.dtype} {list(x_RA.shape)}")
    check_devices(x_RA, w=w_EBA)
    if _kernel_takes(x_RA, *w_EBA.shape[1:]):
        return torch.ops.m2_ops.grouped_mm(x_RA, w_EBA, ends_E, True)
    return _product_of(x_RA, *w_EBA.shape[1:])(x_RA, w_EBA, ends_E)


def grouped_swiglu(x_RH: Tensor, gate_up_E2FH: Tensor, down_EHF: Tensor, ends_E: Tensor) -> Tensor:
    """``down_e (silu(gate_e x) * up_e x)`` for the rows of each group e, SwiGLU and its gradient fused into the products before them.

    Args:
        x_RH: [R, H]; gate_up_E2FH: [E, 2 F, H], gate rows first; down_EHF: [E, H, F]; one dtype. bf16 with even H and F on a CPU:
            kernel; gate, up and their product are rounded to bf16 between the two products. Else from :func:`grouped_mm`.
        ends_E: int32 [E], as in :func:`grouped_mm`.

    Returns:
        [R, H] in x's dtype.

    Raises:
        ValueError: shapes, dtypes or ends that do not fit, naming the argument.
    """
    check_groups(x_RH, ends_E, len(gate_up_E2FH))
    check_expert_weights(x_RH, gate_up_E2FH, down_EHF)
    if _kernel_takes(x_RH, *down_EHF.shape[1:]):
        return _GroupedSwiGLU.apply(x_RH, gate_up_E2FH, down_EHF, ends_E)
    product = _product_of(x_RH, *down_EHF.shape[1:])
    return grouped_swiglu_reference(x_RH, gate_up_E2FH, down_EHF, ends_E, product)


def check_expert_weights(x: Tensor, gate_up: Tensor, down: Tensor) -> None:
    """Raises ValueError where the experts' weights do not fit x [.., H] or each other."""
    if x.dim() != 2:
        raise ValueError(f"x: {x.dtype} {list(x.shape)}, need two dimensions")
    if gate_up.dim() != 3 or gate_up.shape[2] != x.shape[1] or gate_up.shape[1] % 2 or gate_up.dtype != x.dtype:
        raise ValueError(f"gate_up: {gate_up.dtype} {list(gate_up.shape)} does not fit x {x.dtype} {list(x.shape)}")
    need = [gate_up.shape[0], gate_up.shape[2], gate_up.shape[1] // 2]
    if list(down.shape) != need or down.dtype != x.dtype:
        raise ValueError(f"down: {down.dtype} {list(down.shape)}, need {x.dtype} {need}")
    check_devices(x, gate_up=gate_up, down=down)


def check_groups(x: Tensor, ends: Tensor, groups: int) -> None:
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"x: {x.dtype} {list(x.shape)}, need floats [rows, width]")
    if ends.dtype != torch.int32 or ends.shape != (groups,):
        raise ValueError(f"ends: {ends.dtype} {list(ends.shape)}, need torch.int32 [{groups}]")
    check_devices(x, ends=ends)
    if ends.device.type == "cpu" and groups:
        edges = [0, *ends.tolist(), len(x)]
        if edges != sorted(edges):
            raise ValueError(f"ends: {edges[1:-1]}, need them not to descend, nor to pass the {len(x)} rows")


class _GroupedSwiGLU(torch.autograd.Function):
    """Keeps gate, up and their product; the gradient through SwiGLU is made where the product by ``down`` leaves it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate_up: Tensor, down: Tensor, ends: Tensor) -> Tensor:
        act, hidden = torch.ops.m2_ops.grouped_swiglu(x, gate_up, ends)
        ctx.save_for_backward(x, gate_up, down, ends, act, hidden)
        ctx.weights = gate_up, down
        return torch.ops.m2_ops.grouped_mm(act, down, ends, True)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gate_up, down, ends, act, hidden = ctx.saved_tensors
        ops = torch.ops.m2_ops
        d_down = now_or_later(ctx.weights[1], lambda: ops.grouped_wgrad(dy, act, ends))
        d_hidden = ops.grouped_swiglu_backward(dy, down, hidden, ends)
        d_gate_up = now_or_later(ctx.weights[0], lambda: ops.grouped_wgrad(d_hidden, x, ends))
        return ops.grouped_mm(d_hidden, gate_up, ends, False), d_gate_up, d_down, None


# ---- torch.library: shapes for tracing, gradients ---------------------------------------------------------------------------------


def _mm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
    x, w, ends = ctx.saved_tensors
    ops = torch.ops.m2_ops
    d_w = ops.grouped_wgrad(grad, x, ends) if ctx.transposed else ops.grouped_wgrad(x, grad, ends)
    return ops.grouped_mm(grad, w, ends, not ctx.transposed), d_w, None, None


def _save_mm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.transposed = inputs[3]


if _extension.available():
    torch.library.register_fake("m2_ops::grouped_mm", lambda x, w, ends, transposed: x.new_empty(len(x), w.shape[1 if transposed else 2]))
    torch.library.register_autograd("m2_ops::grouped_mm", _mm_backward, setup_context=_save_mm)
    torch.library.register_fake("m2_ops::grouped_wgrad", lambda dy, x, ends: x.new_empty(len(ends), dy.shape[1], x.shape[1]))
    torch.library.register_fake("m2_ops::grouped_swiglu", lambda x, gate_up, ends: (
        x.new_empty(len(x), gate_up.shape[1] // 2), x.new_empty(len(x), gate_up.shape[1])))
    torch.library.register_fake("m2_ops::grouped_swiglu_backward", lambda dy, down, hidden, ends: torch.empty_like(hidden))

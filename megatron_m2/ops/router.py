"""Sigmoid router with a choosing bias, its replay, and the aux-loss-free update of the bias.

Sources: DeepSeek-V3 (arXiv:2412.19437) eq. 13-16 and transformers' MiniMaxM2 for scores, choice and weights; arXiv:2408.15664
for the bias update. Kernels: ``csrc/router/``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_m2.ops import _extension
from megatron_m2.ops._checks import check_devices

# Shape suffixes: T tokens, E experts, K experts per token.

MAX_EXPERTS = 1024  # of the kernels; csrc/router/router.h
MAX_TOP_K = 32


class RouterOutput(NamedTuple):
    """Where the tokens go.

    Attributes:
        weights: [T, K] in the logits' dtype; each row sums to 1.
        experts: int32 [T, K], by score + bias descending, equal ones by the lower index.
        counts: int64 [E], choices of each expert, each times its token's multiplicity.
    """

    weights: Tensor
    experts: Tensor
    counts: Tensor


def _check(logits: Tensor, bias: Tensor, top_k: int, multiplicity: Tensor | None, routes: Tensor | None) -> None:
    if logits.dim() != 2 or logits.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"logits: {logits.dtype} {list(logits.shape)}, need float32 or float64 [tokens, experts]")
    tokens, experts = logits.shape
    if not 1 <= experts <= MAX_EXPERTS:
        raise ValueError(f"logits: {experts} experts, need 1 to {MAX_EXPERTS}")
    if not 1 <= top_k <= min(experts, MAX_TOP_K):
        raise ValueError(f"top_k: {top_k}, need 1 to {min(experts, MAX_TOP_K)} for {experts} experts")
    wanted = {"bias": (bias, logits.dtype, (experts,)), "multiplicity": (multiplicity, torch.int32, (tokens,)),
              "routes": (routes, torch.int32, (tokens, top_k))}
    for name, (tensor, dtype, shape) in wanted.items():
        if tensor is None:
            continue
        if tensor.dtype != dtype or tensor.shape != shape:
            raise ValueError(f"{name}: {tensor.dtype} {list(tensor.shape)}, need {dtype} {list(shape)}")
    check_devices(logits, bias=bias, multiplicity=multiplicity, routes=routes)


def router_reference(
    logits_TE: Tensor, bias_E: Tensor, top_k: int, *, multiplicity: Tensor | None = None, routes: Tensor | None = None
) -> RouterOutput:
    """:func:`sigmoid_router` in plain torch, differentiated by autograd, on any device and in fp64 too."""
    _check(logits_TE, bias_E, top_k, multiplicity, routes)
    scores_TE = logits_TE.sigmoid()
    if routes is None:
        choice_TE = scores_TE.detach() + bias_E
        experts_TK = choice_TE.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    else:
        experts_TK = routes.long()
    chosen_TK = scores_TE.gather(1, experts_TK)
    each_T = experts_TK.new_ones(len(experts_TK)) if multiplicity is None else multiplicity.long()
    counts_E = experts_TK.new_zeros(logits_TE.shape[1]).index_add(0, experts_TK.flatten(), each_T.repeat_interleave(top_k))
    return RouterOutput(chosen_TK / chosen_TK.sum(-1, keepdim=True), experts_TK.int(), counts_E)


def sigmoid_router(
    logits_TE: Tensor, bias_E: Tensor, top_k: int, *, multiplicity: Tensor | None = None, routes: Tensor | None = None
) -> RouterOutput:
    """Chooses ``top_k`` experts of each token by ``sigmoid(logits) + bias`` and weighs them by their scores without the bias.

    The weights are the chosen scores over their sum, with no epsilon, as in transformers' MiniMaxM2. They alone carry a gradient,
    to the logits. A NaN logit is chosen first and makes its token's weights NaN, so that the loss shows it.

    Args:
        logits_TE: fp32 (kernel) or fp64 (reference) [T, E], T >= 0, 1 <= E <= 1024.
        bias_E: [E] in the logits' dtype; it gets no gradient.
        top_k: 1 to min(E, 32).
        multiplicity: int32 [T], samples that each token stands for in ``counts`` (merged prefixes of a forest); default 1 each.
        routes: int32 [T, K] with distinct experts per token, to be replayed: only the weights are computed anew.

    Returns:
        :class:`RouterOutput`.

    Raises:
        ValueError: dtype, shape, device or ``top_k`` does not fit, or a route is out of range or repeated (on CUDA the route
            check is a device assert); the message names the argument.
    """
    if logits_TE.dtype == torch.float64 or not _extension.available(logits_TE.device.type):
        return router_reference(logits_TE, bias_E, top_k, multiplicity=multiplicity, routes=routes)
    _check(logits_TE, bias_E, top_k, multiplicity, routes)
    if routes is None:
        return RouterOutput(*torch.ops.m2_ops.router_topk(logits_TE, bias_E, top_k, multiplicity))
    weights_TK, counts_E = torch.ops.m2_ops.router_replay(logits_TE, routes, multiplicity)
    return RouterOutput(weights_TK, routes, counts_E)


@torch.no_grad()
def update_router_bias(bias_E: Tensor, counts_E: Tensor, rate: float) -> None:
    """``bias += rate * sign(mean(counts) - counts)`` in place: experts below the mean load become easier to choose.

    Args:
        bias_E: fp32 or fp64 [E], contiguous.
        counts_E: int64 [E], of the whole batch (all-reduced, multiplicity-weighted); compared with the mean in exact integers.
        rate: step, 1e-3 in DeepSeek-V3.

    Raises:
        ValueError: dtype, shape or device does not fit, naming the argument.
    """
    if bias_E.dim() != 1 or bias_E.dtype not in (torch.float32, torch.float64) or not bias_E.is_contiguous():
        raise ValueError(f"bias: {bias_E.dtype} {list(bias_E.shape)}, need contiguous float32 or float64 [experts]")
    if counts_E.dtype != torch.int64 or counts_E.shape != bias_E.shape or counts_E.device != bias_E.device:
        raise ValueError(f"counts: {counts_E.dtype} {list(counts_E.shape)} on {counts_E.device}, "
                         f"need torch.int64 {list(bias_E.shape)} on {bias_E.device}")
    if bias_E.dtype == torch.float64 or not _extension.available(bias_E.device.type):
        bias_E.add_((counts_E.sum() - counts_E * len(counts_E)).sign().to(bias_E.dtype), alpha=rate)
    else:
        torch.ops.m2_ops.router_bias_update(bias_E, counts_E, rate)


# ---- torch.library: shapes for tracing, gradients ---------------------------------------------------------------------------------


def _topk_fake(logits: Tensor, bias: Tensor, top_k: int, multiplicity: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape), logits.new_empty(shape, dtype=torch.int32), logits.new_empty(bias.shape, dtype=torch.int64)


def _replay_fake(logits: Tensor, experts: Tensor, multiplicity: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return logits.new_empty(experts.shape), logits.new_empty(logits.shape[1], dtype=torch.int64)


def _save_topk(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], output[0], output[1])


def _save_replay(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], output[0], inputs[1])


def _topk_backward(ctx: Any, grad_weights: Tensor, *_: Any) -> tuple[Tensor, None, None, None]:
    return torch.ops.m2_ops.router_backward(grad_weights, *ctx.saved_tensors), None, None, None


def _replay_backward(ctx: Any, grad_weights: Tensor, *_: Any) -> tuple[Tensor, None, None]:
    return torch.ops.m2_ops.router_backward(grad_weights, *ctx.saved_tensors), None, None


if _extension.available():
    torch.library.register_fake("m2_ops::router_topk", _topk_fake)
    torch.library.register_autograd("m2_ops::router_topk", _topk_backward, setup_context=_save_topk)
    torch.library.register_fake("m2_ops::router_replay", _replay_fake)
    torch.library.register_autograd("m2_ops::router_replay", _replay_backward, setup_context=_save_replay)
    torch.library.register_fake("m2_ops::router_backward", lambda grad_weights, logits, weights, experts: torch.empty_like(logits))
    torch.library.register_fake("m2_ops::router_bias_update", lambda bias, counts, rate: None)

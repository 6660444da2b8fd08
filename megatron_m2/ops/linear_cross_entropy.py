"""Log-probabilities of chosen tokens, and entropies, straight from hidden states: the logits never exist as a whole.

What is computed of a vocabulary, or of one rank's part of it, are three numbers per prediction (:class:`SoftmaxParts`); parts of
several ranks combine to the whole (:func:`combine_parts`). Kernel: ``csrc/linear_cross_entropy/``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_m2.ops import _extension
from megatron_m2.ops._checks import check_devices

# Shape suffixes: T tokens, N predictions, H hidden, V vocabulary (or a rank's part of it), C a chunk of it.

_CHUNK_ELEMENTS = 1 << 24  # logits that exist at one time where the kernel does not run


class SoftmaxParts(NamedTuple):
    """Of ``softmax(logits)`` over a part of the vocabulary, each fp32 [N] (fp64 for fp64).

    Attributes:
        target: logit of the target, 0 where it lies in another part.
        lse: log of the sum of the exponentials.
        mean: sum of probability times logit, for the entropy; empty [0] when not asked for.
    """

    target: Tensor
    lse: Tensor
    mean: Tensor


def softmax_parts_reference(hidden_TH: Tensor, weight_VH: Tensor, targets_N: Tensor, *, sources_N: Tensor | None = None,
                            vocab_start: int = 0, with_mean: bool = False) -> SoftmaxParts:
    """:func:`softmax_parts` with the logits written out, differentiated by autograd."""
    wide = torch.float64 if hidden_TH.dtype == torch.float64 else torch.float32
    rows = hidden_TH if sources_N is None else hidden_TH.index_select(0, sources_N)
    return parts_of_logits(F.linear(rows.to(wide), weight_VH.to(wide)), targets_N - vocab_start, with_mean)


def parts_of_logits(logits_NV: Tensor, place_N: Tensor, with_mean: bool) -> SoftmaxParts:
    """The definition; ``place``: the target's column, outside [0, V) where it lies in another part."""
    place, here = _place(place_N, logits_NV.shape[1])
    target = torch.where(here, logits_NV.gather(1, place[:, None]).squeeze(1), 0.0)
    mean = (logits_NV.softmax(-1) * logits_NV).sum(-1) if with_mean else logits_NV.new_empty(0)
    return SoftmaxParts(target, logits_NV.logsumexp(-1), mean)


def softmax_parts(hidden_TH: Tensor, weight_VH: Tensor, targets_N: Tensor, *, sources_N: Tensor | None = None, vocab_start: int = 0,
                  with_mean: bool = False) -> SoftmaxParts:
    """Softmax of ``hidden @ weight.T`` over the vocabulary entries ``vocab_start + [0, V)``, as far as its targets and entropy need.

    bf16 operands: products are exact, sums and everything after them fp32, no logit is rounded.

    Args:
        hidden_TH: [T, H]; weight_VH: [V, H], V >= 1, same float dtype.
        targets_N: int64 [N], token ids of the whole vocabulary.
        sources_N: int64 [N], the row of ``hidden`` that predicts each target (on a forest, its parent). None: N = T, row by row.
        vocab_start: token id of ``weight``'s first row.
        with_mean: also compute ``mean``.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a source out of range, naming the argument.
    """
    _check(hidden_TH, weight_VH, targets_N, sources_N)
    if hidden_TH.dtype == torch.bfloat16 and _extension.available(hidden_TH.device.type) and hidden_TH.shape[1] % 2 == 0:
        return SoftmaxParts(*torch.ops.m2_ops.linear_cross_entropy(hidden_TH, weight_VH, targets_N, sources_N, vocab_start, with_mean))
    rows = hidden_TH if sources_N is None else hidden_TH.index_select(0, sources_N)
    return SoftmaxParts(*_Chunked.apply(rows, weight_VH, targets_N, vocab_start, with_mean))


def combine_parts(parts: Sequence[SoftmaxParts]) -> SoftmaxParts:
    """Softmax over all parts of the vocabulary, each part's target counted once; differentiable."""
    lses = torch.stack([p.lse for p in parts])
    lse = lses.logsumexp(0)
    target = torch.stack([p.target for p in parts]).sum(0)
    mean = lse.new_empty(0)
    if len(parts[0].mean) == len(lse):
        mean = ((lses - lse).exp() * torch.stack([p.mean for p in parts])).sum(0)
    return SoftmaxParts(target, lse, mean)


def linear_logprobs(hidden_TH: Tensor, weight_VH: Tensor, targets_N: Tensor, sources_N: Tensor | None = None) -> Tensor:
    """``log p(target)`` under ``softmax(hidden[source] @ weight.T)``: fp32 [N] (fp64 for fp64 inputs).

    Arguments and errors: :func:`softmax_parts`; besides, targets must lie in the vocabulary.

    Raises:
        ValueError: a target outside the vocabulary (on the CPU; checking would make a GPU wait).
    """
    _check_targets(targets_N, len(weight_VH))
    parts = softmax_parts(hidden_TH, weight_VH, targets_N, sources_N=sources_N)
    return parts.target - parts.lse


def linear_logprobs_and_entropy(hidden_TH: Tensor, weight_VH: Tensor, targets_N: Tensor, sources_N: Tensor | None = None
                                ) -> tuple[Tensor, Tensor]:
    """:func:`linear_logprobs` and the entropy of each prediction in nats, both differentiable."""
    _check_targets(targets_N, len(weight_VH))
    parts = softmax_parts(hidden_TH, weight_VH, targets_N, sources_N=sources_N, with_mean=True)
    return parts.target - parts.lse, parts.lse - parts.mean


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, sources: Tensor | None) -> None:
    if hidden.dim() != 2 or not hidden.is_floating_point():
        raise ValueError(f"hidden: {hidden.dtype} {list(hidden.shape)}, need floats [tokens, hidden]")
    if weight.dim() != 2 or not len(weight) or weight.shape[1] != hidden.shape[1] or weight.dtype != hidden.dtype:
        raise ValueError(f"weight: {weight.dtype} {list(weight.shape)} does not fit hidden {hidden.dtype} {list(hidden.shape)}")
    rows = targets.shape if sources is not None and targets.dim() == 1 else hidden.shape[:1]
    if targets.shape != rows or targets.dtype != torch.int64:
        raise ValueError(f"targets: {targets.dtype} {list(targets.shape)}, need torch.int64 {list(rows)}")
    if sources is not None and (sources.shape != targets.shape or sources.dtype != torch.int64):
        raise ValueError(f"sources: {sources.dtype} {list(sources.shape)}, need torch.int64 {list(targets.shape)}")
    check_devices(hidden, weight=weight, targets=targets, sources=sources)


def _check_targets(targets: Tensor, vocab: int) -> None:
    if targets.device.type == "cpu" and targets.numel():
        low, high = (int(x) for x in torch.aminmax(targets))
        if low < 0 or high >= vocab:
            raise ValueError(f"targets: id {low if low < 0 else high} outside the vocabulary of {vocab}")


class _Chunked(torch.autograd.Function):
    """The same on any device and dtype: logits of one chunk of the vocabulary at a time, made again in the backward."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, targets: Tensor, vocab_start: int, with_mean: bool) -> tuple[Tensor, ...]:
        wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
        target, lse, mean = combine_parts([parts_of_logits(logits, targets - vocab_start - first, with_mean)
                                           for first, logits in _chunks(rows, weight, wide)])
        ctx.save_for_backward(rows, weight, targets, lse, mean)
        ctx.vocab_start = vocab_start
        return target, lse, mean

    @staticmethod
    def backward(ctx: Any, d_target: Tensor, d_lse: Tensor, d_mean: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, targets, lse, mean = ctx.saved_tensors
        d_rows, d_weight = torch.zeros_like(rows, dtype=lse.dtype), torch.empty_like(weight)
        for first, logits in _chunks(rows, weight, lse.dtype):
            probs = (logits - lse[:, None]).exp()
            d_logits = probs * (d_lse[:, None] + d_mean[:, None] * (1 + logits - mean[:, None])) if len(mean) else probs * d_lse[:, None]
            place, here = _place(targets - ctx.vocab_start - first, logits.shape[1])
            d_logits.scatter_add_(1, place[:, None], (d_target * here)[:, None])
            narrow, entries = d_logits.to(rows.dtype), slice(first, first + logits.shape[1])
            d_rows += narrow @ weight[entries]
            torch.mm(narrow.t(), rows, out=d_weight[entries])
        return d_rows.to(rows.dtype), d_weight, None, None, None


def _chunks(rows: Tensor, weight: Tensor, wide: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """(first entry, logits [N, C] in ``wide``) of one chunk of the vocabulary after the other."""
    chunk = max(256, _CHUNK_ELEMENTS // max(1, len(rows)))
    for first in range(0, len(weight), chunk):
        yield first, F.linear(rows, weight[first : first + chunk]).to(wide)


def _place(place: Tensor, size: int) -> tuple[Tensor, Tensor]:
    here = (place >= 0) & (place < size)
    return place.where(here, 0), here


# ---- torch.library: shapes for tracing, gradients ---------------------------------------------------------------------------------


def _fake(hidden: Tensor, weight: Tensor, targets: Tensor, sources: Tensor | None, vocab_start: int, with_mean: bool
          ) -> tuple[Tensor, Tensor, Tensor]:
    sizes = (len(targets), len(targets), len(targets) if with_mean else 0)
    target, lse, mean = (hidden.new_empty(n, dtype=torch.float32) for n in sizes)
    return target, lse, mean


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, weight, targets, sources, ctx.vocab_start, _ = inputs
    ctx.save_for_backward(hidden, weight, targets, sources, output[1], output[2])


def _backward(ctx: Any, d_target: Tensor, d_lse: Tensor, d_mean: Tensor) -> tuple[Tensor | None, ...]:
    d_hidden, d_weight = torch.ops.m2_ops.linear_cross_entropy_backward(d_target, d_lse, d_mean, *ctx.saved_tensors, ctx.vocab_start)
    return d_hidden, d_weight, None, None, None, None


if _extension.available():
    torch.library.register_fake("m2_ops::linear_cross_entropy", _fake)
    torch.library.register_autograd("m2_ops::linear_cross_entropy", _backward, setup_context=_save)
    torch.library.register_fake("m2_ops::linear_cross_entropy_backward", lambda d_target, d_lse, d_mean, hidden, weight, *rest: (
        hidden.new_empty(hidden.shape), weight.new_empty(weight.shape)))

"""Samples of RL: what a policy was told and said, token by token, with what training needs to know of each token."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from megatron_m2.model.config import ModelConfig

_LARGEST_LOGPROB = 1e-3  # what rounding may make of log 1


@dataclass(frozen=True)
class Sample:
    """One completion with all that came before it; or, with ``parent``, with what came after the parent's end. n tokens of its own.

    Attributes:
        name: of this sample, unique in a batch. group: what its advantage was compared with, in most cases the task.
        tokens: int64 [n].
        trainable: bool [n]: sampled by the policy, to be trained.
        old_logprobs: fp32 [n], by which they were sampled; what is not trainable is not read.
        advantages: fp32 [n], 0 where not trainable.
        weight: of this sample in loss and denominator.
        versions: int32 [n] or None, of the weights that sampled each token.
        reference_logprobs: fp32 [n] or None, of a policy to stay near.
        routes: int16 [n, layers, top_k] or None, experts that the rollout used; rows of -1 where nothing was recorded, as for the last
            token of a completion.
        parent: name of an earlier sample of the batch that this one goes on from.
    """

    name: str
    group: str
    tokens: np.ndarray
    trainable: np.ndarray
    old_logprobs: np.ndarray
    advantages: np.ndarray
    weight: float = 1.0
    versions: np.ndarray | None = None
    reference_logprobs: np.ndarray | None = None
    routes: np.ndarray | None = None
    parent: str | None = None


class Refusal(NamedTuple):
    """A sample (or group) that is not trained, and why."""

    name: str
    reason: str


class Batch(NamedTuple):
    """Samples that fit, and those that do not.

    Attributes:
        samples: in the order given. Those at ``context`` are not trained: others go on from them.
        context: bool, of each.
        parents: int64, index of each one's parent among them; -1: none.
        refusals: everything that is not trained.
    """

    samples: list[Sample]
    context: np.ndarray
    parents: np.ndarray
    refusals: list[Refusal]


def check(samples: Iterable[Sample], model: ModelConfig, with_reference: bool = False, longest: int | None = None) -> Batch:
    """Takes apart what can be trained and what cannot; nothing is dropped without a refusal that names it.

    A refused sample that others go on from stays as their context as long as its tokens are sound.

    Args:
        with_reference: a sample is trained only if it has reference log-probs.
        longest: tokens that a path may have in one microbatch; None: any number.
    """
    kept: dict[str, Sample] = {}
    lengths: dict[str, int] = {}  # of whole paths
    context: list[bool] = []
    refusals: list[Refusal] = []
    groups: dict[str, bool] = {}  # whether anything of it is trained
    for sample in samples:
        groups.setdefault(sample.group, False)
        unsound = _unsound_path(sample, kept, lengths, model, longest)
        reason = unsound or _unsound_training(sample, model)
        if not reason and with_reference and sample.reference_logprobs is None:
            reason = "reference_logprobs: none, the loss has a KL to the reference"
        if reason:
            refusals.append(Refusal(sample.name, reason))
        if not unsound:
            kept[sample.name] = _as_context(sample, model) if reason else sample
            lengths[sample.name] = len(sample.tokens) + (lengths[sample.parent] if sample.parent is not None else 0)
            context.append(bool(reason))
        groups[sample.group] |= not reason
    refusals += [Refusal(group, "group: empty, none of its samples can be trained") for group, trained in groups.items() if not trained]
    order = {name: i for i, name in enumerate(kept)}
    parents = np.array([-1 if s.parent is None else order[s.parent] for s in kept.values()], dtype=np.int64)
    return Batch(list(kept.values()), np.array(context, dtype=bool), parents, refusals)


def _as_context(s: Sample, model: ModelConfig) -> Sample:
    return replace(s, trainable=np.zeros(len(s.tokens), bool), routes=None if _unsound_routes(s, model) else s.routes)


def _unsound_path(s: Sample, kept: dict[str, Sample], lengths: dict[str, int], model: ModelConfig, longest: int | None) -> str:
    """Why the tokens cannot even be context; "" if they can."""
    if s.name in kept:
        return "name: another sample has it too"
    if s.parent is not None and s.parent not in kept:
        return f"parent: {s.parent!r} is no earlier sample with sound tokens"
    tokens = np.asarray(s.tokens)
    if tokens.ndim != 1 or not len(tokens) or tokens.dtype != np.int64:
        return f"tokens: {tokens.dtype} {list(tokens.shape)}, need int64 [n], n at least 1"
    if tokens.min() < 0 or tokens.max() >= model.vocab_size:
        at = int(np.argmax((tokens < 0) | (tokens >= model.vocab_size)))
        return f"tokens[{at}] = {tokens[at]}: outside the vocabulary of {model.vocab_size}"
    length = len(tokens) + (lengths[s.parent] if s.parent is not None else 0)
    if length > model.max_position_embeddings:
        return f"tokens: {length} with all before them, max_position_embeddings is {model.max_position_embeddings}"
    if longest is not None and length > longest:
        return f"tokens: {length} with all before them, a microbatch holds {longest}; with piece_tokens they are trained in pieces"
    return ""


def _unsound_training(s: Sample, model: ModelConfig) -> str:
    """Why a sample with sound tokens cannot be trained; "" if it can."""
    n = len(s.tokens)
    fields: dict[str, tuple[Any, type]] = {
        "trainable": (s.trainable, np.bool_), "old_logprobs": (s.old_logprobs, np.float32), "advantages": (s.advantages, np.float32),
        "versions": (s.versions, np.int32), "reference_logprobs": (s.reference_logprobs, np.float32)}
    for name, (value, dtype) in fields.items():
        if value is not None and (np.shape(value) != (n,) or np.asarray(value).dtype != dtype):
            return f"{name}: {np.asarray(value).dtype} {list(np.shape(value))}, need {np.dtype(dtype)} [{n}] as tokens"
    if not s.trainable.any():
        return "trainable: no token to train"
    if s.parent is None and s.trainable[0]:
        return "trainable[0]: the first token of a path is never predicted"
    if not (np.isfinite(s.weight) and s.weight > 0):
        return f"weight: {s.weight}, need a number above 0"
    return _unsound_values(s) or _unsound_routes(s, model)


def _unsound_values(s: Sample) -> str:
    t = s.trainable
    for name, values in (("old_logprobs", s.old_logprobs), ("reference_logprobs", s.reference_logprobs)):
        if values is not None and (wrong := t & ~(np.isfinite(values) & (values <= _LARGEST_LOGPROB))).any():
            at = int(np.argmax(wrong))
            return f"{name}[{at}] = {values[at]}: no log-probability"
    if (wrong := ~np.isfinite(s.advantages)).any():
        return f"advantages[{int(np.argmax(wrong))}] = {s.advantages[np.argmax(wrong)]}"
    if (wrong := ~t & (s.advantages != 0)).any():
        return f"advantages[{int(np.argmax(wrong))}] = {s.advantages[np.argmax(wrong)]}: the token is not trainable"
    if s.versions is not None and (wrong := t & (s.versions < 0)).any():
        return f"versions[{int(np.argmax(wrong))}] = {s.versions[np.argmax(wrong)]}: need 0 or more"
    return ""


def _unsound_routes(s: Sample, model: ModelConfig) -> str:
    if s.routes is None:
        return ""
    shape = (len(s.tokens), model.num_hidden_layers, model.top_k)
    if s.routes.shape != shape or s.routes.dtype != np.int16:
        return f"routes: {s.routes.dtype} {list(s.routes.shape)}, need int16 {list(shape)}: tokens, layers, top_k"
    ordered = np.sort(s.routes, axis=-1)
    missing = (ordered == -1).all(-1)
    sound = (ordered[..., 0] >= 0) & (ordered[..., -1] < model.num_experts) & (np.diff(ordered, axis=-1) > 0).all(-1)
    if (wrong := ~(missing | sound)).any():
        t, layer = (int(i) for i in np.argwhere(wrong)[0])
        row = s.routes[t, layer].tolist()
        return f"routes[{t}, {layer}] = {row}: need {model.top_k} distinct experts of {model.num_experts}, or -1 each"
    return ""


def flatten(batch: Batch) -> Batch:
    """The same without parents: every sample with all that comes before it, which is not trained there."""
    whole: list[Sample] = []
    for s, parent in zip(batch.samples, batch.parents.tolist(), strict=True):
        whole.append(s if parent < 0 else _joined(whole[parent], s))
    return Batch(whole, batch.context, np.full(len(whole), -1, dtype=np.int64), batch.refusals)


def _joined(before: Sample, own: Sample) -> Sample:
    n = len(before.tokens)

    def padded(values: np.ndarray, fill: float = 0) -> np.ndarray:
        return np.concatenate([np.full((n, *values.shape[1:]), fill, values.dtype), values])

    routes = own.routes if own.routes is None else padded(own.routes, -1)
    if before.routes is not None:
        unknown = np.full((len(own.tokens), *before.routes.shape[1:]), -1, np.int16)
        routes = np.concatenate([before.routes, unknown if own.routes is None else own.routes])
    return replace(own, tokens=np.concatenate([before.tokens, own.tokens]), parent=None, routes=routes, trainable=padded(own.trainable),
                   old_logprobs=padded(own.old_logprobs), advantages=padded(own.advantages),
                   versions=None if own.versions is None else padded(own.versions),
                   reference_logprobs=None if own.reference_logprobs is None else padded(own.reference_logprobs))

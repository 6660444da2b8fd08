"""Policy losses as functions of the log-probs of pairs: CISPO (MiniMax-M1 eq. 4-5, MiniMax-M2 eq. 2-4), GRPO, DAPO, policy gradient.

A pair is (sample, trained token). Its loss depends on one log-prob, so that the derivative by it, its coefficient, is all that a backward
needs: :func:`coefficients` makes every loss linear in the log-probs. How much a pair counts in the step's loss is :func:`scales`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Shape suffixes: P pairs, S samples.

# Larger log-ratios are taken for this much, as verl does: e^20 = 4.9e8 is finite in fp32, and so are sums of it.
MAX_LOG_RATIO = 20.0

_EPSILONS = {"grpo": (0.2, 0.2), "dapo": (0.2, 0.28)}  # defaults of eps_low, eps_high; DAPO: arXiv 2503.14476, section 3.1


@dataclass(frozen=True)
class PolicyLossConfig:
    """Which loss, and how pairs are weighed in it.

    Attributes:
        name: "cispo", "grpo", "dapo" (grpo with a higher upper bound) or "policy_gradient" (no ratio).
        low, cap: of cispo, absolute bounds of the ratio: clip(r, low, cap). Many other trainers take distances from 1 instead: their
            (1, 4) is our (0, 5).
        eps_low, eps_high: of grpo and dapo, distances from 1: clip(r, 1 - eps_low, 1 + eps_high). None: 0.2 both; for dapo 0.2 and 0.28.
        denominator: "group" (the paper's: trained tokens of a group, then the mean over groups), "batch" (trained tokens of the step) or
            "sample" (trained tokens of a sample, then the mean over the group, then over groups). See :func:`scales`.
        kl_coef: weight of the KL to a reference policy (k3 estimator); 0: no reference is needed.
        anchor: whose log-probs the ratio is against: "rollout", the sampler's, or "recomputed", by the train engine with the weights
            before the step. Who computes the old log-probs follows it; here is one ratio either way, never two corrections at once.

    Raises:
        ValueError: naming the field, its value and what is legal.
    """

    name: str = "cispo"
    low: float = 0.0
    cap: float = 5.0
    eps_low: float | None = None
    eps_high: float | None = None
    denominator: str = "group"
    kl_coef: float = 0.0
    anchor: str = "rollout"

    def __post_init__(self) -> None:
        for field, legal in (("name", tuple(LOSSES)), ("denominator", ("group", "batch", "sample")), ("anchor", ("rollout", "recomputed"))):
            if getattr(self, field) not in legal:
                raise ValueError(f"loss.{field} = {getattr(self, field)!r}: must be one of {', '.join(legal)}")
        if not 0 <= self.low <= 1:
            raise ValueError(f"loss.low = {self.low}: must be between 0 and 1; it is a bound of the ratio, 0 for none")
        if not self.cap >= 1:
            raise ValueError(f"loss.cap = {self.cap}: must be 1 or more; it is a bound of the ratio, 5 where others say 4 above 1")
        for field, most in (("eps_low", 1.0), ("eps_high", math.inf)):
            value = getattr(self, field)
            if value is not None and self.name not in _EPSILONS:
                raise ValueError(f"loss.{field} = {value}: must be null for {self.name}; cispo has low and cap, bounds of the ratio itself")
            if value is not None and not 0 <= value <= most:
                raise ValueError(f"loss.{field} = {value}: must be between 0 and {most:g}")
        if not 0 <= self.kl_coef < math.inf:
            raise ValueError(f"loss.kl_coef = {self.kl_coef}: must be 0 or more")

    @property
    def ratio_bounds(self) -> tuple[float, float]:
        """What the ratio is clipped to, lowest and highest."""
        if self.name not in _EPSILONS:
            return self.low, self.cap
        low, high = _EPSILONS[self.name]
        return 1 - (low if self.eps_low is None else self.eps_low), 1 + (high if self.eps_high is None else self.eps_high)


# ---- loss of a pair ------------------------------------------------------------------------------------------------------------------


def _bounded(log_ratio_P: Tensor) -> Tensor:
    return log_ratio_P.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def _k3(log_ratio_P: Tensor) -> Tensor:
    """r - 1 - log r, whose mean over samples of p, with r = q / p, is KL(p, q) (Schulman, "Approximating KL divergence")."""
    bounded_P = _bounded(log_ratio_P)
    return bounded_P.expm1() - bounded_P


def _cispo(bounds: tuple[float, float], logprobs_P: Tensor, old_logprobs_P: Tensor, advantages_P: Tensor) -> tuple[Tensor, Tensor]:
    ratio_P = _bounded(logprobs_P - old_logprobs_P).exp().detach()
    weight_P = ratio_P.clamp(*bounds)
    return -(weight_P * advantages_P * logprobs_P), weight_P != ratio_P


def _ppo(bounds: tuple[float, float], logprobs_P: Tensor, old_logprobs_P: Tensor, advantages_P: Tensor) -> tuple[Tensor, Tensor]:
    ratio_P = _bounded(logprobs_P - old_logprobs_P).exp()
    plain_P, clipped_P = ratio_P * advantages_P, ratio_P.clamp(*bounds) * advantages_P
    return -torch.minimum(plain_P, clipped_P), clipped_P < plain_P


def _policy_gradient(bounds: tuple[float, float], logprobs_P: Tensor, old_logprobs_P: Tensor, advantages_P: Tensor
                     ) -> tuple[Tensor, Tensor]:
    return -(advantages_P * logprobs_P), torch.zeros_like(logprobs_P, dtype=torch.bool)


# name: (ratio bounds, logprobs_P, old_logprobs_P, advantages_P) to the loss [P] and where clipping changed it, bool [P]
LOSSES: dict[str, Callable[[tuple[float, float], Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "cispo": _cispo, "grpo": _ppo, "dapo": _ppo, "policy_gradient": _policy_gradient}


def policy_loss(config: PolicyLossConfig, logprobs_P: Tensor, old_logprobs_P: Tensor, advantages_P: Tensor,
                reference_logprobs_P: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Loss of each pair before normalisation.

    With r = exp(logprob - old_logprob), A the advantage and sg() a constant to differentiation:
    cispo ``-sg(clip(r, low, cap)) A logprob``; grpo, dapo ``-min(r A, clip(r, 1 - eps_low, 1 + eps_high) A)``;
    policy_gradient ``-A logprob``; each ``+ kl_coef (r_ref - 1 - log r_ref)`` with r_ref = exp(reference - logprob).
    Log-ratios beyond +-20 count as +-20, where those that are differentiated (grpo, dapo, KL) have no slope.

    Args:
        logprobs_P: fp32 or fp64 [P], of the policy in training. old_logprobs_P, advantages_P: [P].
        reference_logprobs_P: [P], needed and read only with kl_coef.

    Returns:
        The loss [P], and whether clipping changed it, bool [P].

    Raises:
        ValueError: kl_coef without reference log-probs, or NaN in them.
    """
    loss_P, clipped_P = LOSSES[config.name](config.ratio_bounds, logprobs_P, old_logprobs_P, advantages_P)
    if config.kl_coef:
        if reference_logprobs_P is None or bool(reference_logprobs_P.isnan().any()):
            raise ValueError(f"loss.kl_coef = {config.kl_coef}: needs reference_logprobs for every trained token; 0 does without")
        loss_P = loss_P + config.kl_coef * _k3(reference_logprobs_P - logprobs_P)
    return loss_P, clipped_P


def coefficients(config: PolicyLossConfig, logprobs_P: Tensor, old_logprobs_P: Tensor, advantages_P: Tensor,
                 reference_logprobs_P: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`policy_loss` and its derivative by each pair's log-prob, all without a graph.

    ``coefficient_P * logprobs_P`` with the coefficients held constant has the gradient of the loss, whatever the loss; so a token that
    many pairs share needs one log-prob and the sum of their ``scale * coefficient``.

    Returns:
        Loss [P], coefficient [P], clipped bool [P].

    Raises:
        ValueError: as :func:`policy_loss`.
    """
    with torch.enable_grad():
        leaf_P = logprobs_P.detach().requires_grad_()
        loss_P, clipped_P = policy_loss(config, leaf_P, old_logprobs_P, advantages_P, reference_logprobs_P)
        (coefficient_P,) = torch.autograd.grad(loss_P.sum(), leaf_P)
    return loss_P.detach(), coefficient_P, clipped_P


# ---- what a pair counts --------------------------------------------------------------------------------------------------------------


def scales(config: PolicyLossConfig, lengths_S: np.ndarray, weight_S: np.ndarray, groups: Sequence[str]) -> np.ndarray:
    """What each pair of a sample counts: the step's loss is the sum of ``scale * loss`` over all pairs.

    With n the trained tokens of a sample, w its weight, G the number of groups that train something, and sums over samples k::

        group   scale_s = w_s / (G * sum(w_k n_k, k in group of s))          mean over groups of: weighted mean over the group's tokens
        batch   scale_s = w_s / sum(w_k n_k, all k)                          weighted mean over the step's tokens
        sample  scale_s = w_s / (n_s * G * sum(w_k, k in group of s))        mean over groups of: weighted mean of the samples' means

    A weight stands in numerator and denominator: one of 2 is the sample taken twice, and a group's weights matter only against each
    other (with ``batch``, the step's). The scales of all pairs add up to 1.

    Args:
        lengths_S: [S], trained tokens of each sample of the whole step, over all ranks; one without any has scale 0 and is in no sum.
        weight_S: [S]. groups: S names.

    Returns:
        fp64 [S].

    Raises:
        ValueError: lengths that differ, nothing to train, or a weight of a trained sample that is not a number above 0.
    """
    n_S, w_S = np.asarray(lengths_S, dtype=np.float64), np.asarray(weight_S, dtype=np.float64)
    if not len(n_S) == len(w_S) == len(groups):
        raise ValueError(f"groups: {len(groups)} of them, but {len(n_S)} lengths and {len(w_S)} weights; need one each per sample")
    live_S = n_S > 0
    if not live_S.any():
        raise ValueError("lengths: no trained token in the whole step; need at least one")
    if (wrong_S := live_S & ~(np.isfinite(w_S) & (w_S > 0))).any():
        s = int(np.argmax(wrong_S))
        raise ValueError(f"weight[{s}] = {w_S[s]}: must be above 0; leave the sample out instead")
    numbers = {name: i for i, name in enumerate(dict.fromkeys(groups))}
    group_S = np.array([numbers[name] for name in groups])
    num_groups = len(np.unique(group_S[live_S]))
    if config.denominator == "sample":
        per_S = n_S * num_groups * np.bincount(group_S, w_S * live_S)[group_S]
    else:
        weighed_S = w_S * n_S
        weighed_S[~live_S] = 0  # whatever their weight
        per_S = weighed_S.sum() if config.denominator == "batch" else num_groups * np.bincount(group_S, weighed_S)[group_S]
    return np.divide(w_S, per_S, out=np.zeros(len(n_S)), where=live_S)


# ---- metrics -------------------------------------------------------------------------------------------------------------------------


class PairMetrics:
    """Gathers what the pairs of one step say of the policy, microbatch by microbatch, on the CPU; of all ranks at the end."""

    def __init__(self) -> None:
        self._parts = [torch.zeros(0, 4, dtype=torch.float64)]  # log-ratio, clipped, version, KL to the reference

    def add(self, logprobs_P: Tensor, old_logprobs_P: Tensor, clipped_P: Tensor, versions_P: Tensor,
            reference_logprobs_P: Tensor | None = None) -> None:
        """Takes a microbatch's pairs.

        Args:
            logprobs_P, old_logprobs_P, clipped_P: [P], as of :func:`policy_loss`.
            versions_P: int [P], of the weights that sampled each; -1 where not known.
            reference_logprobs_P: [P], NaN where not given.
        """
        log_ratio_P = (logprobs_P.detach() - old_logprobs_P).double()
        nothing_P = torch.full_like(log_ratio_P, math.nan)
        kl_P = nothing_P if reference_logprobs_P is None else _k3(reference_logprobs_P.double() - logprobs_P.detach().double())
        self._parts.append(torch.stack([log_ratio_P, clipped_P.double(), versions_P.double(), kl_P], dim=1).cpu())

    def result(self, version: int, gather: Callable[[Tensor], Tensor] = lambda values: values) -> dict[str, float]:
        """Metrics over the pairs of all ranks; those that no pair can tell of are left out.

        ``policy/ratio_{p01,p50,p99,max}`` and ``clipped_fraction``; ``kl_old``: KL from the policy that sampled to this one, and
        ``kl_reference``: from this one to the reference, in nats per token (k3); ``logprob_gap_{mean,max}_abs``: nats between the train
        engine and the anchor where both had the present weights, so that only the engines differ; ``logprob_gap_all_{mean,max}_abs``:
        whatever the weights; ``staleness_{mean,max}``: in versions.

        Args:
            version: of the weights in training.
            gather: all ranks' fp64 [n] values on the CPU, one rank after the other; n may differ. It is called twice on every rank.
        """
        log_ratio_P, clipped_P, versions_P, kl_reference_P = torch.cat(self._parts).unbind(1)
        gap_P, age_P, present_P = log_ratio_P.abs(), (version - versions_P)[versions_P >= 0], versions_P == version
        means = {"policy/clipped_fraction": clipped_P, "policy/kl_old": _k3(log_ratio_P),
                 "policy/kl_reference": kl_reference_P[~kl_reference_P.isnan()], "policy/logprob_gap_mean_abs": gap_P[present_P],
                 "policy/logprob_gap_all_mean_abs": gap_P, "policy/staleness_mean": age_P}
        highest = {"policy/logprob_gap_max_abs": gap_P[present_P], "policy/logprob_gap_all_max_abs": gap_P, "policy/staleness_max": age_P}
        mine = [(float(values.sum()), len(values)) for values in means.values()]
        mine += [(float(values.max()) if len(values) else -math.inf, len(values)) for values in highest.values()]
        ranks = gather(torch.tensor(mine, dtype=torch.float64).flatten()).view(-1, len(mine), 2)
        counts = ranks[:, :, 1].sum(0)
        values = torch.cat([ranks[:, : len(means), 0].sum(0) / counts[: len(means)], ranks[:, len(means) :, 0].amax(0)])
        metrics = {name: float(value) for name, value, count in zip([*means, *highest], values, counts, strict=True) if count}
        log_ratios = gather(log_ratio_P.contiguous()).numpy()
        if len(log_ratios):
            levels = np.append(np.quantile(log_ratios, (0.01, 0.5, 0.99)), log_ratios.max())
            ratios = _bounded(torch.from_numpy(levels)).exp().tolist()
            metrics |= {f"policy/ratio_{name}": ratio for name, ratio in zip(("p01", "p50", "p99", "max"), ratios, strict=True)}
        return metrics

#!/usr/bin/env python3
"""Compares the policy losses, their gradients and the advantages with those of verl, on the same random tensors.

Differences are the largest absolute ones; those of gradients over the largest gradient.

    python tools/check_peers.py                          # makes the environment first, 0.3 GB under build/
    python tools/check_peers.py --venv DIR               # another place; one that exists is used as it is

verl runs there as it is published; torch and what else is heavy come from the environment that runs this tool. Exit code 0: nothing
differs by more than --tolerance; 1: something does; 2: the check could not be made.

How verl's parameters are ours: it clips to [1 - clip_ratio_low, 1 + clip_ratio_high], so (1, 4) is our [0, 5]; token-mean over what it is
given is our "batch"; over one group at a time, then averaged, our "group"; seq-mean-token-mean our "sample" where groups are of one size.
It has dual-clip in its GRPO, which clip_ratio_c puts out of reach; and gives a group of one answer its plain reward, where ours is 0.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package of this checkout, installed or not

from megatron_m2.forge.learner.advantages import AdvantageConfig, group_advantages
from megatron_m2.forge.learner.losses import PolicyLossConfig, coefficients, scales

DEFAULT_VENV = Path(__file__).resolve().parents[1] / "build" / "peers"
VERL = "verl==0.9.1"
# Importing verl's core_algos needs these beside torch, numpy, transformers, omegaconf and wandb. tensordict: without its torch.
LIGHT = ("ray==2.60.0", "codetiming==1.4.0", "cloudpickle", "orjson", "pyvers", "importlib_metadata")
HEAVY = (VERL, "tensordict==0.10.0")

GROUPS, PER_GROUP, LONGEST = 6, 5, 40  # answers [GROUPS * PER_GROUP, LONGEST]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=DEFAULT_VENV, help="environment with verl (default: %(default)s)")
    parser.add_argument("--tolerance", type=float, default=1e-6, help="largest difference allowed (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)  # this is the environment's own Python
    return parser.parse_args(argv)


def make_environment(folder: Path) -> Path:
    """The Python of an environment with verl in it, made where there is none yet.

    Raises:
        ValueError: pip failed (its own output is above).
    """
    python = folder / "bin" / "python"
    if not python.is_file():
        print(f"making {folder}", flush=True)
        half = folder.with_name(folder.name + ".making")
        venv.create(half, with_pip=True, clear=True)
        for packages in (LIGHT, ("--no-deps", *HEAVY)):
            pip = [half / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages]
            if subprocess.run(pip, check=False).returncode:
                raise ValueError(f"--venv {folder}: pip could not install {' '.join(packages)}; see its messages above")
        half.rename(folder)
    return python


# ---- in the environment --------------------------------------------------------------------------------------------------------------


class Answers:
    """Random answers, [B, L] with a mask, group by group. Policies differ by up to a few nats, so that every bound is met."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=torch.float64, generator=generator)

        size = (GROUPS * PER_GROUP, LONGEST)
        self.logprobs = -normal(*size).abs().to(dtype)
        self.old, self.reference = ((self.logprobs - 1.2 * normal(*size)).clamp(max=0).to(dtype) for _ in range(2))
        self.advantages = normal(*size).to(dtype)
        self.lengths = torch.randint(1, LONGEST + 1, size[:1], generator=generator)
        self.mask = (torch.arange(LONGEST) < self.lengths[:, None]).to(dtype)
        self.rewards = normal(*size[:1]).to(dtype)
        self.rewards[:PER_GROUP] = 0.3  # a group whose answers are all as good
        self.groups = [f"task {i // PER_GROUP}" for i in range(size[0])]


def ours(config: PolicyLossConfig, a: Answers) -> tuple[Tensor, Tensor, float]:
    """The step's loss, its gradient by every log-prob [B, L], and the clipped share of pairs."""
    there = a.mask.bool()
    loss_P, coefficient_P, clipped_P = coefficients(config, *(x[there] for x in (a.logprobs, a.old, a.advantages, a.reference)))
    scale_S = torch.from_numpy(scales(config, a.lengths.numpy(), np.ones(len(a.lengths)), a.groups))
    scale_P = scale_S.repeat_interleave(a.lengths)
    gradient = torch.zeros(a.mask.shape, dtype=torch.float64)
    gradient[there] = scale_P * coefficient_P
    return (scale_P * loss_P).sum(), gradient, float(clipped_P.double().mean())


def theirs(core: Any, config: PolicyLossConfig, a: Answers, actor: Any) -> tuple[Tensor, Tensor, float]:
    """The same of verl, by autograd."""
    logprobs = a.logprobs.clone().requires_grad_()
    function = core.get_policy_loss_fn({"cispo": "cispo", "policy_gradient": "gpg"}.get(config.name, "vanilla"))
    mode = "seq-mean-token-mean" if config.denominator == "sample" else "token-mean"
    clipped = 0.0

    def part(rows: slice) -> Tensor:
        nonlocal clipped
        loss, metrics = function(a.old[rows], logprobs[rows], a.advantages[rows], a.mask[rows], mode, actor)
        clipped += float(metrics.get("actor/pg_clipfrac", 0.0)) * float(a.mask[rows].sum() / a.mask.sum())
        if config.kl_coef:
            kl = core.kl_penalty(logprobs[rows], a.reference[rows], "k3")
            loss = loss + config.kl_coef * core.agg_loss(loss_mat=kl, loss_mask=a.mask[rows], loss_agg_mode=mode)
        return loss

    each = [slice(g * PER_GROUP, (g + 1) * PER_GROUP) for g in range(GROUPS)] if config.denominator == "group" else [slice(None)]
    total = torch.stack([part(rows) for rows in each]).mean()
    total.backward()
    assert logprobs.grad is not None
    return total.detach(), logprobs.grad, clipped


def losses(core: Any, actor: Callable[..., Any], a: Answers) -> Iterator[tuple[str, dict[str, float]]]:
    clips = [(PolicyLossConfig("cispo", low=0, cap=5), {"clip_ratio_low": 1.0, "clip_ratio_high": 4.0}),
             (PolicyLossConfig("cispo", low=0.8, cap=1.2), {"clip_ratio_low": 0.2, "clip_ratio_high": 0.2}),
             (PolicyLossConfig("cispo", kl_coef=0.1), {"clip_ratio_low": 1.0, "clip_ratio_high": 4.0}),
             (PolicyLossConfig("grpo"), {"clip_ratio_low": 0.2, "clip_ratio_high": 0.2}),
             (PolicyLossConfig("dapo"), {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28}), (PolicyLossConfig("policy_gradient"), {})]
    for clip, settings in clips:
        for denominator in ("batch", "group", "sample"):
            config = PolicyLossConfig(clip.name, clip.low, clip.cap, denominator=denominator, kl_coef=clip.kl_coef)
            mine, other = ours(config, a), theirs(core, config, a, actor(**settings))
            low, high = config.ratio_bounds
            bounds = "" if clip.name == "policy_gradient" else f" [{low:g}, {high:g}]"
            yield f"{clip.name}{bounds}{f' + {clip.kl_coef:g} KL' if clip.kl_coef else ''}, {denominator}", {
                "loss": abs(float(mine[0] - other[0])), "gradient": float((mine[1] - other[1]).abs().max() / other[1].abs().max()),
                "clipped": abs(mine[2] - other[2]), "clipped share": mine[2]}


def advantages(core: Any, a: Answers) -> Iterator[tuple[str, dict[str, float]]]:
    at_the_end = torch.zeros_like(a.mask)
    at_the_end[torch.arange(len(a.lengths)), a.lengths - 1] = a.rewards
    for normalise in (True, False):
        expected, _ = core.compute_grpo_outcome_advantage(at_the_end, a.mask, np.array(a.groups), norm_adv_by_std_in_grpo=normalise)
        actual = np.zeros(a.mask.shape)
        for group in dict.fromkeys(a.groups):
            rows = [i for i, name in enumerate(a.groups) if name == group]
            found = group_advantages(AdvantageConfig(normalise_std=normalise), group, {str(i): [float(a.rewards[i])] for i in rows})
            for i in rows:
                actual[i, : a.lengths[i]] = found[str(i)][0]
        yield f"advantages of outcomes{', over std' if normalise else ''}", {"advantage": float(np.abs(actual - expected.numpy()).max())}


def compare(args: argparse.Namespace) -> bool:
    """Prints the table, and as the last line one JSON object; true when nothing is beyond the tolerance."""
    import verl  # only here: in the environment
    from verl.trainer.ppo import core_algos as core
    from verl.workers.config import ActorConfig

    def actor(**settings: float) -> Any:
        return ActorConfig(strategy="fsdp", rollout_n=PER_GROUP, ppo_micro_batch_size_per_gpu=1, clip_ratio_c=1e9, **settings)

    worst: dict[str, float] = {}
    for dtype in (torch.float64, torch.float32):
        answers = Answers(args.seed, dtype)
        print(f"largest |difference| from verl {verl.__version__}, {str(dtype).split('.')[1]}, {int(answers.mask.sum())} tokens of "
              f"{len(answers.lengths)} answers to {GROUPS} tasks")
        for name, row in (*losses(core, actor, answers), *advantages(core, answers)):
            share = row.pop("clipped share", None)
            print(f"  {name:42s}" + "".join(f"  {key} {value:8.1e}" for key, value in row.items())
                  + (f"  ({share:.0%} of pairs clipped)" if share else ""))
            worst[str(dtype)] = max(worst.get(str(dtype), 0.0), *row.values())
    ok = max(worst.values()) <= args.tolerance
    print(f"largest of all: {max(worst.values()):.1e}, {'within' if ok else 'BEYOND'} {args.tolerance:g}")
    print(json.dumps({"check": "peers", "peer": VERL, "largest_difference": worst, "tolerance": args.tolerance, "ok": ok}))
    return ok


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        if args.inside:
            return 0 if compare(args) else 1
        python = make_environment(args.venv.absolute())
    except (ValueError, ImportError) as error:
        print(f"check_peers: {error}", file=sys.stderr)
        return 2
    again = [str(python), __file__, "--inside", "--tolerance", str(args.tolerance), "--seed", str(args.seed)]
    heavy = str(Path(torch.__file__).resolve().parents[1])
    return subprocess.run(again, env=os.environ | {"PYTHONPATH": heavy}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())

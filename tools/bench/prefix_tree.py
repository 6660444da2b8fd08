#!/usr/bin/env python3
"""Time and peak memory of a learner's step (merge, forward, backward, optimizer) on merged samples, beside the same step on every sample
alone (packed, the same kernels) and on the best linear merge (samples that go on from another's end joined to chains, no branching).

    python tools/bench/prefix_tree.py [--workloads abcd] [--rounds 3] [--device cpu] [--cards results --commit $(git rev-parse HEAD)]

The ceiling follows from the step on every sample alone, taken apart: attention shrinks by the ratio of visible pairs, head and optimizer
not at all, the rest by the ratio of tokens. Each step runs in a process of its own. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the package of this checkout, installed or not

import numpy as np
import torch

from megatron_m2.forge.learner.learner import Learner, LearnerConfig
from megatron_m2.forge.learner.merge import Sharing, merge_samples
from megatron_m2.forge.learner.objective import DraftConfig
from megatron_m2.forge.learner.plan import Budget
from megatron_m2.forge.learner.samples import check
from megatron_m2.parallel.layout import ParallelConfig
from megatron_m2.parallel.mesh import ONE
from megatron_m2.training.compose import read_config
from megatron_m2.training.config import OptimConfig
from megatron_m2.training.memory import keep_freed_memory
from megatron_m2.training.optimizer import MasterAdamW
from megatron_m2.training.stages import ModelStages
from tools.bench.common import add_card_arguments, device_name, write_card
from tools.bench.workloads import WORKLOADS

TOKENS = 8448  # of a microbatch: two of the longest samples, or any of the trees but c's
TIMED = {"attention": ("tree_attention", "tree_attention_backward"), "head": ("linear_cross_entropy", "linear_cross_entropy_backward")}

# ---- one step, in a process of its own ---------------------------------------------------------------------------------------------


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def time_ops(device: torch.device) -> dict[str, float]:
    """Seconds spent in some ops from now on, by what they are for."""
    seconds = dict.fromkeys(TIMED, 0.0)

    def timed(part: str, op: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            start = _clock(device)
            out = op(*arguments)
            seconds[part] += _clock(device) - start
            return out
        return call

    for part, names in TIMED.items():
        for name in names:
            setattr(torch.ops.m2_ops, name, timed(part, getattr(torch.ops.m2_ops, name)))
    return seconds


def _resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) << 10


def peak_bytes(device: torch.device, work: Callable[[], Any]) -> int:
    """What a call takes at its peak beyond what is held before it."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    Path("/proc/self/clear_refs").write_text("5")  # the kernel forgets the high-water mark
    before = _resident("VmRSS")
    work()
    return _resident("VmHWM") - before


def one_step(workload: str, sharing: Sharing, tokens: int, rounds: int, device_type: str) -> dict[str, Any]:
    """Builds a learner and steps; with ``rounds`` 0 for its memory, else for its times."""
    device = torch.device(device_type)
    samples = WORKLOADS[workload][1](np.random.default_rng(0))
    model = read_config(["model=bench_tree"]).model
    stages = ModelStages(model, ParallelConfig(), ONE, torch.bfloat16, device, seed=0)
    learner = Learner(LearnerConfig(budget=Budget(tokens), draft=DraftConfig(0), sharing=sharing), stages,
                      MasterAdamW(stages.named_parameters(), OptimConfig(eps=1e-15), ONE))
    if rounds == 0:
        learner.step(samples[:1], 1e-6, 0)  # optimizer states
        return {"bytes": peak_bytes(device, lambda: learner.step(samples, 1e-6, 0))}
    keep_freed_memory()
    learner.step(samples if sharing == "tree" else samples[: max(1, len(samples) // 16)], 1e-6, 0)
    ops = time_ops(device)
    steps = []
    for _ in range(rounds):
        ops.update(dict.fromkeys(ops, 0.0))
        start = _clock(device)
        metrics = learner.step(samples, 1e-6, 0).metrics
        seconds = _clock(device) - start
        steps.append({"seconds": seconds, **ops, "optimizer": metrics["time/optimizer_s"], "prepare": metrics["time/prepare_s"],
                      "tokens": metrics["tree/tokens"], "unique": metrics["tree/unique_tokens"],
                      "computed": metrics["tree/computed_tokens"], "pair_ratio": metrics["tree/pair_ratio"]})
    return sorted(steps, key=lambda s: s["seconds"])[len(steps) // 2]


# ---- side by side ------------------------------------------------------------------------------------------------------------------


def in_process(workload: str, sharing: str, tokens: int, rounds: int, device: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, __file__, "--one", json.dumps([workload, sharing, tokens, rounds, device])], check=True,
                          stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def any_chain(workload: str) -> bool:
    batch = check(WORKLOADS[workload][1](np.random.default_rng(0)), read_config(["model=bench_tree"]).model)
    chains, alone = (len(merge_samples(batch, sharing=sharing)[0].forest) for sharing in ("chains", "none"))
    return chains < alone


def ceiling(alone: dict[str, float], tree: dict[str, float]) -> float:
    """Of the speed-up over every sample alone, by that step's own parts."""
    fixed = alone["head"] + alone["optimizer"]
    linear = alone["seconds"] - fixed - alone["attention"]
    shrunk = linear * tree["unique"] / tree["tokens"] + alone["attention"] / tree["pair_ratio"] + fixed
    return alone["seconds"] / shrunk


def compare(workload: str, rounds: int, device: str) -> dict[str, Any]:
    """One workload's figures."""
    tree = in_process(workload, "tree", TOKENS, rounds, device)
    alone = in_process(workload, "none", TOKENS, 1, device)
    linear = "chains" if any_chain(workload) else "none"  # where no sample goes on from another's end the two are one
    chains = in_process(workload, "chains", TOKENS, 1, device) if linear == "chains" else alone
    again = in_process(workload, "tree", TOKENS, rounds, device)  # before and after the others: the machine may drift
    seconds = statistics.mean([tree["seconds"], again["seconds"]])
    most, speed_up = ceiling(alone, tree), alone["seconds"] / seconds
    whole = int(max(TOKENS, alone["tokens"]))
    memory = {sharing: in_process(workload, sharing, TOKENS, 0, device)["bytes"] for sharing in dict.fromkeys(("tree", "none", linear))}
    memory["chains"] = memory[linear]
    memory["tree, one microbatch"] = in_process(workload, "tree", whole, 0, device)["bytes"]
    return {"workload": workload, "what": WORKLOADS[workload][0], "tokens": int(alone["tokens"]), "unique_tokens": int(tree["unique"]),
            "token_ratio": alone["tokens"] / tree["unique"], "pair_ratio": tree["pair_ratio"], "tree_s": seconds,
            "alone_s": alone["seconds"], "chains_s": chains["seconds"], "speed_up": speed_up, "ceiling": most,
            "share_of_ceiling": speed_up / most, "speed_up_over_chains": chains["seconds"] / seconds,
            "computed_tokens": int(tree["computed"]), "chains_tokens": int(chains["computed"]),
            **{f"bytes_{name.replace(', ', '_').replace(' ', '_')}": value for name, value in memory.items()}, "parts_alone": alone,
            "parts_tree": tree}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", default="abcd")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    add_card_arguments(parser)
    a = parser.parse_args()
    if a.one:
        print(json.dumps(one_step(*json.loads(a.one))))
        return
    device = device_name(torch.device(a.device))
    print(f"{device}, torch {torch.__version__}")
    print(f"{'':2s}{'T/U':>7s}{'pairs':>7s}{'tree s':>9s}{'alone s':>9s}{'chains s':>9s}{'speed-up':>10s}{'ceiling':>9s}{'share':>7s}"
          f"{'/chains':>9s}{'MB tree':>9s}{'alone':>7s}{'chains':>8s}")
    results = []
    for workload in a.workloads:
        r = compare(workload, a.rounds, a.device)
        results.append(r)
        print(f"{workload:2s}{r['token_ratio']:7.1f}{r['pair_ratio']:7.1f}{r['tree_s']:9.2f}{r['alone_s']:9.1f}{r['chains_s']:9.1f}"
              f"{r['speed_up']:10.1f}{r['ceiling']:9.1f}{100 * r['share_of_ceiling']:6.0f}%{r['speed_up_over_chains']:9.2f}"
              f"{r['bytes_tree'] / 1e6:9.0f}{r['bytes_none'] / 1e6:7.0f}{r['bytes_chains'] / 1e6:8.0f}", flush=True)
    if a.cards:
        write_card(a.cards, "prefix_tree", device, a.commit, [{k: v for k, v in r.items() if not k.startswith("parts")} for r in results])
    for r in results:
        print(json.dumps({"bench": "prefix_tree", "metric": f"step on {r['what']}", "value": round(r["tree_s"], 3),
                          "baseline": round(r["alone_s"], 2), "ratio": round(r["speed_up"], 2), "unit": "s", "device": device,
                          "ceiling": round(r["ceiling"], 2), "share_of_ceiling": round(r["share_of_ceiling"], 3),
                          "over_chains": round(r["speed_up_over_chains"], 3), "details": r}))


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Tokens/s of one forward + backward of the model, beside transformers' MiniMaxM2 at the same shapes, dtype and batch, in one run.

    python tools/bench/train_step.py [--peer-python PYTHON] [--batch 4 --seq 1024 --steps 5 --rounds 3]

The peer runs in its own process (with another interpreter if asked), in turn with ours, round by round, so that a drift of the
machine's speed hits both; medians are reported. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the package of this checkout, installed or not

from tools.bench.common import add_card_arguments, device_name, write_card

ROOT = Path(__file__).resolve().parents[2]

PEER = """
import json, statistics, sys, time, torch
from transformers import MiniMaxM2Config, MiniMaxM2ForCausalLM
a = json.loads(sys.argv[1])
torch.manual_seed(0)
c = MiniMaxM2Config(vocab_size=a["vocab_size"], hidden_size=a["hidden_size"], intermediate_size=a["intermediate_size"],
                    num_hidden_layers=a["num_hidden_layers"], num_attention_heads=a["num_attention_heads"],
                    num_key_value_heads=a["num_key_value_heads"], head_dim=a["head_dim"], rotary_dim=a["rotary_dim"],
                    num_local_experts=a["num_experts"], num_experts_per_tok=a["top_k"], bos_token_id=0, eos_token_id=1,
                    max_position_embeddings=a["max_position_embeddings"])
c._experts_implementation = "grouped_mm"
m = MiniMaxM2ForCausalLM(c).to(torch.bfloat16)
x = torch.randint(0, a["vocab_size"], (a["batch"], a["seq"]))
def step():
    t = time.perf_counter(); m(input_ids=x, labels=x).loss.backward(); m.zero_grad(); return time.perf_counter() - t
step()
print(json.dumps([step() for _ in range(a["steps"])]))
"""

OURS = """
import json, sys, time, torch
from megatron_m2.forest import TokenForest
from megatron_m2.model.config import ModelConfig
from megatron_m2.model.m2 import build_model
from megatron_m2.training.memory import keep_freed_memory
a = json.loads(sys.argv[1])
batch, seq, steps = a.pop("batch"), a.pop("seq"), a.pop("steps")
keep_freed_memory()
torch.manual_seed(0)
m = build_model(ModelConfig(**a), torch.bfloat16, seed=0)
x = torch.randint(0, a["vocab_size"], (batch, seq))
f = TokenForest.from_documents(list(x.numpy()))
def step():
    t = time.perf_counter()
    (-(f.weight * m(f).logprobs).sum() / f.weight.sum()).backward(); m.zero_grad(); return time.perf_counter() - t
step()
print(json.dumps([step() for _ in range(steps)]))
"""


def measure(python: str, program: str, arguments: dict[str, object]) -> list[float]:
    """Seconds of each step of a program in its own process."""
    done = subprocess.run([python, "-c", program, json.dumps(arguments)], cwd=ROOT, check=True, capture_output=True, text=True)
    times: list[float] = json.loads(done.stdout.splitlines()[-1])
    return times


def matmul_flops_per_s() -> float:
    """Rate of a square bf16 torch.mm of 2048, the ceiling that the step is held against."""
    a = torch.randn(2048, 2048).bfloat16()
    times = []
    for _ in range(12):
        start = time.perf_counter()
        torch.mm(a, a)
        times.append(time.perf_counter() - start)
    return 2 * 2048**3 / statistics.median(times[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has transformers >= 5.19")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    add_card_arguments(parser)
    a = parser.parse_args()

    from megatron_m2.forest import TokenForest
    from megatron_m2.model.config import ModelConfig
    from megatron_m2.training.compose import read_config
    from megatron_m2.training.metrics import forest_forward_flops

    config: ModelConfig = read_config(["model=bench_48m"]).model
    shape = config.to_dict()
    run = {**shape, "batch": a.batch, "seq": a.seq, "steps": a.steps}
    ours, peer, rate = [], [], []
    for _ in range(a.rounds):
        ours += measure(sys.executable, OURS, run)
        peer += measure(a.peer_python, PEER, run)
        rate.append(matmul_flops_per_s())
    tokens = a.batch * a.seq
    flops = 3 * forest_forward_flops(config, TokenForest.from_documents([range(a.seq)] * a.batch))
    mine, theirs = tokens / statistics.median(ours), tokens / statistics.median(peer)
    share = flops / statistics.median(ours) / statistics.median(rate)
    peer_share = flops / statistics.median(peer) / statistics.median(rate)
    print(f"{config.num_parameters() / 1e6:.1f}M weights, {a.batch} x {a.seq} tokens, bf16, forward + backward, "
          f"model FLOPs over torch.mm 2048^3 ({statistics.median(rate) / 1e9:.0f} GFLOP/s)")
    print(f"{'':14s}{'tokens/s':>10s}{'% of torch.mm':>15s}")
    print(f"{'megatron_m2':14s}{mine:10.0f}{100 * share:15.1f}")
    print(f"{'transformers':14s}{theirs:10.0f}{100 * peer_share:15.1f}")
    device = device_name(torch.device("cpu"))
    if a.cards:
        what = f"forward + backward, {config.num_parameters() / 1e6:.1f}M weights, {a.batch} x {a.seq} tokens, bf16"
        write_card(a.cards, "train_step", device, a.commit, [
            {"measured": what, "value": round(mine), "baseline": round(theirs), "ratio": round(mine / theirs, 3), "unit": "tokens/s",
             "baseline_is": "transformers' MiniMaxM2ForCausalLM, grouped_mm experts", "target": ">= 1.8x, and >= 0.55 of torch.mm"},
            {"measured": "model FLOPs over the rate of torch.mm 2048^3 bf16", "value": round(share, 3), "baseline": round(peer_share, 3),
             "ratio": round(share / peer_share, 3), "unit": "share"}])
    print(json.dumps({"bench": "train_step", "metric": "tokens_per_s", "value": round(mine, 1), "baseline": round(theirs, 1),
                      "ratio": round(mine / theirs, 3), "unit": "tokens/s", "device": device, "share_of_matmul": round(share, 4)}))


if __name__ == "__main__":
    main()

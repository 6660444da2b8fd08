"""Trains a model of 58M weights for two steps in a process of its own; prints what it took from the system at most, and the planner's
estimate of it, in bytes."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import torch

from megatron_m2.model.config import ModelConfig
from megatron_m2.parallel.layout import ParallelConfig
from megatron_m2.planning.job import Layout
from megatron_m2.planning.memory import stage_memory
from tests.planning.measure import Trained, job_of

MODEL = ModelConfig(vocab_size=4096, hidden_size=512, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2, head_dim=64,
                    rotary_dim=32, num_experts=32, top_k=4, intermediate_size=256, num_mtp_modules=0, max_position_embeddings=4096)


def most_resident() -> int:
    """The largest resident set of this process so far. (``getrusage`` counts that of the process which started it, too.)"""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def main() -> None:
    torch.set_num_threads(1)
    job, layout = job_of(MODEL, 1, 512, 2048), Layout(ParallelConfig(), 1024)
    small = replace(MODEL, hidden_size=64, num_experts=4, vocab_size=64)
    Trained(job_of(small, 1, 64, 128), Layout(ParallelConfig(), 64)).step()  # loads every library
    before = most_resident()
    Trained(job, layout).step()
    print(most_resident() - before, stage_memory(job, layout, 0).total)


if __name__ == "__main__":
    main()

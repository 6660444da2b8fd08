#!/usr/bin/env python3
"""Greedy tokens and their log-probabilities from vLLM on a CPU. Runs in vLLM's own environment; see check_vllm.py.

    python tools/vllm_generate.py REQUEST.json RESPONSE.json

Request: ``{"checkpoint": folder, "prompts": [[token id]], "max_new_tokens": n}``. Response: ``[{"tokens": [id], "logprobs": [float]}]``.
What vLLM 0.32 reads of config.json beyond the usual shape: ``scoring_func`` and ``rotary_dim`` (both without a default),
``use_routing_bias`` (default false: then the bias in the file has no place and loading fails), ``rope_parameters`` (its
``partial_rotary_factor`` wins over ``rotary_dim``) and ``num_mtp_modules`` (which keys to skip).
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
               "VLLM_LOGGING_LEVEL": "ERROR"}


def teach_cpu_router_sigmoid() -> None:
    """vLLM's CPU router has no sigmoid top-k with a selection bias; its grouped top-k with a single group computes just that."""
    from vllm.model_executor.layers.fused_moe.router import cpu_router

    original = cpu_router.CPURouter._compute_routing

    def compute_routing(self: Any, hidden_states: Any, router_logits: Any, indices_type: Any, **rest: Any) -> Any:
        if self.scoring_func != "sigmoid" or self.use_grouped_topk:
            return original(self, hidden_states, router_logits, indices_type, **rest)
        return cpu_router._grouped_topk(
            gating_output=router_logits, topk=self.top_k, renormalize=self.renormalize, num_expert_group=1, topk_group=1,
            scoring_func="sigmoid", routed_scaling_factor=self.routed_scaling_factor, e_score_correction_bias=self.e_score_correction_bias)

    cpu_router.CPURouter._compute_routing = compute_routing


def generate(checkpoint: str, prompts: list[list[int]], max_new_tokens: int) -> list[dict[str, Any]]:
    """Greedy continuations in bf16, never stopped early."""
    from vllm import LLM, SamplingParams

    teach_cpu_router_sigmoid()
    longest = max(len(prompt) for prompt in prompts) + max_new_tokens + 1
    llm = LLM(checkpoint, skip_tokenizer_init=True, dtype="bfloat16", max_model_len=longest, max_num_seqs=len(prompts), enforce_eager=True)
    sampling = SamplingParams(temperature=0.0, max_tokens=max_new_tokens, ignore_eos=True, detokenize=False, logprobs=0)
    answers = []
    for result in llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False):
        tokens, steps = list(result.outputs[0].token_ids), result.outputs[0].logprobs
        answers.append({"tokens": tokens, "logprobs": [step[token].logprob for token, step in zip(tokens, steps, strict=True)]})
    return answers


def main() -> None:
    os.environ.update({name: value for name, value in ENVIRONMENT.items() if name not in os.environ})
    request, response = (Path(argument) for argument in sys.argv[1:])
    response.write_text(json.dumps(generate(**json.loads(request.read_text()))))


if __name__ == "__main__":
    main()

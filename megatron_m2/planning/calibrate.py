"""The estimator beside runs that others have published: how far off it is, and in which direction.

Their models are put in this repository's terms. Where one does not fit, a stand-in of the same weights and products takes its place:
latent attention becomes grouped-query attention of as many weights, shared experts become more experts per token, dense layers MoE ones.
What the published system overlaps is taken as hidden entirely.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_m2.model.config import ModelConfig
from megatron_m2.parallel.layout import ParallelConfig
from megatron_m2.planning.cluster import ClusterConfig, Device
from megatron_m2.planning.job import Job, Layout, Options, legal
from megatron_m2.planning.step_time import StepTime, step_time

_ALONE = Options(lean_experts=True)
_OVERLAPPED = Options(lean_experts=True, hide_ep=1.0, hide_dp=1.0)
_BY_NODE = Options(lean_experts=True, node_dedup=True)
_DUALPIPE = Options(lean_experts=True, node_dedup=True, dispatch_fp8=True, hide_ep=1.0, hide_dp=1.0, hide_pp=1.0)

_QWEN3_30B = ModelConfig(vocab_size=151_936, hidden_size=2048, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4,
                         num_experts=128, top_k=8, intermediate_size=768)
_QWEN3_235B = ModelConfig(vocab_size=151_936, hidden_size=4096, num_hidden_layers=94, num_attention_heads=64, num_key_value_heads=4,
                          num_experts=128, top_k=8, intermediate_size=1536)
_DEEPSEEK_V3 = ModelConfig(vocab_size=129_280, hidden_size=7168, num_hidden_layers=61, num_attention_heads=96, num_key_value_heads=6,
                           num_experts=256, top_k=9, intermediate_size=2048, num_mtp_modules=1)
_MOONLIGHT = ModelConfig(vocab_size=163_840, hidden_size=2048, num_hidden_layers=27, num_attention_heads=24, num_key_value_heads=2,
                         num_experts=64, top_k=8, intermediate_size=1408)


@dataclass(frozen=True)
class PublishedRun:
    """A run and its speed.

    Attributes:
        device: a key of the rates. tokens_per_s: of one GPU, as published. routing: "forced" balance or "natural".
        source: where it is from; differs: what this estimate leaves out.
    """

    name: str
    device: str
    job: Job
    layout: Layout
    tokens_per_s: float
    routing: str
    source: str
    differs: str = ""


def _run(name: str, device: str, gpus: int, model: ModelConfig, parallel: ParallelConfig, sequences: int, options: Options,
         tokens_per_s: float, routing: str, source: str, differs: str = "") -> PublishedRun:
    """Of so many sequences of 4,096 tokens a step, one in a microbatch."""
    job = Job(model, ClusterConfig(gpus // 8, 8, device), 4096, sequences * 4096, options)
    return PublishedRun(name, device, job, Layout(parallel, 4096), tokens_per_s, routing, source, differs)


RUNS = (
    _run("Qwen3-30B-A3B, 16 H100, bf16", "h100", 16, _QWEN3_30B, ParallelConfig(ep=16), 1024, _OVERLAPPED, 13_011, "forced",
         "NVIDIA-NeMo/Megatron-Bridge 26.08 verification card"),
    _run("Moonlight-16B-A3B, 16 H100, bf16", "h100", 16, _MOONLIGHT, ParallelConfig(ep=8), 1024, _OVERLAPPED, 22_528, "natural",
         "NVIDIA-NeMo/Megatron-Bridge verification card", "latent attention, two shared experts"),
    _run("Qwen3-235B-A22B, 256 H100, bf16", "h100", 256, _QWEN3_235B,
         ParallelConfig(tp=2, pp=8, ep=32, vpp=4, schedule="interleaved"), 8192, _OVERLAPPED, 2_040, "forced",
         "NVIDIA/Megatron-LM PR 5728: 302 TFLOP/s at 148 GFLOP a token", "part of each layer recomputed"),
    _run("Qwen3-235B-A22B, 256 H800, bf16", "h800", 256, _QWEN3_235B, ParallelConfig(pp=32, ep=8), 2048, _ALONE, 1_541, "forced",
         "alibaba/Pai-Megatron-Patch 658, a user's", "vpp 3; its batch is not given"),
    _run("DeepSeek-V3, 1024 H100, bf16", "h100", 1024, _DEEPSEEK_V3,
         ParallelConfig(tp=2, pp=8, ep=64, vpp=4, schedule="interleaved"), 16_384, _BY_NODE, 1_061, "forced",
         "NVIDIA-NeMo/Megatron-Bridge card 2026-08", "latent attention, one shared expert, part recomputed"),
    _run("DeepSeek-V3, 2048 H800, FP8", "h800", 2048, replace(_DEEPSEEK_V3, fp8_experts=True, fp8_dense=True),
         ParallelConfig(pp=16, ep=64, vpp=2, schedule="zbv"), 15_360, _DUALPIPE, 1_543, "natural",
         "arXiv:2412.19437: 2.664M GPU hours for 14.8T tokens", "latent attention, a shared expert, at most four nodes a token, DualPipe"),
)


@dataclass(frozen=True)
class Comparison:
    """A published run, and what this estimator says of it."""

    run: PublishedRun
    time: StepTime

    @property
    def tokens_per_s(self) -> float:
        return self.time.tokens_per_s / self.time.ranks

    @property
    def ratio(self) -> float:
        """Estimated over published speed."""
        return self.tokens_per_s / self.run.tokens_per_s


def compare(devices: dict[str, Device]) -> list[Comparison]:
    """All published runs, on the rates given."""
    found = []
    for run in RUNS:
        legal(run.job, run.layout)
        found.append(Comparison(run, step_time(run.job, run.layout, devices[run.device])))
    return found

"""Linear + cross-entropy beside eager PyTorch: time, and the most memory either takes beyond its operands."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_m2.ops.linear_cross_entropy import linear_logprobs
from tools.bench.common import Figure, device_name, medians_us

TOKENS, HIDDEN, VOCAB = 4096, 1024, 50_000


def eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return -F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="none")


def fused(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return linear_logprobs(hidden, weight, targets)


def inputs(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(TOKENS, HIDDEN, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(VOCAB, HIDDEN, device=device, dtype=torch.bfloat16).mul_(0.02).requires_grad_()
    return hidden, weight, torch.randint(0, VOCAB, (TOKENS,), device=device)


def step(op: Callable[[Tensor, Tensor, Tensor], Tensor], hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    torch.autograd.grad(op(hidden, weight, targets).mean(), (hidden, weight))


def peak_bytes(name: str, device: torch.device) -> int:
    """Of one step beyond its operands, gradients included. On a CPU in a process of its own, whose highest water mark tells."""
    if device.type == "cuda":
        case = inputs(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(globals()[name], *case)
        return torch.cuda.max_memory_allocated() - before
    program = f"from tools.bench.op_linear_cross_entropy import print_peak; print_peak({name!r})"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, check=True, capture_output=True, text=True)
    return int(done.stdout.splitlines()[-1])


def print_peak(name: str) -> None:
    case = inputs(torch.device("cpu"))
    small = [x[:256].detach().requires_grad_(x.is_floating_point()) for x in case]
    step(globals()[name], small[0], small[1], small[2] % 256)  # what libraries allocate once is not counted
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that the process still holds would hide what the step takes
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the highest water mark starts anew
    before = _resident_bytes("VmRSS")
    step(globals()[name], *case)
    print(_resident_bytes("VmHWM") - before)


def _resident_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def bench(device: torch.device) -> list[Figure]:
    case = inputs(device)
    mine, theirs = medians_us([lambda _: step(fused, *case), lambda _: step(eager, *case)], 1, device, rounds=3)
    bytes_moved = 2 * 2 * (case[0].numel() + case[1].numel())
    name = f"forward+backward {TOKENS} x {HIDDEN} x {VOCAB}"
    my_peak, their_peak = peak_bytes("fused", device), peak_bytes("eager", device)
    on = device_name(device)
    return [Figure("linear_cross_entropy", name, mine, theirs, bytes_moved, on, ">= 1.0x"),
            Figure("linear_cross_entropy", "peak memory beyond the operands", my_peak, their_peak, 0, on, ">= 8x less", "B")]

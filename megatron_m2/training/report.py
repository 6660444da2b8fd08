"""What a finished run leaves for people: the loss plot, the comparison with xz, a sample of text."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_m2.data.tokenizer import Tokenizer
from megatron_m2.model.generate import generate
from megatron_m2.model.m2 import M2Model
from megatron_m2.training.metrics import read_metrics


def plot_losses(metrics: Path, target: Path) -> None:
    """Training loss and held-out bits per byte over tokens, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read_metrics(metrics)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    for name, label in (("loss/lm", "next token"), ("loss/mtp", "MTP")):
        left.plot([r["data/tokens"] / 1e6 for r in rows], [r[name] for r in rows], label=label, linewidth=1)
    left.set(xlabel="tokens (millions)", ylabel="training loss (nats per token)")
    evals = [r for r in rows if "eval/bits_per_byte" in r]
    names = sorted({k for r in evals for k in r if k.startswith("eval/") and k.endswith("bits_per_byte")})
    for name in names:
        right.plot([r["data/tokens"] / 1e6 for r in evals], [r[name] for r in evals], marker="o", markersize=3,
                   label=name.removeprefix("eval/").removesuffix("_bits_per_byte").replace("bits_per_byte", "all"))
    right.set(xlabel="tokens (millions)", ylabel="held-out bits per byte")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(target, dpi=110)
    plt.close(figure)


def sample_text(model: M2Model, tokenizer: Tokenizer, prompt: str, tokens: int, seed: int) -> str:
    """The prompt and its continuation at temperature 0.8."""
    ids = torch.tensor([tokenizer.encode(prompt, bos=True)], device=model.device)
    out = generate(model, ids, tokens, temperature=0.8, top_p=0.95, eos_id=tokenizer.eos_id, seed=seed)
    return tokenizer.decode(out[0].tolist())

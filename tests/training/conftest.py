"""A small prepared folder and the overrides of a run that trains on it in a second."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_m2.data.corpus import Document
from megatron_m2.data.prepare import PrepareConfig, prepare


def words(seed: int, count: int) -> str:
    """Text with something to learn: each word suggests the next."""
    rng = np.random.default_rng(seed)
    names = ["red", "fox", "jumps", "over", "lazy", "dogs", "and", "runs", "far", "away"]
    at, out = int(rng.integers(10)), []
    for _ in range(count):
        out.append(names[at])
        at = (at + (1 if rng.random() < 0.8 else int(rng.integers(10)))) % 10
    return " ".join(out)


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "small"
    documents = [Document("prose", words(i, 40 + i % 90)) for i in range(120)]
    documents += [Document("code", f"def f{i}(x):\n    return x + {i * i}\n" * (3 + i % 5)) for i in range(60)]
    prepare(folder, documents, PrepareConfig(("test",), vocab_size=320, held_out=0.1))
    return folder


def overrides(data: Path, run: Path, **changes: object) -> list[str]:
    values = {"data.path": data, "run.dir": run, "data.seq_len": 64, "data.tokens_per_forest": 256, "model.vocab_size": 320,
              "model.router_aux_loss_coef": 1e-4, "stage.steps": 24, "stage.warmup_steps": 4, "stage.decay_steps": 10,
              "stage.forests_per_step": 2, "optim.lr": 3e-3, "run.save_every": 2, "run.log_every": 1, "run.eval_every": 7,
              "run.sample_tokens": 0, "run.export": "false", "run.wandb": "disabled", "run.device": "cpu", **changes}
    return ["model=tiny", *(f"{k}={v}" for k, v in values.items())]

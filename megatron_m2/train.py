"""Entry point of training: ``python -m megatron_m2.train [group=option] [group.key=value] ...``, on many ranks ``scripts/train.sh``.

Overrides are Hydra's; ``--cfg`` prints the resolved configuration and ends, ``--check WORLD`` ends in silence if so many ranks could
run it. The run's folder holds all its state: the same command resumes a run that was killed, and does nothing but report when it is
complete.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from megatron_m2.parallel.launch import end, is_first, join, local_rank, world_size
from megatron_m2.parallel.watchdog import leave, watched
from megatron_m2.training import checkpoint
from megatron_m2.training.compose import read_config
from megatron_m2.training.config import TrainConfig
from megatron_m2.training.memory import keep_freed_memory
from megatron_m2.training.metrics import read_metrics
from megatron_m2.training.report import plot_losses, sample_text
from megatron_m2.training.trainer import Trainer, fit, open_data, pick_device

TERMINATED = 143  # what a shell reports of a process that SIGTERM ended

_log = logging.getLogger("megatron_m2")


def finish(trainer: Trainer) -> None:
    """Plot, sample and export of a complete run, and the lines that say where everything is."""
    run = trainer.config.run
    folder = Path(run.dir)
    evaluation = read_metrics(folder / "metrics.jsonl")[-1]  # of the last step, which always evaluates
    tokenizer_dir = Path(trainer.config.data.path)
    plot_losses(folder / "metrics.jsonl", folder / "loss.png")
    if run.sample_tokens:  # by the whole model: for one that fits into this process
        model = checkpoint.load_model(trainer.folder, device=trainer.device)
        print("\n--- sample " + "-" * 60)
        print(sample_text(model, trainer.dataset.tokenizer(), run.sample_prompt, run.sample_tokens, run.seed))
        print("-" * 71)
    lines = {"checkpoint": trainer.folder, "metrics": folder / "metrics.jsonl", "plot": folder / "loss.png"}
    if run.export:
        checkpoint.export_hf(trainer.folder, folder / "hf", tokenizer_dir)
        lines["HF export"] = folder / "hf"
    print()
    for name, path in lines.items():
        print(f"{name:12s}{path}")
    print(f"\nheld-out bits per byte  {evaluation['eval/bits_per_byte']:.4f}"
          f"   (xz -9 on the same bytes: {trainer.dataset.xz_bits_per_byte():.4f})")
    print(f"expert load max/mean    {evaluation['eval/max_over_mean_load']:.3f}   (worst layer, held-out text)")


def run(config: TrainConfig) -> int:
    """Trains, or goes on with, the run of ``config``; returns the exit status."""
    with watched(config.parallel.timeout_s, explain) as progress:
        device = pick_device(config.run.device, local_rank())
        with join(config.parallel, device, config.model.num_key_value_heads) as mesh:
            trainer = Trainer(config, mesh)
            progress.last_step = lambda: trainer.step
            return run_rank(trainer)


def run_rank(trainer: Trainer) -> int:
    """One rank's part of it; the first rank writes what people read."""
    config, first = trainer.config, trainer.mesh.world.rank == 0
    resumed = trainer.resume()
    resolved = config.to_dict()
    if first:
        write_config(Path(config.run.dir) / "config.yaml", resolved)
    model = config.model
    _log.info("%s: %s weights (%s active per token in the layers), %s on %s, %s step %d of %d", config.run.dir,
              f"{model.num_parameters():,}", f"{model.num_active_parameters():,}", config.run.dtype, trainer.device,
              "resuming at" if resumed else "starting at", trainer.step, config.stage.steps)
    if not fit(trainer, resolved):
        return TERMINATED
    if first:
        finish(trainer)
    return 0


def write_config(path: Path, resolved: dict[str, Any]) -> None:
    """The resolved configuration, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writing = path.with_suffix(".writing")
    writing.write_text(OmegaConf.to_yaml(OmegaConf.create(resolved)))
    os.replace(writing, path)


def explain(error: Exception) -> tuple[str, int] | None:
    """What to tell the user of an error and the exit status: 2 the user got something wrong, 1 training failed; None for a bug."""
    if isinstance(error, ValueError):
        return str(error), 2
    if isinstance(error, FloatingPointError):
        return f"training diverged: {error}; the last checkpoint stands", 1
    return None


def main(arguments: list[str]) -> int:
    """Returns the process's exit status: 0 done, 143 stopped by a signal, else see :func:`explain`."""
    keep_freed_memory()
    logging.basicConfig(level=logging.INFO if is_first() else logging.ERROR, format="%(message)s", stream=sys.stderr)
    parser = argparse.ArgumentParser(prog="python -m megatron_m2.train", allow_abbrev=False, usage="%(prog)s [OVERRIDE ...]")
    parser.add_argument("--cfg", action="store_true")
    parser.add_argument("--check", type=int)
    options, overrides = parser.parse_known_args(arguments)
    try:
        config = read_config(overrides)
        if options.cfg:
            print(OmegaConf.to_yaml(OmegaConf.create(config.to_dict())), end="")
            return 0
        config.check_layout(options.check or world_size())
        if options.check:
            pick_device(config.run.device, local_rank())
            open_data(config)
            return 0
        return run(config)
    except Exception as error:
        explained = explain(error)
        if explained is None:
            raise
        if is_first():
            print(f"error: {explained[0]}", file=sys.stderr)
        return explained[1]


if __name__ == "__main__":
    status = leave(main(sys.argv[1:]))
    if world_size() > 1:
        end(status)
    sys.exit(status)

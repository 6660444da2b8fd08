"""Entry point of training: ``python -m megatron_m2.train [group=option] [group.key=value] ...``

Overrides are Hydra's; ``--cfg`` prints the resolved configuration and ends. The run's folder holds all its state: the same command
resumes a run that was killed, and does nothing but report when it is complete.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from omegaconf import OmegaConf

from megatron_m2.model.hf import save_hf
from megatron_m2.model.m2 import M2Model
from megatron_m2.parallel.launch import is_first, join, local_rank, world_size
from megatron_m2.training import checkpoint
from megatron_m2.training.compose import read_config
from megatron_m2.training.config import TrainConfig
from megatron_m2.training.memory import keep_freed_memory
from megatron_m2.training.metrics import read_metrics
from megatron_m2.training.report import plot_losses, sample_text
from megatron_m2.training.trainer import Trainer, fit, pick_device

TERMINATED = 143  # what a shell reports of a process that SIGTERM ended

_log = logging.getLogger("megatron_m2")


def whole_model(trainer: Trainer) -> M2Model:
    """The trained model in one piece; where ranks have parts of it, from the last checkpoint."""
    if trainer.mesh.alone:
        (model,) = trainer.stages.stages.values()
        return model
    return checkpoint.load_model(trainer.folder)


def finish(trainer: Trainer) -> None:
    """Plot, sample and export of a complete run, and the lines that say where everything is."""
    run = trainer.config.run
    model = whole_model(trainer) if run.sample_tokens or run.export else None
    folder = Path(run.dir)
    evaluation = read_metrics(folder / "metrics.jsonl")[-1]  # of the last step, which always evaluates
    tokenizer_dir = Path(trainer.config.data.path)
    plot_losses(folder / "metrics.jsonl", folder / "loss.png")
    if run.sample_tokens and model is not None:
        print("\n--- sample " + "-" * 60)
        print(sample_text(model, trainer.dataset.tokenizer(), run.sample_prompt, run.sample_tokens, run.seed))
        print("-" * 71)
    lines = {"checkpoint": trainer.folder, "metrics": folder / "metrics.jsonl", "plot": folder / "loss.png"}
    if run.export and model is not None:
        save_hf(model, folder / "hf", tokenizer_dir=tokenizer_dir)
        lines["HF export"] = folder / "hf"
    print()
    for name, path in lines.items():
        print(f"{name:12s}{path}")
    print(f"\nheld-out bits per byte  {evaluation['eval/bits_per_byte']:.4f}"
          f"   (xz -9 on the same bytes: {trainer.dataset.xz_bits_per_byte():.4f})")
    print(f"expert load max/mean    {evaluation['eval/max_over_mean_load']:.3f}   (worst layer, held-out text)")


def run(config: TrainConfig) -> int:
    """Trains, or goes on with, the run of ``config``; returns the exit status."""
    device = pick_device(config.run.device, local_rank())
    with join(config.parallel, device, config.model.num_key_value_heads) as mesh:
        return run_rank(Trainer(config, mesh))


def run_rank(trainer: Trainer) -> int:
    """One rank's part of it; the first rank writes what people read."""
    config, first = trainer.config, trainer.mesh.world.rank == 0
    resumed = trainer.resume()
    resolved = config.to_dict()
    if first:
        Path(config.run.dir).mkdir(parents=True, exist_ok=True)
        (Path(config.run.dir) / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(resolved)))
    model = config.model
    _log.info("%s: %s weights (%s active per token in the layers), %s on %s, %s step %d of %d", config.run.dir,
              f"{model.num_parameters():,}", f"{model.num_active_parameters():,}", config.run.dtype, trainer.device,
              "resuming at" if resumed else "starting at", trainer.step, config.stage.steps)
    if not fit(trainer, resolved):
        return TERMINATED
    if first:
        finish(trainer)
    return 0


def main(arguments: list[str]) -> int:
    """Returns the process's exit status: 0 done, 2 the user got something wrong, 1 training failed, 143 stopped by a signal."""
    keep_freed_memory()
    logging.basicConfig(level=logging.INFO if is_first() else logging.ERROR, format="%(message)s", stream=sys.stderr)
    try:
        config = read_config([a for a in arguments if a != "--cfg"])
        if "--cfg" in arguments:
            print(OmegaConf.to_yaml(OmegaConf.create(config.to_dict())), end="")
            return 0
        config.check_layout(world_size())
        return run(config)
    except ValueError as error:
        if is_first():
            print(f"error: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"error: training diverged: {error}; the last checkpoint stands", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

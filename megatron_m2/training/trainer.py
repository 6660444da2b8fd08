"""The training loop, on one rank or many; what it needs beside the configuration is in the run's folder, so the same command resumes."""

from __future__ import annotations

import itertools
import logging
import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_m2.data.dataset import Dataset
from megatron_m2.data.stream import ForestStream
from megatron_m2.forest import TokenForest
from megatron_m2.ops.router import update_router_bias
from megatron_m2.parallel.collectives import highest, total
from megatron_m2.parallel.launch import local_rank
from megatron_m2.parallel.mesh import ONE, Mesh
from megatron_m2.training import checkpoint, schedule
from megatron_m2.training.config import DTYPES, TrainConfig
from megatron_m2.training.evaluate import evaluate
from megatron_m2.training.losses import ForestObjective, LossWeights
from megatron_m2.training.metrics import GpuMeter, MetricsLog, SilentLog, expert_load, forest_forward_flops
from megatron_m2.training.optimizer import MasterAdamW
from megatron_m2.training.stages import ModelStages

_log = logging.getLogger(__name__)


class Trainer:
    """Model, optimizer and data of one run, at some step. On a mesh every rank has one and calls the same methods.

    Raises:
        ValueError: the data or a checkpoint does not fit the configuration.
    """

    def __init__(self, config: TrainConfig, mesh: Mesh = ONE) -> None:
        self.config, self.mesh = config, mesh
        self.device = pick_device(config.run.device, local_rank())
        self.dataset, self.stream = open_data(config, mesh)
        torch.manual_seed(config.run.seed)  # its state is part of every checkpoint
        self.stages = ModelStages(config.model, config.parallel, mesh, DTYPES[config.run.dtype], self.device, config.run.seed,
                                  depth=config.data.seq_len // 2)
        self.optimizer = MasterAdamW(self.stages.named_parameters(), config.optim, mesh, config.sharding)
        self.step = 0
        self.tokens = 0
        self.folder = Path(config.run.dir) / "checkpoints"
        self.saver = checkpoint.Saver(self.folder, config.run.keep_checkpoints, mesh)
        self.last_counts = torch.zeros(0, dtype=torch.int64)

    # ---- one step -------------------------------------------------------------------------------------------------------------

    def train_step(self) -> dict[str, float]:
        """Forward and backward over the step's forests, one update of weights and router biases.

        Returns:
            Metrics by name; those under ``throughput/`` and ``time/`` depend on the machine, all others repeat bit for bit.

        Raises:
            FloatingPointError: loss or gradient is not finite; nothing was updated.
        """
        started = time.perf_counter()
        stage, mesh = self.config.stage, self.mesh
        forests = [next(self.stream).to(self.device, non_blocking=True) for _ in range(stage.forests_per_step // mesh.dp.size)]
        weights = LossWeights.of(forests, self.config.model.num_mtp_modules, partial(total, axis=mesh.dp))
        mtp_weight = schedule.mtp_weight(self.step, stage)
        objective = ForestObjective(forests, weights, mtp_weight, stage.forests_per_step)
        counts = self.stages.train(forests, objective, self.optimizer.before_backward)
        lr = schedule.learning_rate(self.step, self.config.optim, stage)
        grad_norm = self.optimizer.step(lr)
        self.last_counts = counts = total(counts, mesh.world)
        rate = schedule.router_bias_rate(self.step, stage)
        if rate > 0:
            for row, router in self.stages.routers():
                update_router_bias(router.bias, counts[row], rate)
        self.step += 1
        sums, bias = self._sums(objective.sums, forests), self._largest_bias()
        self.tokens += int(sums["tokens"])
        seconds = time.perf_counter() - started
        return {"loss/lm": sums["lm"], "loss/mtp": sums["mtp"], "loss/aux": sums["aux"], "loss/mtp_weight": mtp_weight, "optim/lr": lr,
                "optim/grad_norm": grad_norm, "data/tokens": float(self.tokens), **expert_load(counts), "moe/bias_abs_max": bias,
                "throughput/tokens_per_s": sums["tokens"] / seconds,
                "throughput/model_tflops_per_s": sums["flops"] / seconds / 1e12, "time/step_s": seconds}

    def _sums(self, losses: torch.Tensor, forests: Sequence[TokenForest]) -> dict[str, float]:
        """Losses, tokens and model FLOPs of the step, over all ranks."""
        counted = self.mesh.pp.rank == self.mesh.sequence.rank == 0  # one rank for each forest
        flops = sum(3 * forest_forward_flops(self.config.model, f) for f in forests)
        mine = torch.tensor([sum(len(f) for f in forests), flops], dtype=torch.float64) * counted
        sums = total(torch.cat([losses, mine]).to(self.device), self.mesh.world)
        return dict(zip(("lm", "mtp", "aux", "tokens", "flops"), sums.tolist(), strict=True))

    def _largest_bias(self) -> float:
        mine = [router.bias.abs().max().double() for _, router in self.stages.routers()]
        return float(highest(torch.stack(mine).max() if mine else torch.zeros((), dtype=torch.float64, device=self.device), self.mesh.pp))

    def any_rank(self, signals: Sequence[int]) -> int:
        """The number of a signal that some rank got, the same on all; 0 for none."""
        mine = torch.tensor(float(signals[0] if signals else 0), device=self.device)
        return int(highest(mine, self.mesh.world))

    # ---- evaluation -----------------------------------------------------------------------------------------------------------

    def evaluate(self, max_tokens: int = 0) -> dict[str, float]:
        """Held-out loss of every dataset of the blend and in bits per byte of all together, on whole documents.

        Args:
            max_tokens: per dataset, about (0: all). Bytes are those of the documents taken.
        """
        values: dict[str, float] = {}
        nats, num_bytes, num_tokens = 0.0, 0, 0
        data = self.config.data
        counts = torch.zeros(0, dtype=torch.int64)
        for name in data.blend:
            forests, text_bytes = self.dataset.held_out(name, data.tokens_per_forest, data.seq_len, max_tokens)
            result = evaluate(self.stages, forests)
            values[f"eval/{name}_bits_per_byte"] = result.bits_per_byte(text_bytes)
            nats, num_bytes, num_tokens = nats + result.nats, num_bytes + text_bytes, num_tokens + result.tokens
            counts = result.expert_counts if len(counts) == 0 else counts + result.expert_counts
        values["eval/bits_per_byte"] = nats / math.log(2) / num_bytes
        values["eval/loss"] = nats / num_tokens
        values["eval/max_over_mean_load"] = expert_load(counts[: self.config.model.num_hidden_layers])["moe/max_over_mean_load"]
        return values

    # ---- checkpoints ----------------------------------------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        return {"model": self.stages.boxes(), "optimizer": self.optimizer.state_dict(),
                "rng": checkpoint.PerRank(torch.get_rng_state())}

    def save(self, wait: bool = False) -> None:
        """Starts to write a checkpoint of this step in the background; with ``wait`` it is there on return.

        Raises:
            CheckpointError: it, or the one before, could not be written; earlier ones are untouched.
        """
        trainer = {"tokens": self.tokens, "stream": self.stream.state_dict(), "data": self.config.data.path}
        self.saver.start(self.step, self.config.model, self._state(), trainer)
        if wait:
            self.saver.wait()

    def resume(self) -> bool:
        """Goes on from the newest checkpoint of the run's folder.

        Returns:
            Whether there was one.

        Raises:
            CheckpointError: it is damaged or of another model.
        """
        newest = checkpoint.newest(self.folder, self.mesh)
        if newest is None:
            return False
        saved = checkpoint.read_config(newest).to_dict()
        for name, value in self.config.model.to_dict().items():
            if saved[name] != value:
                raise checkpoint.CheckpointError(f"{newest} is of another model: {name} = {saved[name]}, configured {value}; "
                                                 "choose another run.dir or the same model")
        state = self._state()
        trainer = checkpoint.load(newest, state, self.mesh)
        torch.set_rng_state(state["rng"].local)
        self.optimizer.write_back()
        self.stream.load_state_dict(trainer["stream"])
        self.step, self.tokens = trainer["step"], trainer["tokens"]
        return True


def open_data(config: TrainConfig, mesh: Mesh = ONE) -> tuple[Dataset, ForestStream]:
    """The data of a run and this rank's stream of it.

    Raises:
        ValueError: the data is not there, damaged or not for this configuration.
    """
    data = config.data
    dataset = Dataset(data.path)
    if dataset.vocab_size > config.model.vocab_size:
        raise ValueError(f"model.vocab_size = {config.model.vocab_size}: {data.path} needs at least {dataset.vocab_size}")
    return dataset, dataset.stream(data.blend, tokens_per_forest=data.tokens_per_forest, seq_len=data.seq_len, seed=config.run.seed,
                                   open_documents=data.open_documents, rank=mesh.dp.rank, world=mesh.dp.size)


def pick_device(name: str, number: int = 0) -> torch.device:
    """The device of that name, "auto" for a GPU where there is one; of several GPUs the one with this number.

    Raises:
        ValueError: this machine does not have it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"run.device = {name}: {str(error).splitlines()[0]}") from None
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise ValueError(f"run.device = {name}: torch {torch.__version__} sees no GPU here; use cpu or auto")
    if device.index is None and number >= torch.cuda.device_count():
        raise ValueError(f"LOCAL_RANK = {number}: this machine has {torch.cuda.device_count()} GPUs; nearest is "
                         f"{torch.cuda.device_count()} processes per node")
    return torch.device("cuda", number if device.index is None else device.index)


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collects SIGTERM, SIGINT and SIGUSR1 (a batch system's warning) instead of dying of them, so that the loop can save first."""
    caught: list[int] = []
    before = {s: signal.signal(s, lambda number, frame: caught.append(number)) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def fit(trainer: Trainer, resolved: dict[str, Any]) -> bool:
    """Trains from the trainer's step to the end, logging, evaluating and saving on the way.

    Returns:
        True at the end; False when a signal stopped it, after saving.
    """
    run, steps = trainer.config.run, trainer.config.stage.steps
    log = MetricsLog(run, resolved, trainer.step, steps) if trainer.mesh.world.rank == 0 else SilentLog()
    meter = GpuMeter(trainer.device)
    with stop_signals() as signals:
        try:
            for _ in itertools.repeat(None, steps - trainer.step):
                values = trainer.train_step()
                last, stop = trainer.step == steps, trainer.any_rank(signals)
                if run.eval_every and trainer.step % run.eval_every == 0 and not last:
                    values.update(trainer.evaluate(run.eval_tokens))
                elif last:
                    values.update(trainer.evaluate())
                if trainer.step % run.log_every == 0 or "eval/loss" in values:
                    log.write(trainer.step, {**values, **meter.read()})
                log.progress(trainer.step, {"loss": f"{values['loss/lm']:.3f}", "tok/s": f"{values['throughput/tokens_per_s']:,.0f}"})
                if last or stop or (run.save_every and trainer.step % run.save_every == 0):
                    trainer.save(wait=bool(last or stop))
                if stop and not last:
                    _log.warning("stopped by %s after step %d; saved, the same command goes on from there",
                                 signal.Signals(stop).name, trainer.step)
                    return False
        finally:
            log.close()
    return True

"""Where a run's figures go: metrics.jsonl always, wandb beside it, a progress bar on the terminal, GPU power and memory from NVML."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from megatron_m2.forest import TokenForest
from megatron_m2.model.config import ModelConfig
from megatron_m2.training.config import RunConfig

# Keys under these prefixes measure the machine; all others are a function of the configuration and repeat bit for bit.
MACHINE_PREFIXES = ("throughput/", "time/", "gpu/")

_log = logging.getLogger(__name__)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl; a last line that a kill cut short is left out."""
    rows = []
    if Path(path).is_file():
        for line in Path(path).read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
    return rows


class MetricsLog:
    """One JSON object per logged step, each with ``step``.

    Args:
        config: of the run.
        resolved: the whole configuration, shown in wandb.
        step: the step the run goes on from: rows after it belong to work that was lost and are dropped, so that no step is logged twice.
        total: steps of the run, for the progress bar.
    """

    def __init__(self, config: RunConfig, resolved: dict[str, Any], step: int, total: int) -> None:
        folder = Path(config.dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        kept = [row for row in read_metrics(self.path) if row["step"] <= step]
        rewritten = self.path.with_suffix(".rewriting")
        rewritten.write_text("".join(json.dumps(row) + "\n" for row in kept))
        os.replace(rewritten, self.path)
        self.file = open(self.path, "a")  # noqa: SIM115 (closed in close)
        self.bar = tqdm(total=total, initial=step, unit="step", dynamic_ncols=True, mininterval=1.0)
        self.wandb = _start_wandb(config, resolved, folder)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Appends a row."""
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        if self.wandb is not None:
            self.wandb.log(values, step=step)

    def progress(self, step: int, shown: dict[str, str]) -> None:
        """Moves the bar to ``step``."""
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(step - self.bar.n)

    def close(self) -> None:
        self.bar.close()
        self.file.close()
        if self.wandb is not None:
            self.wandb.finish()


class SilentLog:
    """What the other ranks have in place of a :class:`MetricsLog`: every rank computes the figures, one writes them."""

    def write(self, step: int, values: dict[str, float]) -> None:
        pass

    def progress(self, step: int, shown: dict[str, str]) -> None:
        pass

    def close(self) -> None:
        pass


def _start_wandb(config: RunConfig, resolved: dict[str, Any], folder: Path) -> Any:
    """The wandb run of this folder, the same after a resume; None when disabled."""
    if config.wandb == "disabled":
        return None
    import wandb  # slow to import, and not needed when disabled

    id_file = folder / "wandb_id"
    run_id = config.wandb_id or (id_file.read_text().strip() if id_file.is_file() else secrets.token_hex(4))
    id_file.write_text(run_id + "\n")
    mode: Literal["online", "offline"] = "online" if config.wandb == "online" else "offline"
    return wandb.init(project=config.wandb_project, id=run_id, name=folder.name, dir=str(folder), config=resolved, mode=mode,
                      resume="allow", settings=wandb.Settings(console="off", silent=True, x_disable_stats=True))


class GpuMeter:
    """Power and memory of the GPU that runs this process, read through NVML; empty where there is none."""

    def __init__(self, device: torch.device) -> None:
        self.handle: Any = None
        if device.type != "cuda":
            return
        import pynvml  # the module of nvidia-ml-py

        try:
            pynvml.nvmlInit()
            # by UUID: CUDA_VISIBLE_DEVICES renumbers what NVML does not
            self.handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        except pynvml.NVMLError as error:
            _log.warning("no GPU power and memory figures: NVML says %s", error)
        self.nvml = pynvml

    def read(self) -> dict[str, float]:
        """``gpu/power_w`` and ``gpu/memory_used_gib``."""
        if self.handle is None:
            return {}
        return {"gpu/power_w": self.nvml.nvmlDeviceGetPowerUsage(self.handle) / 1e3,
                "gpu/memory_used_gib": self.nvml.nvmlDeviceGetMemoryInfo(self.handle).used / 2**30}


def expert_load(counts: torch.Tensor) -> dict[str, float]:
    """Balance of int64 counts [layers, experts]: per layer the busiest expert over the mean, the worst and the average layer, and the
    share of experts that got nothing."""
    load = counts.double() / counts.double().mean(dim=1, keepdim=True).clamp_min(1e-9)
    worst = load.amax(dim=1)
    return {"moe/max_over_mean_load": float(worst.max()), "moe/max_over_mean_load_layer_avg": float(worst.mean()),
            "moe/idle_experts_share": float((counts == 0).double().mean())}


def forest_forward_flops(model: ModelConfig, forest: TokenForest) -> int:
    """Model FLOPs of one forward over this forest, MTP included."""
    depth = forest.depth
    mtp = [int((depth >= k).sum()) for k in range(1, model.num_mtp_modules + 1)]
    predicted = sum(int(((forest.weight != 0) & (depth > k)).sum()) for k in range(model.num_mtp_modules + 1))
    return model.forward_flops(len(forest), int((depth.long() + 1).sum()), predicted, sum(mtp))

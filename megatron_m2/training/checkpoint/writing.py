"""Writing checkpoints: at once, or in the background while training goes on."""

from __future__ import annotations

import json
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.planner import SavePlanner as DCPSavePlanner
from torch.distributed.checkpoint.storage import WriteResult

from megatron_m2.model.config import ModelConfig
from megatron_m2.model.m2 import M2Model
from megatron_m2.parallel.mesh import ONE, Mesh
from megatron_m2.training.checkpoint import folder as folders
from megatron_m2.training.checkpoint.ranks import Ranks
from megatron_m2.training.checkpoint.tensors import CHUNK_BYTES, Flat, SavePlanner, flatten


def save(folder: str | Path, step: int, config: ModelConfig, state: dict[str, Any], trainer: dict[str, Any], keep: int = 0,
         mesh: Mesh = ONE) -> Path:
    """Writes ``folder/step_XXXXXXXX`` atomically. All ranks of the mesh call it together, with the same arguments but for ``state``.

    Args:
        state: nested dictionaries of tensors, :class:`~megatron_m2.parallel.box.Box` and ``PerRank``.
        trainer: plain values for JSON; those of rank 0 are kept.
        keep: afterwards remove all but so many of the newest (0: keep all).

    Raises:
        CheckpointError: on every rank, when it could not be written on any, for example for want of space. Earlier checkpoints are
            untouched.
    """
    return _write(Path(folder), step, config, flatten(state), {"step": step, **trainer}, keep, Ranks.of(mesh))


def save_model(model: M2Model, path: str | Path) -> Path:
    """Writes a model alone as checkpoint ``path/step_00000000``."""
    return save(path, 0, model.config, {"model": model.state_dict()}, {})


class Saver:
    """Writes checkpoints in the background: the state is copied to buffers on the host, which are kept, and written from there.

    Building it, :meth:`start` and :meth:`wait` are for all ranks of the mesh together.

    Args:
        folder, keep: as of :func:`save`.
    """

    def __init__(self, folder: str | Path, keep: int = 0, mesh: Mesh = ONE) -> None:
        self._folder, self._keep = Path(folder), keep
        self._ranks = Ranks.of(mesh, "gloo")  # a group of its own, as it is used beside the training's collectives
        self._thread = ThreadPoolExecutor(1, "checkpoint")  # on leaving, the interpreter waits for what it writes
        self._writing: Future[Path] | None = None
        self._buffers: dict[str, Tensor] = {}

    def start(self, step: int, config: ModelConfig, state: dict[str, Any], trainer: dict[str, Any]) -> None:
        """Returns when ``state`` has been copied; arguments as of :func:`save`. Waits for an earlier one first.

        Raises:
            CheckpointError: the earlier one could not be written; this one is not begun.
        """
        self.wait()
        copied = self._copy(flatten(state))
        plain = json.loads(json.dumps({"step": step, **trainer}))
        self._writing = self._thread.submit(_write, self._folder, step, config, copied, plain, self._keep, self._ranks)

    def wait(self) -> Path | None:
        """The checkpoint that was being written, now complete; None if none was.

        Raises:
            CheckpointError: it could not be written. It is said once.
        """
        writing, self._writing = self._writing, None
        return None if writing is None else writing.result()

    def _copy(self, flat: Flat) -> Flat:
        """The same on the host."""
        buffers, self._buffers = self._buffers, {}
        for name, value in flat.items():
            local, buffer = value.local, buffers.get(name)
            if buffer is None or buffer.shape != local.shape or buffer.dtype != local.dtype:
                buffer = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
            self._buffers[name] = buffer.copy_(local, non_blocking=True)
        if any(value.local.is_cuda for value in flat.values()):
            torch.cuda.current_stream().synchronize()
        return {name: replace(value, local=self._buffers[name]) for name, value in flat.items()}


def _write(folder: Path, step: int, config: ModelConfig, flat: Flat, trainer: dict[str, Any], keep: int, ranks: Ranks) -> Path:
    final = folder / folders.name_of(step)
    what = f"cannot save {final}"
    try:
        writing = ranks.on_first(what, lambda: folders.begin(folder, step))
        written: dict[str, int] = {}
        for each in ranks.together(what, lambda: _write_tensors(writing, flat, ranks)):
            written |= each
        documents = {"model_config.json": config.to_dict(), "trainer.json": trainer}
        ranks.on_first(what, lambda: folders.complete(writing, final, written, documents, keep))
    except folders.CheckpointError:
        if ranks.rank == 0:
            folders.abandon(folder, step)
        raise
    return final


class _Writer(dcp.FileSystemWriter):
    def write_data(self, plan: SavePlan, planner: DCPSavePlanner) -> torch.futures.Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:  # torch.save's, about a file that is not as long as it should be: what the system said tells more
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise


def _write_tensors(writing: Path, flat: Flat, ranks: Ranks) -> dict[str, int]:
    """Writes this rank's share; returns its files and their sizes."""
    state = writing / "state"
    copy_ahead = 10_000_000 if any(value.local.is_cuda for value in flat.values()) else 0
    writer = _Writer(state, sync_files=True, per_thread_copy_ahead=copy_ahead)
    planner = SavePlanner(ranks, CHUNK_BYTES)
    if ranks.size > 1:
        dcp.save(flat, storage_writer=writer, planner=planner, process_group=ranks.group)
    else:  # the steps of dcp.save, which warns of every process that has no group
        planner.set_up_planner(flat, writer.storage_meta(), is_coordinator=True)
        writer.set_up_storage_writer(is_coordinator=True)
        plans, metadata = planner.create_global_plan([writer.prepare_local_plan(planner.create_local_plan())])
        plan = planner.finish_plan(writer.prepare_global_plan(plans)[0])
        writer.finish(metadata, [writer.write_data(plan, planner).wait()])
    return {str(p.relative_to(writing)): p.stat().st_size for p in sorted(state.glob(f"__{ranks.rank}_*"))}

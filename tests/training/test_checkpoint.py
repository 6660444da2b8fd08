"""Checkpoints of one process: exact round trip, atomic under failure, damage and strangers refused in one line. Of many ranks:
test_distributed_checkpoint.py."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading

import pytest
import torch

import megatron_m2
from megatron_m2.model.hf import layout
from megatron_m2.model.m2 import build_model
from megatron_m2.parallel.box import Box
from megatron_m2.training import checkpoint
from megatron_m2.training.checkpoint import CheckpointError, PerRank, Saver, writing
from megatron_m2.training.checkpoint.ranks import Ranks
from megatron_m2.training.checkpoint.tensors import StateReader, flatten
from tests.conftest import tiny_config


@pytest.fixture
def saved(tmp_path):
    model = build_model(tiny_config(num_mtp_modules=1), torch.bfloat16, seed=4)
    return model, checkpoint.save_model(model, tmp_path / "run")


def test_round_trip_is_exact(saved):
    model, path = saved
    for source in (path, path.parent):
        loaded = megatron_m2.load(source)
        assert loaded.config == model.config
        for name, value in model.state_dict().items():
            assert loaded.state_dict()[name].dtype == value.dtype
            assert torch.equal(loaded.state_dict()[name], value), name


def test_loading_in_another_dtype_converts_all_but_the_router(saved):
    model, path = saved
    wide = megatron_m2.load(path, dtype=torch.float32)
    assert wide.lm_head.weight.dtype == torch.float32
    assert torch.equal(wide.lm_head.weight, model.lm_head.weight.float())
    half = megatron_m2.load(path, dtype=torch.float16)
    assert half.layers[0].moe.router.weight.dtype == torch.float32


def test_nested_state_and_trainer_values_come_back(tmp_path):
    state = {"a": {"x": torch.arange(5), "y": torch.tensor(2.5)}, "rng": torch.get_rng_state()}
    path = checkpoint.save(tmp_path, 7, tiny_config(), state, {"stream": {"position": 3}})
    empty = {"a": {"x": torch.zeros(5, dtype=torch.int64), "y": torch.tensor(0.0)}, "rng": torch.zeros_like(state["rng"])}
    assert checkpoint.load(path, empty) == {"step": 7, "stream": {"position": 3}}
    assert torch.equal(empty["a"]["x"], state["a"]["x"])
    assert float(empty["a"]["y"]) == 2.5
    assert torch.equal(empty["rng"], state["rng"])


def test_only_the_newest_are_kept_and_half_written_ones_removed(tmp_path):
    (tmp_path / ".writing-00000001").mkdir()
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, tiny_config(), {"x": torch.ones(1)}, {}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000002", "step_00000003"]
    assert checkpoint.resolve(tmp_path).name == "step_00000003"


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path):
    """A real write failure: a file-size limit below the tensors' size, in a process of its own."""
    checkpoint.save(tmp_path, 1, tiny_config(), {"x": torch.ones(4)}, {})
    program = f"""
import resource, signal, sys, torch
from megatron_m2.training import checkpoint
from megatron_m2.model.config import ModelConfig
config = checkpoint.read_config({str(tmp_path / "step_00000001")!r})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    checkpoint.save({str(tmp_path)!r}, 2, config, {{"x": torch.ones(1_000_000)}}, {{}})
except checkpoint.CheckpointError as error:
    print(error); sys.exit(3)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    assert done.stdout.startswith(f"cannot save {tmp_path / 'step_00000002'}: ")
    assert len(done.stdout.splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]
    checkpoint.verify(tmp_path / "step_00000001")


@pytest.mark.parametrize("damage", ["truncate", "remove", "manifest"])
def test_damage_is_named(saved, damage):
    _, path = saved
    victim = next((path / "state").glob("*.distcp"))
    if damage == "truncate":
        os.truncate(victim, victim.stat().st_size - 1)
    elif damage == "remove":
        victim.unlink()
    else:
        (path / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"is damaged: state/|no complete checkpoint") as caught:
        megatron_m2.load(path)
    assert len(str(caught.value).splitlines()) == 1


def test_another_models_tensors_are_refused(saved, tmp_path):
    _, path = saved
    other = build_model(tiny_config(hidden_size=48), torch.bfloat16, seed=0)
    with pytest.raises(CheckpointError, match=f"cannot load {path}"):
        checkpoint.load(path, {"model": other.state_dict()})
    config = json.loads((path / "model_config.json").read_text())
    (path / "model_config.json").write_text(json.dumps({**config, "n_heads": 3}))
    with pytest.raises(CheckpointError, match=r"model_config.json: ValueError: model.n_heads: unknown field"):
        checkpoint.read_config(path)


def test_an_empty_folder_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        megatron_m2.load(tmp_path)


def test_saving_the_same_step_again_replaces_it(tmp_path):
    checkpoint.save(tmp_path, 1, tiny_config(), {"x": torch.ones(1)}, {})
    checkpoint.save(tmp_path, 1, tiny_config(), {"x": torch.full((1,), 2.0)}, {})
    state = {"x": torch.zeros(1)}
    checkpoint.load(tmp_path / "step_00000001", state)
    assert float(state["x"]) == 2.0


# ---- in the background ----------------------------------------------------------------------------------------------------------------


def test_what_is_written_in_the_background_is_what_was_there_at_the_start(tmp_path, monkeypatch):
    may_write, write = threading.Event(), writing._write_tensors
    monkeypatch.setattr(writing, "_write_tensors", lambda *a: (may_write.wait(), write(*a))[1])
    saver, weights, trainer = Saver(tmp_path, keep=2), torch.arange(6.0), {"stream": {"position": 1}}
    for step in (1, 2, 3):
        saver.start(step, tiny_config(), {"x": weights, "part": Box(weights[2:4], (0,), (2,))}, trainer)
        assert step > 1 or not saver._writing.done()
        weights += 1
        trainer["stream"]["position"] += 1
        buffers = [t.data_ptr() for t in saver._buffers.values()]
        may_write.set()
    assert saver.wait() == tmp_path / "step_00000003"
    assert saver.wait() is None
    assert [t.data_ptr() for t in saver._buffers.values()] == buffers  # used again
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["step_00000002", "step_00000003"]
    for step in (2, 3):
        state = {"x": torch.zeros(6), "part": torch.zeros(2)}
        assert checkpoint.load(tmp_path / checkpoint.folder.name_of(step), state)["stream"]["position"] == step
        assert torch.equal(state["x"], torch.arange(6.0) + step - 1)
        assert torch.equal(state["part"], state["x"][2:4])


def test_a_failure_in_the_background_is_said_once_at_the_next_start_or_wait(tmp_path):
    saver, state = Saver(tmp_path / "run"), {"x": torch.ones(3)}
    (tmp_path / "run").write_text("a file where the folder should be")
    saver.start(1, tiny_config(), state, {})
    with pytest.raises(CheckpointError, match=f"cannot save {tmp_path}/run/step_00000001: FileExistsError"):
        saver.start(2, tiny_config(), state, {})
    assert saver.wait() is None
    saver.start(3, tiny_config(), state, {})
    with pytest.raises(CheckpointError, match="step_00000003"):
        saver.wait()
    (tmp_path / "run").unlink()
    saver.start(4, tiny_config(), state, {})
    assert saver.wait() == tmp_path / "run/step_00000004"


def test_a_checkpoint_that_was_being_replaced_still_counts(saved):
    _, path = saved
    old = path.with_name(path.name + ".old")
    path.rename(old)  # where a kill came between two renamings
    assert checkpoint.resolve(path.parent) == old
    checkpoint.verify(old)
    shutil.copytree(old, path)
    assert checkpoint.checkpoints(path.parent) == [path]
    shutil.rmtree(path)
    checkpoint.remove_unfinished(path.parent)
    assert checkpoint.checkpoints(path.parent) == [path]


# ---- tensors --------------------------------------------------------------------------------------------------------------------------


def test_what_each_rank_has_for_itself_at_other_numbers_of_ranks(tmp_path):
    four = Box(torch.arange(8).view(4, 2), (0, 0), (4, 2))  # as four ranks write two elements each
    path = checkpoint.save(tmp_path, 1, tiny_config(), {"rng": four.local}, {})
    for rank in range(6):
        value = PerRank(torch.zeros(2, dtype=torch.int64))
        StateReader(path / "state").read_into(flatten({"rng": value}), Ranks(rank, 6))
        assert value.local.tolist() == [2 * (rank % 4), 2 * (rank % 4) + 1]
    with pytest.raises(CheckpointError, match=r"rng is \[2\] there, \[3\] here"):
        checkpoint.load(path, {"rng": PerRank(torch.zeros(3, dtype=torch.int64))})
    with pytest.raises(CheckpointError, match=r"no tensor seed there"):
        checkpoint.load(path, {"seed": torch.zeros(3)})


def test_reading_parts_reads_each_piece_once_and_keeps_few(tmp_path, monkeypatch):
    """In the order of an export, with room for one layer's experts or so."""
    monkeypatch.setattr(writing, "CHUNK_BYTES", 5000)
    model = build_model(tiny_config(num_mtp_modules=1), torch.float32, seed=4)
    path = checkpoint.save_model(model, tmp_path)
    room, peak, read = 20_000, 0, []
    reader = StateReader(path / "state", room)
    plain = reader._read
    monkeypatch.setattr(reader, "_read", lambda boxes: (read.extend(b.local.nbytes for b in boxes.values()), plain(boxes)))
    state = model.state_dict()
    for slot in layout(model.config):
        assert torch.equal(reader.part(f"model.{slot.name}", slot.index), slot.view(state)), slot.key
        peak = max(peak, sum(t.nbytes for t in reader._cache.values()))
    assert max(read) <= 6144  # a piece is at least one row, here one expert's two matrices
    assert sum(read) == sum(t.nbytes for t in state.values())
    assert peak <= room
    for index in ((3,), (slice(1, 7, None), slice(0, 48), 5), (slice(None), 40), ()):
        assert torch.equal(reader.part("model.layers.1.moe.gate_up_proj", index), state["layers.1.moe.gate_up_proj"][index])
    assert reader.dtype("model.norm.weight") == torch.float32

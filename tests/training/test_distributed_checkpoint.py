"""Checkpoints of many ranks: read at other layouts bit for bit, atomic when a rank is killed or its disk is full, exported without
building the model."""

from __future__ import annotations

import os
import resource
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import megatron_m2
from megatron_m2.model.hf import save_hf
from megatron_m2.model.m2 import build_model
from megatron_m2.parallel.box import Box, module_boxes
from megatron_m2.parallel.layout import ParallelConfig
from megatron_m2.parallel.mesh import ONE, Mesh, build_mesh
from megatron_m2.parallel.sharding import Sharding
from megatron_m2.training import checkpoint
from megatron_m2.training.checkpoint import CheckpointError, PerRank, Saver
from megatron_m2.training.checkpoint import writing as module
from megatron_m2.training.optimizer import MasterAdamW
from tests.parallel.ranks import on_ranks
from tests.parallel.test_data import CONFIG, OPTIM, backward, forests_of
from tools.convert import main as convert

LAYOUTS = {"tp2_dp2_zero1": ({"tp": 2}, Sharding(zero=1)), "ep2_cp2_zero1": ({"ep": 2, "cp": 2}, Sharding(zero=1)),
           "tp4_zero0": ({"tp": 4}, Sharding(zero=0)), "dp4_hybrid_zero2": ({}, Sharding(zero=2, ranks=2))}


def build(mesh: Mesh, sharding: Sharding, seed: int):
    model = build_model(CONFIG, torch.bfloat16, seed=seed, mesh=mesh)
    for i, router in enumerate(model.routers()):
        router.bias.copy_(torch.linspace(-1, seed, CONFIG.num_experts) * (i + 1))
    return model, MasterAdamW(model.named_parameters(), OPTIM, mesh, sharding)


def state_of(model, optimizer, rng: torch.Tensor, writing: bool):
    weights = {**module_boxes(model), **optimizer.weights()} if writing else module_boxes(model)
    return {"model": weights, "optimizer": optimizer.state_dict(), "rng": PerRank(rng)}


def flat(state) -> dict[str, torch.Tensor | Box]:
    boxes = {f"model.{n}": v for n, v in state["model"].items()}
    return boxes | {f"{n}.{k}": v for n, values in state["optimizer"].items() for k, v in values.items()}


def assembled(state) -> dict[str, torch.Tensor]:
    """Every whole tensor from all ranks' boxes, which must agree where they overlap and leave nothing out."""
    everybody = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, {n: (v.local, v.offsets, v.whole) if isinstance(v, Box) else (v, (0,) * v.dim(), tuple(v.shape))
                                       for n, v in flat(state).items()})
    wholes, filled = {}, {}
    for boxes in everybody:
        for name, (local, offsets, shape) in boxes.items():
            whole = wholes.setdefault(name, torch.zeros(shape, dtype=local.dtype))
            seen = filled.setdefault(name, torch.zeros(shape, dtype=torch.bool))
            box = Box(local, offsets, shape)
            assert torch.equal(box.of(whole)[box.of(seen)], local[box.of(seen)]), name
            box.of(whole).copy_(local)
            box.of(seen).fill_(True)
    assert all(bool(f.all()) for f in filled.values())
    return wholes


def assert_boxes(state, wholes):
    for name, value in flat(state).items():
        mine, whole = (value.local, value.of(wholes[name])) if isinstance(value, Box) else (value, wholes[name])
        assert mine.dtype == whole.dtype
        assert torch.equal(mine, whole), name


def write_and_read(folder: Path):
    """Each layout writes in the background while its weights change; it and another one read."""
    module.CHUNK_BYTES = 4000  # several pieces for most tensors
    rank = dist.get_rank()
    meshes = {name: build_mesh(ParallelConfig(**sizes), "cpu", 2) for name, (sizes, _) in LAYOUTS.items()}
    for name, mesh in meshes.items():
        model, optimizer = build(mesh, LAYOUTS[name][1], seed=1)
        everything = forests_of(0)
        for forest in everything[mesh.dp.rank :: mesh.dp.size]:
            backward(model, forest, everything)
        optimizer.step(1e-2)
        state = state_of(model, optimizer, torch.tensor([rank, 7]), writing=True)
        wholes = assembled(state)
        assert_boxes(state_of(model, optimizer, torch.zeros(2), writing=False), wholes)
        saver = Saver(folder / name, mesh=mesh)
        saver.start(3, CONFIG, state, {"written_by": rank})
        for value in flat(state).values():
            (value.local if isinstance(value, Box) else value).zero_()
        assert saver.wait() == folder / name / "step_00000003"
        if rank == 0:
            torch.save(wholes, folder / f"{name}.pt")
            assert len(list((folder / name / "step_00000003/state").glob("*.distcp"))) == 4
            sizes = [p.stat().st_size for p in (folder / name / "step_00000003/state").glob("*.distcp")]
            assert max(sizes) < 1.2 * min(sizes), sizes
        names = list(meshes)
        for other in (name, names[names.index(name) - 1]):
            model, optimizer = build(meshes[other], LAYOUTS[other][1], seed=2)
            state = state_of(model, optimizer, torch.zeros(2, dtype=torch.int64), writing=False)
            assert checkpoint.load(folder / name / "step_00000003", state, meshes[other]) == {"step": 3, "written_by": 0}
            assert_boxes(state, wholes)
            assert state["rng"].local.tolist() == [rank, 7]
    # and what one rank wrote, read by four
    wholes = torch.load(folder / "one.pt")
    model, optimizer = build(meshes["tp2_dp2_zero1"], Sharding(), seed=2)
    state = state_of(model, optimizer, torch.zeros(2, dtype=torch.int64), writing=False)
    checkpoint.load(folder / "one/step_00000001", state, meshes["tp2_dp2_zero1"])
    assert_boxes(state, wholes)
    assert state["rng"].local.tolist() == [5, 7]
    # a rank cannot read what the others can: all of them say so
    broken = flat(state)
    if rank == 2:
        broken["model.norm.weight"] = torch.zeros(31)
    with pytest.raises(CheckpointError, match=r"cannot load .*: rank 2: ValueError: model.norm.weight is \[32\] there, \[31\] here"):
        checkpoint.load(folder / "one/step_00000001", {"model": {"norm": {"weight": broken["model.norm.weight"]}}},
                        meshes["tp2_dp2_zero1"])


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Checkpoints of every layout by name, and the whole tensors that each holds."""
    folder = tmp_path_factory.mktemp("layouts")
    model, optimizer = build(ONE, Sharding(), seed=3)
    for p in model.parameters():
        p.sum().backward()
    optimizer.step(1e-2)
    state = state_of(model, optimizer, torch.tensor([5, 7]), writing=True)
    torch.save(flat(state), folder / "one.pt")
    checkpoint.save(folder / "one", 1, CONFIG, state, {})
    on_ranks(4, write_and_read, folder)
    return folder


def test_one_rank_reads_what_any_layout_wrote(written):
    for name in LAYOUTS:
        wholes = torch.load(written / f"{name}.pt")
        model, optimizer = build(ONE, Sharding(), seed=2)
        state = state_of(model, optimizer, torch.zeros(2, dtype=torch.int64), writing=False)
        assert checkpoint.load(written / name / "step_00000003", state) == {"step": 3, "written_by": 0}
        assert all(not isinstance(v, Box) for v in flat(state).values())
        assert_boxes(state, wholes)
        assert state["rng"].local.tolist() == [0, 7]
        model = megatron_m2.load(written / name)
        assert all(torch.equal(v, wholes[f"model.{n}"]) for n, v in model.state_dict().items())


def test_any_layout_exports_the_same_bytes_as_the_model(written, tmp_path, monkeypatch):
    for name in ("tp2_dp2_zero1", "dp4_hybrid_zero2"):
        model = megatron_m2.load(written / name)
        for options, arguments in (({}, []), ({"fp8": True}, ["--fp8"]), ({"dtype": torch.float32}, ["--dtype", "float32"])):
            expected, exported = (tmp_path / f"{name}{len(arguments)}{i}{arguments[-1:]}" for i in range(2))
            save_hf(model, expected, max_shard_bytes=20_000, **options)
            with monkeypatch.context() as patch:
                patch.setattr(megatron_m2, "load", None)  # the model is not built
                assert convert([str(written / name), str(exported), "--max-shard-gib", str(20_000 / 2**30), *arguments]) == 0
            files = sorted(p.name for p in expected.iterdir())
            assert sorted(p.name for p in exported.iterdir()) == files
            assert len(files) > 5
            for file in files:
                assert (exported / file).read_bytes() == (expected / file).read_bytes(), (name, options, file)


# ---- failures -----------------------------------------------------------------------------------------------------------------------


def write_elsewhere(write, writing, flat, ranks):
    written = write(writing, flat, ranks)
    for name in written:
        (writing / name).unlink()
    return written


def full_disk_on_rank_1(folder: Path):
    mesh = build_mesh(ParallelConfig(), "cpu", 2)
    rank = mesh.world.rank
    state = {"x": Box(torch.full((100_000,), float(rank)), (100_000 * rank,), (200_000,))}
    saver = Saver(folder, mesh=mesh)
    saver.start(1, CONFIG, state, {})
    if rank == 1:
        saver.wait()
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    message = rf"cannot save {folder}/step_00000002: rank 1: OSError: .*File too large"
    saver.start(2, CONFIG, state, {})
    with pytest.raises(CheckpointError, match=message):
        saver.start(3, CONFIG, state, {})
    with pytest.raises(CheckpointError, match=message):
        checkpoint.save(folder, 2, CONFIG, state, {}, mesh=mesh)
    assert saver.wait() is None
    dist.barrier()
    assert [p.name for p in folder.iterdir()] == ["step_00000001"]
    assert checkpoint.newest(folder if rank == 0 else "elsewhere", mesh) == folder / "step_00000001"
    assert checkpoint.newest(folder / "none", mesh) is None
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    # a folder that rank 0 cannot write
    with pytest.raises(CheckpointError, match=r"rank 0: (NotADirectoryError|FileExistsError)"):
        checkpoint.save(folder / "step_00000001/manifest.json", 2, CONFIG, state, {}, mesh=mesh)
    saver.start(3, CONFIG, state, {})
    assert saver.wait() == folder / "step_00000003"
    read = {"x": torch.zeros(200_000)}
    checkpoint.load(folder / "step_00000003", read)
    assert read["x"].tolist() == [0.0] * 100_000 + [1.0] * 100_000
    if rank == 1:  # as if this rank's disk were another one
        module._write_tensors = partial(write_elsewhere, module._write_tensors)
    with pytest.raises(CheckpointError, match=r"rank 0: OSError: rank 0 does not see state/__1_0.distcp .* that all ranks share"):
        checkpoint.save(folder, 4, CONFIG, state, {}, mesh=mesh)


def test_a_full_disk_on_one_rank_is_said_by_all(tmp_path):
    on_ranks(2, full_disk_on_rank_1, tmp_path)


def in_child(work) -> int:
    """Runs it in a forked process; returns its exit status, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_at(call: int, folder: Path, step: int, keep: int, counter: Path | None = None):
    """Saves in the background and dies at the so-many-th call that reaches the disk."""
    calls = 0

    def deadly(real, *arguments, **options):
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)

    saver = Saver(folder, keep)
    for owner, name in ((os, "fsync"), (os, "rename"), (os, "mkdir"), (os, "rmdir"), (os, "unlink"), (torch, "save")):
        setattr(owner, name, partial(deadly, getattr(owner, name)))
    state = {"x": torch.full((100,), float(step)), "y": torch.full((7, 3), -float(step))}
    saver.start(step, CONFIG, state, {})
    for tensor in state.values():
        tensor.zero_()
    saver.wait()
    if counter is not None:
        counter.write_text(str(calls))


@pytest.mark.parametrize("step", [2, 1])  # a new checkpoint while the oldest is removed, and one that replaces another
def test_a_kill_at_any_call_leaves_a_good_checkpoint(step, tmp_path):
    state = {"x": torch.ones(100), "y": -torch.ones(7, 3)}
    checkpoint.save(tmp_path / "count", 1, CONFIG, state, {})
    assert in_child(lambda: killed_at(-1, tmp_path / "count", step, 1, tmp_path / "calls")) == 0
    calls = int((tmp_path / "calls").read_text())
    assert calls > 15
    seen = set()
    for call in range(1, calls + 1):
        folder = tmp_path / str(call)
        checkpoint.save(folder, 1, CONFIG, state, {"earlier": True})
        assert in_child(lambda call=call, folder=folder: killed_at(call, folder, step, 1)) == -signal.SIGKILL
        found = checkpoint.checkpoints(folder)
        for path in found:
            checkpoint.verify(path)
        read = {"x": torch.zeros(100), "y": torch.zeros(7, 3)}
        trainer = checkpoint.load(found[-1], read)
        value = 1.0 if trainer.get("earlier") else float(step)
        seen.add((trainer["step"], trainer.get("earlier", False)))
        assert bool((read["x"] == value).all() and (read["y"] == -value).all())
        # the next save removes what was left
        checkpoint.save(folder, 3, CONFIG, state, {}, keep=1)
        assert [p.name for p in folder.iterdir()] == ["step_00000003"]
    assert seen == {(1, True), (step, False)}


def rank_dies(rank: int, folder: Path, store: Path):
    os.environ.update(GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = build_mesh(ParallelConfig(), "cpu", 2)
    state = {"x": Box(torch.full((1000,), float(rank)), (1000 * rank,), (2000,))}
    saver = Saver(folder, mesh=mesh)
    saver.start(1, CONFIG, state, {})
    saver.wait()
    if rank == 1:
        torch.save = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    saver.start(2, CONFIG, state, {})
    with pytest.raises(CheckpointError, match=r"cannot save .*step_00000002: .*"):
        saver.wait()


def test_a_rank_that_dies_leaves_the_last_good_checkpoint(tmp_path):
    pids = []
    for rank in range(2):
        pids.append(os.fork())
        if pids[-1] == 0:
            status = 1
            try:
                rank_dies(rank, tmp_path / "run", tmp_path / "store")
                status = 0
            finally:
                os._exit(status)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0, -signal.SIGKILL]
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["step_00000001"]
    read = {"x": torch.zeros(2000)}
    checkpoint.load(tmp_path / "run/step_00000001", read)
    assert read["x"].tolist() == [0.0] * 1000 + [1.0] * 1000

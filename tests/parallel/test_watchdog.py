"""A rank that dies, stalls or fails ends all ranks in time, with one line that names it. Real processes, real signals."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_m2.parallel.launch import join
from megatron_m2.parallel.layout import ParallelConfig
from megatron_m2.parallel.position import Position
from megatron_m2.parallel.watchdog import BOARD, STATUS, watched
from megatron_m2.train import explain

TIMEOUT_S = 5.0
SLACK_S = 20.0  # for a machine that is busy with other things: what is measured alone lies below the timeout
STEPS = 10  # after which something happens
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([__name__])


# ---- what a rank does --------------------------------------------------------------------------------------------------------------


def goes_on(rank: int) -> None:
    """Until a signal comes from the test."""


def stands_still(rank: int) -> None:
    if rank == 1:
        time.sleep(60)


def one_error(rank: int) -> None:
    if rank == 1:
        raise ValueError("data.path = /nowhere: not on this host")


def same_error(rank: int) -> None:
    raise ValueError("model.top_k = 99: more than num_experts")


def bug(rank: int) -> None:
    if rank == 1:
        raise KeyError("expert 7")


def diverges(rank: int) -> None:
    raise FloatingPointError("gradient norm is nan")


def other_collective(rank: int) -> None:
    """Two groups' collectives in crossed order: nobody is silent, all wait."""
    group = dist.new_group([0, 1], group_desc="other")
    x = torch.ones(1)
    for g in (group, None) if rank == 0 else (None, group):
        dist.all_reduce(x, group=g)


def in_a_checkpoint(rank: int) -> None:
    """A collective that fails inside other code, which makes a user's error of it."""
    try:
        while True:
            dist.all_reduce(torch.ones(1))
    except RuntimeError as error:
        raise ValueError("cannot save step_00000010") from error


def ends(rank: int) -> None:
    if rank == 1:
        raise StopIteration


def a_rank(rank: int, world: int, per_host: int, folder: str, happens) -> None:
    os.dup2(os.open(f"{folder}/log", os.O_WRONLY | os.O_APPEND | os.O_CREAT), 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank % per_host), GROUP_RANK=str(rank // per_host), LOCAL_WORLD_SIZE=str(per_host))
    os.environ[STATUS] = f"{folder}/status{rank}"
    torch.set_num_threads(1)
    step = 0
    with watched(TIMEOUT_S, explain) as progress, join(ParallelConfig(timeout_s=TIMEOUT_S), torch.device("cpu"), 1):
        progress.last_step = lambda: step
        with contextlib.suppress(StopIteration):
            while True:
                dist.all_reduce(torch.ones(1))
                step += 1
                if step == STEPS:
                    Path(f"{folder}/ready{rank}").touch()
                    happens(rank)
                time.sleep(0.01)


# ---- what the test does ------------------------------------------------------------------------------------------------------------


class Ranks:
    """Ranks of ``happens``, on hosts of ``per_host`` ranks as far as they can tell."""

    def __init__(self, folder: Path, happens, monkeypatch, world: int = 2, per_host: int = 2) -> None:
        self.folder = folder
        self.board = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": world,
                            BOARD: f"127.0.0.1:{self.board.port}"}.items():
            monkeypatch.setenv(name, str(value))
        environment = {n: os.environ[n] for n in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", BOARD)}
        self.processes = [PROCESSES.Process(target=_with_environment, args=(environment, r, world, per_host, str(folder), happens))
                          for r in range(world)]
        for p in self.processes:
            p.start()

    def wait_until_ready(self) -> None:
        while not all((self.folder / f"ready{r}").exists() for r in range(len(self.processes))):
            assert all(p.is_alive() for p in self.processes), self.log()
            time.sleep(0.02)

    def signal(self, rank: int, number: int) -> None:
        os.kill(self.processes[rank].pid, number)

    def end(self) -> list[int]:
        """Exit statuses, once all ranks have ended, which they must in time."""
        deadline = time.monotonic() + TIMEOUT_S + SLACK_S
        for p in self.processes:
            p.join(max(0.0, deadline - time.monotonic()))
        late = [r for r, p in enumerate(self.processes) if p.is_alive()]
        for p in self.processes:
            p.kill()
        assert not late, (late, self.log())
        return [p.exitcode for p in self.processes]

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def line(self) -> str:
        """The one line."""
        lines = [x for x in self.log().splitlines() if x.startswith("error")]
        assert len(lines) == 1, self.log()
        return lines[0]

    def final_statuses(self) -> list[str]:
        return [p.read_text() for p in sorted(self.folder.glob("status*"))]


def _with_environment(environment, *arguments) -> None:
    os.environ.update(environment)
    a_rank(*arguments)


@pytest.fixture
def ranks(tmp_path, monkeypatch):
    started = []

    def start(happens, **kind) -> Ranks:
        started.append(Ranks(tmp_path, happens, monkeypatch, **kind))
        return started[-1]

    yield start
    for r in started:
        for p in r.processes:
            p.kill()


@pytest.mark.parametrize(("victim", "world", "per_host"), [(1, 2, 2), (0, 2, 2), (1, 2, 1), (0, 3, 1)])
def test_a_rank_that_dies(victim, world, per_host, ranks):
    """On this host or, as far as the others can tell, on another."""
    r = ranks(goes_on, world=world, per_host=per_host)
    r.wait_until_ready()
    r.signal(victim, signal.SIGKILL)
    assert r.end() == [-signal.SIGKILL if rank == victim else 1 for rank in range(world)]
    line = r.line()
    assert line.startswith(f"error: rank {victim} ({socket.gethostname()}, pid {r.processes[victim].pid}) died: last seen in "), line
    assert int(line.partition("last good step ")[2].partition(";")[0]) >= STEPS
    assert "; rank " in line
    assert "is in all_reduce #" in line.rpartition("; rank ")[2]
    assert r.final_statuses() == []  # another start may help


@pytest.mark.parametrize("per_host", [2, 1])
def test_a_rank_that_is_stopped(per_host, ranks):
    r = ranks(goes_on, per_host=per_host)
    r.wait_until_ready()
    r.signal(1, signal.SIGSTOP)
    if per_host == 1:  # its launcher's part
        while r.processes[0].is_alive():
            time.sleep(0.1)
        r.signal(1, signal.SIGKILL)
    assert r.end() == [1, -signal.SIGKILL]
    line = r.line()
    assert line.startswith(f"error: rank 1 ({socket.gethostname()}, pid {r.processes[1].pid}) stalled (stopped, or its host is gone): ")
    assert "is in all_reduce #" in line


def test_a_rank_that_stands_still(ranks):
    """Its process is alive and answers, its work does not go on."""
    r = ranks(stands_still)
    assert r.end() == [1, 1]
    line = r.line()
    assert line.startswith(f"error: rank 1 ({socket.gethostname()}, pid {r.processes[1].pid}) stalled: last seen in start-up")
    assert f"last good step {STEPS}; rank 0 " in line
    assert "is in all_reduce #" in line


def test_ranks_that_wait_for_each_other(ranks):
    r = ranks(other_collective)
    assert r.end() == [1, 1]
    line = r.line()
    assert "waits for others, as all ranks do" in line
    assert "of group other" in line
    assert "of group default_pg" in line


@pytest.mark.parametrize(("happens", "text", "status"), [
    (one_error, "rank 1 .*: data.path = /nowhere: not on this host", "2"),
    (same_error, "rank [01] .*: model.top_k = 99: more than num_experts", "2"),
    (diverges, "rank [01] .*: training diverged: gradient norm is nan; the last checkpoint stands", "1"),
])
def test_an_error_that_another_start_would_not_help(happens, text, status, ranks):
    """torchrun sees status 0 and does not start again; the true status is in a file."""
    r = ranks(happens)
    assert r.end() == [0, 0]
    assert r.final_statuses() == [status, status]
    assert __import__("re").fullmatch(f"error: {text}", r.line())


def test_a_bug_shows_its_rank_and_its_traceback(ranks):
    r = ranks(bug)
    assert r.end() == [1, 1]
    assert r.line() == f"error: rank 1 ({socket.gethostname()}, pid {r.processes[1].pid}): KeyError: 'expert 7'"
    assert r.log().count("Traceback") == 1
    assert r.final_statuses() == []


def test_a_save_that_fails_because_a_rank_died_is_no_error_of_the_user(ranks):
    r = ranks(in_a_checkpoint)
    r.wait_until_ready()
    r.signal(1, signal.SIGKILL)
    assert r.end() == [1, -signal.SIGKILL]
    assert " died: " in r.line()


def test_a_rank_that_ends_first_is_not_missed(ranks):
    """The others, of whom one goes on alone, do not take it for dead; what fails in the end is the collective that it left."""
    r = ranks(ends)
    assert r.end() == [1, 0]
    assert r.line().startswith("error: rank 0 ")
    assert "waits for others" in r.line()


def test_a_board_that_is_gone(ranks):
    r = ranks(goes_on)
    r.wait_until_ready()
    r.board = None  # ends the server
    assert r.end() == [1, 1]
    assert "or its launcher died" in r.line()


def test_positions():
    assert str(Position()) == "start-up"
    assert str(Position("training/trainer.py _sums", "all_reduce", "", True)) == "all_reduce in training/trainer.py _sums"

#!/usr/bin/env python3
"""Kills ranks of a run at random moments and compares what it ends with to a run that nothing disturbed, bit for bit.

    python tools/check_kill.py                                      # ten kills; two hosts of two ranks
    python tools/check_kill.py --hosts 1 --kills 3 parallel.tp=4    # more arguments are the run's overrides

Hosts are network namespaces of this machine with a cable between them (root and iproute2 are needed); with --hosts 1 there are none.
Each host runs scripts/train.sh, which starts the ranks again after each kill; nothing else helps them.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from megatron_m2.training import checkpoint
from megatron_m2.training.checkpoint.tensors import StateReader
from megatron_m2.training.metrics import MACHINE_PREFIXES, read_metrics

REPOSITORY = Path(__file__).resolve().parents[1]
LAYOUT = ["parallel.pp=2", "parallel.ep=2"]  # stages on different hosts, experts within one, data parallelism between two ranks each
PATIENCE_S = 120.0  # until ranks are up, a step is done
START_UP_S = 6.0  # a kill in the start-up comes within so much of the processes' start


@dataclass(frozen=True)
class Host:
    """How to run a command on it, with which environment, and its name."""

    name: str
    prefix: tuple[str, ...]
    environment: dict[str, str]


@contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """This machine, or two network namespaces of it.

    Raises:
        ValueError: namespaces cannot be made here.
    """
    if count == 1:
        yield [Host("here", (), {})]
        return
    if os.geteuid() != 0 or shutil.which("ip") is None:
        raise ValueError(f"--hosts {count}: needs root, and `ip` of the package iproute2")
    spaces = [f"m2-{os.getpid()}-{i}" for i in range(count)]
    try:
        for space in spaces:
            ip("netns", "add", space)
        ip("-n", spaces[0], "link", "add", "veth0", "type", "veth", "peer", "name", "veth0", "netns", spaces[1])
        for i, space in enumerate(spaces):
            ip("-n", space, "address", "add", f"10.0.0.{i + 1}/24", "dev", "veth0")
            for device in ("lo", "veth0"):
                ip("-n", space, "link", "set", device, "up")
        yield [Host(f"host{i}", ("ip", "netns", "exec", space, "unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', f"host{i}"),
                    {"NNODES": str(count), "NODE_RANK": str(i), "MASTER_ADDR": "10.0.0.1", "LOCAL_ADDR": f"10.0.0.{i + 1}",
                     "GLOO_SOCKET_IFNAME": "veth0"}) for i, space in enumerate(spaces)]
    finally:
        for space in spaces:
            subprocess.run(["ip", "netns", "delete", space], check=False)


def ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


class Job:
    """One scripts/train.sh per host, all with the same overrides."""

    def __init__(self, where: list[Host], ranks_per_host: int, folder: Path, overrides: list[str]) -> None:
        self.folder, self.world = folder, len(where) * ranks_per_host
        self.argument = f"run.dir={folder}"
        common = {**os.environ, "NPROC": str(ranks_per_host), "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, "MAX_RESTARTS": "100"}
        folder.mkdir(parents=True)
        self.launchers = []
        for host in where:
            with open(folder / f"{host.name}.log", "w") as log:
                command = [*host.prefix, str(REPOSITORY / "scripts" / "train.sh"), *overrides, self.argument]
                self.launchers.append(subprocess.Popen(command, env={**common, **host.environment}, stdout=log, stderr=log))

    def ranks(self) -> dict[int, int]:
        """Process of each rank that runs."""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if self.argument.encode() in (process / "cmdline").read_bytes().split(b"\0"):
                    environment = dict(v.split(b"=", 1) for v in (process / "environ").read_bytes().split(b"\0") if b"=" in v)
                    if b"RANK" in environment:
                        found[int(environment[b"RANK"])] = int(process.name)
            except (FileNotFoundError, ProcessLookupError):
                continue
        return found

    def steps(self) -> int:
        """Last step on record."""
        rows = read_metrics(self.folder / "metrics.jsonl")
        return int(rows[-1]["step"]) if rows else 0

    def wait_for(self, what: str, condition: Callable[[], bool]) -> None:
        """Raises RuntimeError when the job ends first, or it takes too long."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            if any(p.poll() is not None for p in self.launchers):
                raise RuntimeError(f"{what}: the job ended first\n{self.log()[-3000:]}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"{what}: not within {PATIENCE_S:.0f} s\n{self.log()[-3000:]}")
            time.sleep(0.02)

    def finish(self, limit_s: float) -> list[int]:
        """Exit status of every launcher."""
        deadline = time.monotonic() + limit_s
        return [p.wait(max(0.1, deadline - time.monotonic())) for p in self.launchers]

    def log(self) -> str:
        return "".join(p.read_text(errors="replace") for p in sorted(self.folder.glob("*.log")))

    def kill(self) -> None:
        """All that may be left of it."""
        for pid in [p.pid for p in self.launchers if p.poll() is None]:
            os.kill(pid, signal.SIGTERM)
        for p in self.launchers:
            p.wait()


def kill_one(job: Job, before: dict[int, int], rng: random.Random) -> dict[int, int]:
    """Waits until the ranks that follow ``before`` run, and kills one: sometimes while they start, mostly some steps later.

    Returns:
        The processes of that start.
    """
    def all_new() -> bool:
        now = job.ranks()
        return len(now) == job.world and not set(now.values()) & set(before.values())

    job.wait_for("ranks", all_new)
    ranks = job.ranks()
    if rng.random() < 0.2:
        time.sleep(rng.random() * START_UP_S)
    else:
        step = job.steps()
        # the rows of steps that are done again are removed first
        job.wait_for("a step", lambda: job.steps() != step)
        time.sleep(rng.random())
    victim = rng.randrange(job.world)
    os.kill(ranks[victim], signal.SIGKILL)
    print(f"killed rank {victim} (pid {ranks[victim]}) at step {job.steps()}", flush=True)
    return ranks


def final_state(folder: Path) -> dict[str, torch.Tensor | str]:
    """All tensors of the newest checkpoint, and the position in the data."""
    newest = checkpoint.resolve(folder)
    checkpoint.verify(newest)
    reader, names = StateReader(newest / "state"), dcp.FileSystemReader(newest / "state").read_metadata().state_dict_metadata
    return {**{name: reader.part(name, ()) for name in names}, "trainer.json": (newest / "trainer.json").read_text()}


def repeatable(folder: Path) -> list[dict[str, float]]:
    """Rows of metrics.jsonl without what measures the machine."""
    return [{k: v for k, v in row.items() if not k.startswith(MACHINE_PREFIXES)} for row in read_metrics(folder / "metrics.jsonl")]


def differences(one: Path, other: Path) -> list[str]:
    """What is not the same at the end of two runs; empty for equal ones."""
    a, b = final_state(one), final_state(other)
    found = [f"only in one: {name}" for name in a.keys() ^ b.keys()]
    for name in a.keys() & b.keys():
        x, y = a[name], b[name]
        if not (torch.equal(x, y) if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor) else x == y):
            found.append(f"differs: {name}")
    rows = repeatable(one), repeatable(other)
    if rows[0] != rows[1]:
        steps = [[r["step"] for r in each] for each in rows]
        found.append("metrics.jsonl has other " + ("figures" if steps[0] == steps[1] else f"steps: {steps[0]} and {steps[1]}"))
    return found


def check(where: list[Host], ranks_per_host: int, folder: Path, overrides: list[str], kills: int, seed: int, limit_s: float) -> list[str]:
    """An undisturbed run and one with kills; what differs, empty for a success."""
    started, rng = time.monotonic(), random.Random(seed)
    jobs = []
    try:
        for name in ("undisturbed", "killed"):
            job = Job(where, ranks_per_host, folder / name, overrides)
            jobs.append(job)
            ranks: dict[int, int] = {}
            for _ in range(kills if name == "killed" else 0):
                ranks = kill_one(job, ranks, rng)
            statuses = job.finish(limit_s - (time.monotonic() - started))
            print(f"{name}: status {statuses}, {job.steps()} steps, {time.monotonic() - started:.0f} s so far", flush=True)
            if any(statuses):
                return [f"{name}: ended with {statuses}\n{job.log()[-3000:]}"]
        lines = [line for line in jobs[1].log().splitlines() if line.startswith("error: ")]
        print(*lines, sep="\n")
        return differences(folder / "undisturbed", folder / "killed")
    finally:
        for job in jobs:
            job.kill()


def prepare(folder: Path) -> list[str]:
    """A small data set from this repository's sources; returns the overrides of a run on it."""
    command = [sys.executable, str(REPOSITORY / "tools" / "prepare_data.py"), "--out", str(folder), "--vocab-size", "320",
               "--source", f"folder:{REPOSITORY / 'megatron_m2'}"]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
    return [f"data.path={folder}", "~data.blend.prose", "model=tiny", "model.vocab_size=320", "data.seq_len=64",
            "data.tokens_per_forest=128"]


RUN = ["stage.warmup_steps=4", "stage.decay_steps=20", "stage.forests_per_step=4", "run.save_every=3", "run.log_every=1",
       "run.eval_every=25", "run.sample_tokens=0", "run.export=false", "run.wandb=disabled", "run.device=cpu", "parallel.timeout_s=60"]


def main(arguments: list[str]) -> int:
    """Returns the exit status: 0 the same, 1 something differs, 2 it cannot be run here."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, choices=(1, 2), default=2)
    parser.add_argument("--ranks-per-host", type=int, default=2)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--steps", type=int, default=300, help="of the run; it must last until the last kill")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the ranks to kill")
    parser.add_argument("--limit", type=float, default=1200.0, help="seconds for all")
    parser.add_argument("overrides", nargs="*", default=LAYOUT)
    a = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        try:
            with hosts(a.hosts) as where:
                overrides = [*prepare(folder / "data"), *RUN, f"stage.steps={a.steps}", *a.overrides]
                found = check(where, a.ranks_per_host, folder, overrides, a.kills, a.seed, a.limit)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    print("\n".join(found) if found else f"OK: after {a.kills} kills the same weights, optimizer, data position and metrics, bit for bit")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

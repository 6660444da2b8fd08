"""Ends a job in which a rank died or stalls, with one line that names rank, host, collective and last good step.

Every rank has a thread that writes a sign of life to a store which outlives the ranks (scripts/train.sh lends the launcher's) and reads
that of the next rank; ranks of one host also wait on each other's processes, so that a death there shows at once. Whoever finds
something wrong writes the verdict. There is one per start of the ranks: its author prints it, and all ranks end with its status.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist

from megatron_m2.parallel.position import Position, record_collectives

BOARD = "M2_BOARD"  # environment: host:port of the store that outlives the ranks
STATUS = "M2_STATUS"  # environment: file for the status of a job that another start would not help
PATIENCE = 0.7  # share of timeout_s after which a silent rank or a collective is looked into: looking twice and ending take the rest
LOOKS = 3  # signs of life that a rank may miss between the two looks

Explain = Callable[[Exception], "tuple[str, int] | None"]  # what to tell the user of an error and the status; None for a bug


@dataclass(frozen=True)
class Sign:
    """What a rank tells the others, every second.

    Attributes:
        number: counts them. done: the rank has ended well.
        step: last good one. lost: why a collective failed on it, "" while all is well.
        position: see :class:`Position`.
    """

    rank: int
    host: str = ""
    node: int = 0
    pid: int = 0
    number: int = 0
    step: int = 0
    lost: str = ""
    done: bool = False
    position: Position = field(default_factory=Position)

    @classmethod
    def read(cls, text: bytes) -> Sign:
        values = json.loads(text)
        return cls(**{**values, "position": Position(**values["position"])})

    @property
    def name(self) -> str:
        return f"rank {self.rank} ({self.host}, pid {self.pid})" if self.host else f"rank {self.rank}"


@dataclass(frozen=True)
class Verdict:
    """How the job ends.

    Attributes:
        line: for the log, without "error: ". status: of every rank.
        final: another start would not help.
        kill: [node, pid] of ranks that do not end by themselves.
    """

    line: str
    status: int = 1
    final: bool = False
    kill: list[list[int]] = field(default_factory=list)


@dataclass
class Progress:
    """What the code under watch tells: the last step that every rank finished."""

    last_step: Callable[[], int] = lambda: 0


@contextlib.contextmanager
def watched(timeout_s: float, explain: Explain) -> Iterator[Progress]:
    """Watches this rank and its neighbours while the body runs; with one rank alone there is nobody to watch.

    An exception in the body ends all ranks, and this process with them: a user's error for good, anything else such that a launcher may
    start the ranks again.

    Args:
        timeout_s: within this time of a death or stall the job has ended.
    """
    progress = Progress()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield progress
        return
    record_collectives()
    watchdog = Watchdog(world, timeout_s, progress)
    watchdog.start()
    # where a rank died, its launcher ends the others of its host: not before one of them has said why
    before = signal.signal(signal.SIGTERM, lambda number, frame: watchdog.terminate())
    try:
        yield progress
    except Exception as error:
        watchdog.failed(error, explain)
    watchdog.close()
    signal.signal(signal.SIGTERM, before)


class Watchdog(threading.Thread):
    """The thread; ``threading.main_thread()`` is the one under watch."""

    def __init__(self, world: int, timeout_s: float, progress: Progress) -> None:
        super().__init__(name="watchdog", daemon=True)
        self.world, self.timeout_s, self.progress = world, timeout_s, progress
        self.interval = min(1.0, timeout_s / 20)
        rank, local, per_node, node = (int(os.environ.get(name, default)) for name, default in
                                       (("RANK", 0), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1), ("GROUP_RANK", 0)))
        self.sign = Sign(rank, socket.gethostname(), node, os.getpid())
        self.speaks_for_host = local == 0
        self.mate = rank - local + (local + 1) % per_node  # the next rank of this host
        self.seen = {r: (Sign(r), time.monotonic()) for r in ({(rank + 1) % world, self.mate} | ({0} if local == 0 else set())) - {rank}}
        self.meeting, self.board = open_board(rank, timedelta(seconds=timeout_s))
        self.poll = select.poll()
        self.event = os.eventfd(0)
        self.poll.register(self.event, select.POLLIN)
        self.mate_fd = -1
        self.closing = False
        self.error: Exception | None = None  # of the watched thread
        self.lost = ""  # why that was a failed collective
        self.terminated = float("inf")  # when a launcher's request to end is heeded
        self.held: tuple[str, float] = ("", 0.0)  # collective that this rank waits in, since when
        self.wanted = 0.0  # since when something seems wrong
        self.first_look: tuple[float, list[Sign]] | None = None

    # ---- the watched thread's side ------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """The rank has ended well: others need not miss it."""
        self.closing = True
        self._wake()
        self.join()
        os.close(self.event)

    def failed(self, error: Exception, explain: Explain) -> NoReturn:
        """Ends the job for an exception of this rank, or waits for the verdict where it only met the end of another rank."""
        self.error, self.lost = error, collective_failure(error)
        if self.lost:
            self._wake()
            self.join()
            os._exit(1)  # where the thread has lost the board
        explained = explain(error)
        if explained is None:
            traceback.print_exception(error)
        text, status = explained or (f"{type(error).__name__}: {first_line(error)}", 1)
        verdict = Verdict(f"{self.sign.name}: {text}", status, explained is not None)
        with self._board_or_end():
            found = self._agree(verdict)
            if text not in found.line:
                say(verdict.line)
            self._end(found)

    def terminate(self) -> None:
        """Ends this rank, after the time that a verdict takes."""
        self.terminated = time.monotonic() + (LOOKS + 3) * self.interval

    def _wake(self) -> None:
        os.eventfd_write(self.event, 1)

    # ---- the thread's side --------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        with self._board_or_end():
            while not self.closing:
                self._sign(self._position())
                if self.board.check(["verdict"]):
                    self._end(Verdict(**json.loads(self.board.get("verdict"))))
                self._watch_mate()
                self._look_at_neighbours()
                self._judge()
                if time.monotonic() > self.terminated:
                    os._exit(128 + signal.SIGTERM)
                self._sleep(self.interval)
            self.sign = replace(self.sign, done=True)
            self._sign(self.sign.position)

    def _sleep(self, seconds: float) -> None:
        """Until the time is over, the mate's process ends or the watched thread calls."""
        for fd, _ in self.poll.poll(seconds * 1000):
            if fd == self.event:
                os.eventfd_read(self.event)
            else:
                self._mate_ended()

    def _position(self) -> Position:
        if self.error:
            return Position.of_error(self.error)
        position = Position.of_thread(threading.main_thread().ident or 0)
        if position.collective != self.held[0]:
            self.held = position.collective, time.monotonic()
        return position

    def _sign(self, position: Position) -> None:
        self.sign = replace(self.sign, number=self.sign.number + 1, step=self.progress.last_step(), lost=self.lost, position=position)
        self.board.set(f"rank/{self.sign.rank}", json.dumps(asdict(self.sign)))

    def _read(self, rank: int) -> Sign:
        key = f"rank/{rank}"
        return Sign.read(self.board.get(key)) if self.board.check([key]) else Sign(rank)

    def _look_at_neighbours(self) -> None:
        for rank, (before, _) in list(self.seen.items()):
            now = self._read(rank)
            if now.number != before.number or now.done:
                self.seen[rank] = now, time.monotonic()

    # ---- death on this host -------------------------------------------------------------------------------------------------------

    def _watch_mate(self) -> None:
        """Waits on the mate's process from its first sign of life on."""
        if self.mate_fd >= 0 or self.mate not in self.seen:
            return
        mate, _ = self.seen[self.mate]
        if mate.pid and not mate.done:
            try:
                self.mate_fd = os.pidfd_open(mate.pid)
                self.poll.register(self.mate_fd, select.POLLIN)
            except ProcessLookupError:
                self._mate_ended()

    def _mate_ended(self) -> None:
        if self.mate_fd >= 0:
            self.poll.unregister(self.mate_fd)
            os.close(self.mate_fd)
            self.mate_fd = -1
        mate = self._read(self.mate)
        self.seen[self.mate] = mate, time.monotonic()
        if not mate.done and not self.board.check(["verdict"]):
            self._end(self._agree(self._verdict([mate], "died")))

    # ---- stalls, and deaths elsewhere ---------------------------------------------------------------------------------------------

    def _suspects(self) -> bool:
        """Whether a neighbour gives no sign of life, this rank's collective failed or takes too long."""
        now, patience = time.monotonic(), PATIENCE * self.timeout_s
        silent = any(now - since > patience for sign, since in self.seen.values() if not sign.done)
        return silent or bool(self.lost) or bool(self.held[0] and now - self.held[1] > patience)

    def _judge(self) -> None:
        """Looks at all ranks twice. One does it for all; should it die meanwhile, each speaks for itself."""
        now = time.monotonic()
        if not self._suspects():
            if self.first_look:
                self.board.delete_key("judge")
            self.wanted, self.first_look = 0.0, None
            return
        self.wanted = self.wanted or now
        if self.first_look is None:
            if self.board.compare_set("judge", "", str(self.sign.rank)).decode() == str(self.sign.rank):
                self.first_look = now, self._look_at_all()
            elif now - self.wanted > 3 * LOOKS * self.interval:
                self._end(self._agree(self._verdict([self.sign], "cannot go on" + (f": {self.lost}" if self.lost else ""))))
        elif now - self.first_look[0] > LOOKS * self.interval:
            self._end(self._agree(self._find(self.first_look[1], self._look_at_all())))

    def _look_at_all(self) -> list[Sign]:
        return [self._read(r) for r in range(self.world)]

    def _find(self, first: list[Sign], second: list[Sign]) -> Verdict:
        """Who holds the job up, from two looks at every rank."""
        running = [(a, b) for a, b in zip(first, second, strict=True) if not b.done]
        silent = [b for a, b in running if a.number == b.number and b.rank != self.sign.rank]
        if silent:
            # a process that ends closes its connections, one that is stopped does not: a collective with it fails for want of time
            timed_out = not any(b.lost for _, b in running) or any("imed out" in b.lost for _, b in running)
            return self._verdict(silent, "stalled (stopped, or its host is gone)" if timed_out else "died", kill=timed_out)
        stuck = [b for a, b in running if not b.lost and not b.position.waits and a.position == b.position and a.step == b.step]
        if stuck:
            return self._verdict(stuck, "stalled")
        waiting = sorted((b for _, b in running), key=lambda b: b.position.collective == self.sign.position.collective)
        return self._verdict(waiting[:1], "waits for others, as all ranks do")

    def _verdict(self, ranks: list[Sign], what: str, kill: bool = False) -> Verdict:
        """Of what happened to these ranks."""
        one, mine = ranks[0], self.sign
        others = f" and {len(ranks) - 1} more" if len(ranks) > 1 else ""
        # no rank ends a step before all have done their part, so the latest figure holds for all
        step = max(self.progress.last_step(), one.step)
        noticed = f"; {mine.name} is in {self._position()}" if mine.rank != one.rank else ""
        line = f"{one.name}{others} {what}: last seen in {one.position}, last good step {step}{noticed}"
        return Verdict(line, kill=[[r.node, r.pid] for r in ranks if r.pid] if kill else [])

    # ---- the end ------------------------------------------------------------------------------------------------------------------

    def _agree(self, verdict: Verdict) -> Verdict:
        """The first verdict is the one; its author prints it."""
        text = json.dumps(asdict(verdict))
        found = self.board.compare_set("verdict", "", text).decode()
        if found == text:
            say(verdict.line)
        return Verdict(**json.loads(found))

    def _end(self, verdict: Verdict) -> NoReturn:
        time.sleep(2 * self.interval)  # a launcher may take the board with it as soon as its ranks have ended
        for node, pid in verdict.kill:
            if node == self.sign.node:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        sys.stderr.flush()
        os._exit(leave(verdict.status) if verdict.final else verdict.status)

    @contextlib.contextmanager
    def _board_or_end(self) -> Iterator[None]:
        """Where the board is gone, the host that has it is gone, or the launcher there."""
        try:
            yield
        except dist.DistError as error:
            if self.speaks_for_host:
                first = self.seen[0][0] if 0 in self.seen else self.sign
                say(self._verdict([first], "or its launcher died").line + f"; {first_line(error)}")
            os._exit(1)


def open_board(rank: int, timeout: timedelta) -> tuple[dist.Store, dist.Store]:
    """The store where the ranks meet, which must live as long as they, and the board, empty for this start of the ranks.

    Raises:
        ValueError: the ranks were started again in a way that mixes them up with the dead.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        raise ValueError("TORCH_DISABLE_SHARE_RDZV_TCP_STORE = 0: torchrun's restarts need 1, or ranks look for the dead; "
                         "scripts/train.sh sets it")
    meeting, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    if rank == 0:
        meeting.set("start", secrets.token_hex(8))
    start = meeting.get("start").decode()
    host, _, port = os.environ.get(BOARD, "").rpartition(":")
    store = dist.TCPStore(host, int(port), is_master=False, timeout=timeout) if port else meeting
    return meeting, dist.PrefixStore(f"watchdog/{start}", store)


def collective_failure(error: BaseException | None) -> str:
    """What a collective said when another rank left it, "" for any other error. Causes count: a checkpoint that cannot be saved
    because a rank died is no failure of the disk."""
    while error is not None:
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
            return first_line(error)
        error = error.__cause__ or error.__context__
    return ""


def first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def say(line: str) -> None:
    """One write, so that lines of several ranks do not mix; on a line of its own, should a progress bar stand there."""
    os.write(2, f"\nerror: {line}\n".encode())


def leave(status: int) -> int:
    """The status for a launcher that starts failed ranks again: 0, with the true one in the file that it reads; else the status."""
    if STATUS not in os.environ:
        return status
    with open(os.environ[STATUS], "w") as f:
        f.write(str(status))
    return 0

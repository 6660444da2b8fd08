"""Where a rank is: the code it runs and the collective it waits in, for the line that a failed job ends with."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch._C._distributed_c10d as c10d

PACKAGE = "megatron_m2" + os.sep
COLLECTIVES = os.path.join("torch", "distributed", "distributed_c10d.py")  # all that torch calls a collective is in this file
RECORDED = 64  # collectives that the flight recorder keeps: those under way, and one is enough to name


@dataclass(frozen=True)
class Position:
    """A rank at a moment.

    Attributes:
        code: innermost function of this package, "training/trainer.py train_step"; "" before any.
        call: the function of torch.distributed that it called, "all_reduce"; "" for none.
        collective: under way and on record, "all_reduce #31 of group dp"; "" for none.
        waits: for other ranks, as far as can be told.
    """

    code: str = ""
    call: str = ""
    collective: str = ""
    waits: bool = False

    @classmethod
    def of_thread(cls, ident: int) -> Position:
        """Where a thread of this process is now."""
        return cls._of(_frames(sys._current_frames()[ident]))

    @classmethod
    def of_error(cls, error: BaseException) -> Position:
        """Where an exception was raised."""
        return cls._of(((f.filename, f.name) for f in reversed(traceback.extract_tb(error.__traceback__))), failed=True)

    @classmethod
    def _of(cls, frames: Iterable[tuple[str, str]], failed: bool = False) -> Position:
        """Of a stack of (file, function), the innermost first. ``failed``: its collective has ended, in an error."""
        call, code, first = "", "", ""
        for file, function in frames:
            first = first or file
            if PACKAGE in file:
                code = f"{file.rpartition(PACKAGE)[2]} {function}"
                break
            if file.endswith(COLLECTIVES):
                call = function
        # waiting for an asynchronous collective is a method of C++, which has no frame: then the caller of it is the innermost
        waits = bool(call) or (PACKAGE in first and code.startswith("parallel" + os.sep))
        gloo = recorded("gloo")[-1:] if waits else []
        if failed and call and "send" not in call and "recv" not in call:  # of gloo, those are not on record
            return cls(code, call, described(gloo[0]) if gloo else "", True)
        collective = pending(recorded("nccl"), gloo)
        return cls(code, call, collective, waits or bool(collective))

    def __str__(self) -> str:
        return " in ".join(part for part in (self.collective or self.call, self.code) if part) or "start-up"


def _frames(frame: Any) -> Iterator[tuple[str, str]]:
    while frame is not None:
        yield frame.f_code.co_filename, frame.f_code.co_name
        frame = frame.f_back


def record_collectives() -> None:
    """Has torch's flight recorder keep the last collectives; to be called before the first process group is made."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(RECORDED))


def recorded(backend: str) -> list[Mapping[str, Any]]:
    """What the flight recorder has of collectives over "nccl" or "gloo", oldest first."""
    name = {"nccl": "_dump_nccl_trace_json", "gloo": "_dump_fr_trace_json"}[backend]
    dump: Callable[[bool, bool], bytes] | None = getattr(c10d, name, None)  # a CPU-only torch knows no NCCL
    entries: list[Mapping[str, Any]] = json.loads(dump(True, False)).get("entries", []) if dump else []
    return [e for e in entries if e["profiling_name"].startswith(backend)]


def pending(nccl: Iterable[Mapping[str, Any]], gloo: Iterable[Mapping[str, Any]]) -> str:
    """The collective that holds a rank up; "" for none.

    Args:
        nccl: all on record: NCCL runs them in order on the GPU while the host is far ahead, so it is the oldest one that has not ended.
        gloo: the newest, since gloo's block the host. Older ones may seem open for ever: torch never marks the end of a barrier.
    """
    return next((described(e) for e in (*nccl, *gloo) if not e["retired"] and e["state"] != "completed"), "")


def described(entry: Mapping[str, Any]) -> str:
    """As in "all_reduce #31 of group dp"."""
    name, description = entry["process_group"]
    number = entry["p2p_seq_id"] if entry["is_p2p"] else entry["collective_seq_id"]
    return f"{entry['profiling_name'].partition(':')[2]} #{number} of group {name if description in ('', 'undefined') else description}"

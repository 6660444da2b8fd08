"""What the benches share: alternated timing, the table, the JSON lines and the cards of ``results/``."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

ROUNDS = 31


@dataclass(frozen=True)
class Figure:
    """One measured figure, the less the better, beside its baseline's in the same run.

    Attributes:
        bench, metric: what was measured.
        value, baseline: in ``unit``; times are medians.
        bytes_moved: least memory traffic of the work, for the rate in GB/s; 0 where it says nothing.
        target: the figure the project wants, in words; empty when there is none.
    """

    bench: str
    metric: str
    value: float
    baseline: float
    bytes_moved: int
    device: str
    target: str = ""
    unit: str = "us"

    def record(self) -> dict[str, object]:
        return {"bench": self.bench, "metric": self.metric, "value": round(self.value, 2), "baseline": round(self.baseline, 2),
                "ratio": round(self.baseline / self.value, 3), "unit": self.unit, "device": self.device}


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def _cpu_seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()  # meets the caches and the heap that the other work left
    calls = 3 if time.perf_counter() - start < 0.5 else 1
    start = time.perf_counter()
    for _ in range(calls):
        work()
    return (time.perf_counter() - start) / calls


def _as_graph(work: Callable[[], None]) -> torch.cuda.CUDAGraph:
    torch.cuda.synchronize()  # the inputs were made on another stream
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # the warm-up that capturing autograd asks for
        for _ in range(3):
            work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def _graph_seconds(graph: torch.cuda.CUDAGraph) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def medians_us(works: Sequence[Callable[[int], None]], num_inputs: int, device: torch.device, rounds: int = ROUNDS) -> list[float]:
    """Median time of one call of each work, called with the index of its input set; the works alternate, so drift hits all alike.

    On a GPU a CUDA graph runs each work over every input set and replays, so that launches from Python are not what is timed;
    enough input sets keep the data out of the L2 cache.
    """

    def over_inputs(work: Callable[[int], None]) -> None:
        for i in range(num_inputs):
            work(i)

    once = [partial(over_inputs, work) for work in works]
    if device.type == "cuda":
        timed = [partial(_graph_seconds, _as_graph(work)) for work in once]
    else:
        timed = [partial(_cpu_seconds, work) for work in once]
    for _ in range(min(3, rounds)):
        for measure in timed:
            measure()
    measured = [[measure() for measure in timed] for _ in range(rounds)]
    return [1e6 * statistics.median(times) / num_inputs for times in zip(*measured, strict=True)]


def report(figures: Sequence[Figure]) -> None:
    """A table for people, then one JSON object a line; the last line is the last figure's."""
    print(f"{figures[0].device}, torch {torch.__version__}")
    width = 2 + max(len(f.bench + f.metric) for f in figures)
    print(f"{'':{width}s}{'value':>14s}{'GB/s':>7s}{'baseline':>14s}  unit{'ratio':>8s}  target")
    for f in figures:
        rate = f"{f.bytes_moved / f.value / 1e3:7.0f}" if f.bytes_moved else f"{'':7s}"
        name, ratio = f"{f.bench} {f.metric}", f.baseline / f.value
        print(f"{name:{width}s}{f.value:14,.1f}{rate}{f.baseline:14,.1f}  {f.unit:4s}{ratio:8.2f}  {f.target}")
    for f in figures:
        print(json.dumps(f.record()))


def write_cards(figures: Sequence[Figure], folder: Path, commit: str) -> None:
    """One card per bench and device of what was run, where, and what came out."""
    for bench in dict.fromkeys(f.bench for f in figures):
        mine = [f for f in figures if f.bench == bench]
        records = []
        for f in mine:
            compared = {k: v for k, v in f.record().items() if k in ("value", "baseline", "ratio", "unit")}
            rate = {"gb_per_s": round(f.bytes_moved / f.value / 1e3, 1)} if f.bytes_moved else {}
            records.append({"measured": f.metric, **compared, **rate, "target": f.target})
        write_card(folder, bench, mine[0].device, commit, records)


def write_card(folder: Path, name: str, device: str, commit: str, figures: Sequence[dict[str, object]]) -> None:
    """Writes ``folder/NAME_DEVICE.yaml``: the command, the commit, the device and the figures, each a flat mapping."""
    folder.mkdir(parents=True, exist_ok=True)
    words = [Path(word).name if word.startswith("/") else word for word in sys.argv]  # where things lie here says nothing elsewhere
    head = {"command": "python " + " ".join(words), "commit": commit, "device": device, "torch": torch.__version__,
            "date": datetime.date.today().isoformat()}
    lines = [f"{key}: {json.dumps(value)}" for key, value in head.items()] + ["figures:"]
    for figure in figures:
        first, *rest = (f"{key}: {json.dumps(value)}" for key, value in figure.items())
        lines += [f"  - {first}", *(f"    {line}" for line in rest)]
    (folder / f"{name}_{device.split(',')[0].lower().replace(' ', '_')}.yaml").write_text("\n".join(lines) + "\n")


def add_card_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that every program which can write cards has."""
    parser.add_argument("--cards", type=Path, help="folder to write one YAML card per bench to")
    parser.add_argument("--commit", default="unknown", help="named in the cards")

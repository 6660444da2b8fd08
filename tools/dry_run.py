"""Builds every kind of rank of a layout without its weights and runs one forest through it for shapes, on any machine.

    python tools/dry_run.py model=m2 parallel=m2_2048 [--world 2048] [overrides of hydra_configs/train.yaml]

Starts from data=m2_8k and stage=m2_constant unless others are given. Prints, per rank, parameters, bytes of weights, gradients, optimizer
and activations, and what it says to other ranks; then what all ranks hold together, which must be the model's own count.
"""

from __future__ import annotations

import argparse
import sys
import time

from megatron_m2.planning.dry_run import RankReport, dry_run
from megatron_m2.training.compose import read_config

GIB = 2**30


def row(report: RankReport) -> str:
    layers = " ".join(f"{s.start}-{s.stop - 1}" if s.stop > s.start else "head" for s in report.spans.values())
    states = (report.weight_bytes, report.gradient_bytes, report.optimizer_bytes, report.held, report.transient)
    columns = [f"{report.pp:3d} {report.alike:6d}  {layers:20s} {sum(report.parameters.values()):15,d}"]
    columns += [f"{b / GIB:9.2f}" for b in (*states, sum(states))]
    return " ".join(columns)


def traffic(report: RankReport) -> list[str]:
    lines = [f"  pp {report.pp}: per forest"]
    for (axis, kind), calls in sorted(report.calls.items()):
        lines[0] += f"  {axis} {kind} {calls} x {report.bytes[axis, kind] / calls / 2**20:.1f} MiB"
    lines[0] += f"  pipeline {report.handed_on / 2**20:.1f} MiB"
    step = "  ".join(f"{axis} {kind} {size / GIB:.2f} GiB" for (axis, kind), size in report.step_bytes.items())
    return [*lines, f"        per step  {step}"]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=int, default=2048, help="number of ranks (default 2048)")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    try:
        config = read_config(["data=m2_8k", "stage=m2_constant", *options.overrides])
        reports = []
        print(f"{'pp':>3s} {'alike':>6s}  {'layers':20s} {'parameters':>15s} " + " ".join(
            f"{name:>9s}" for name in ("weights", "grads", "optimizer", "held", "transient", "all GiB")))
        for report in dry_run(config, options.world):
            print(row(report), flush=True)
            reports.append(report)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\nwhat a rank says to the others")
    print("\n".join(line for report in reports for line in traffic(report)))
    wholes = {name: size for report in reports for name, size in report.wholes.items()}
    total, own = sum(wholes.values()), config.model.num_parameters()
    print(f"\nall ranks together: {total:,} parameters; the model's own count: {own:,}; {time.perf_counter() - started:.0f} s")
    return 0 if total == own else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

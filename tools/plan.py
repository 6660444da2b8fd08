#!/usr/bin/env python3
"""Ranks the legal layouts of a training run on a cluster, without starting anything.

    python tools/plan.py model=m2 cluster=h800_2048                     # legal layouts that fit, the fastest first; days of each stage
    python tools/plan.py model=m2 cluster=h200_2048 model.fp8_experts=true plan.seq_len=32768 plan.tp=1 plan.top=3
    python tools/plan.py model=quickstart cluster=laptop plan.seq_len=512 plan.batch_tokens=2048 recipe=none
    python tools/plan.py --calibrate                                    # the estimator beside published runs

Arguments are Hydra overrides of hydra_configs/plan.yaml. --json prints plain values instead of tables.
"""

from __future__ import annotations

import argparse
import json
import sys

from megatron_m2.planning import report
from megatron_m2.planning.calibrate import compare
from megatron_m2.planning.config import read_devices, read_plan
from megatron_m2.planning.recipe import checkpoints, stretches
from megatron_m2.planning.search import search


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="group=option, group.key=value")
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the tables")
    parser.add_argument("--calibrate", action="store_true", help="print published runs beside the estimates of them, and end")
    return parser.parse_args(argv)


def plan(args: argparse.Namespace) -> str:
    """What to print.

    Raises:
        ValueError: a configuration that is not legal, in one line.
    """
    if args.calibrate:
        found = compare(read_devices(args.overrides))
        values = [{"run": c.run.name, "published": c.run.tokens_per_s, "estimate": c.tokens_per_s, "ratio": c.ratio} for c in found]
        return json.dumps(values) if args.json else report.calibration(found)
    config = read_plan(args.overrides)
    ranked = search(config.job(), config.device, config.plan)
    days = stretches(config) if ranked.plans else []
    saving = checkpoints(config.model, config.cluster.ranks, config.device)
    if args.json:
        return json.dumps(report.values(config, ranked, days, saving))
    return report.text(config, ranked, days, saving)


def main(argv: list[str] | None = None) -> int:
    try:
        print(plan(parse_args(argv)))
    except ValueError as error:
        print(f"plan: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The planner's answers as text and as plain values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from megatron_m2.planning.calibrate import Comparison
from megatron_m2.planning.cluster import Device
from megatron_m2.planning.config import PlannerConfig
from megatron_m2.planning.job import Layout, forests_per_step, microbatches, stages
from megatron_m2.planning.memory import Memory
from megatron_m2.planning.recipe import Checkpoints, Stretch
from megatron_m2.planning.search import Found, Plan

_PARTS = {"products": "matrix products but the experts'", "experts": "experts", "attention": "attention", "elementwise": "element-wise",
          "host": "launches and waits", "tp": "tensor parallel traffic", "cp": "context parallel traffic", "ep": "expert parallel traffic",
          "pp": "pipeline traffic", "idle": "pipeline idle", "dp": "gradients and weights among replicas", "optimizer": "optimizer"}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need, numbers to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    right = [all(row[i][:1].isdigit() or row[i] in ("-", "") for row in rows) for i in range(len(header))]
    return "\n".join("  ".join(cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right, strict=True)).rstrip()
                     for row in (header, *rows))


def text(config: PlannerConfig, found: Found, stretches: Sequence[Stretch], checkpoints: Checkpoints) -> str:
    """Everything that the tool prints."""
    parts = [_heading(config), _counts(config, found)]
    if found.plans:
        parts += [_layouts(config, found.plans), _best(config, found.plans[0]), _checkpoints(checkpoints)]
        if stretches:
            parts.append(_stretches(config, stretches))
    parts.append(_assumptions(config.device))
    return "\n\n".join(parts)


def _heading(config: PlannerConfig) -> str:
    m, c, p = config.model, config.cluster, config.plan
    return (f"{m.num_parameters():,} weights ({m.num_active_parameters() / 1e9:.2f}B active in the layers, {m.num_mtp_modules} MTP) on "
            f"{c.nodes} x {c.gpus_per_node} {c.device}\nchains of {p.seq_len:,}, {p.batch_tokens:,} tokens a step, "
            f"experts in {'FP8' if m.fp8_experts else 'bf16'}")


def _counts(config: PlannerConfig, found: Found) -> str:
    refused = ", ".join(f"{n} for {name}" for name, n in sorted(found.refused.items(), key=lambda item: -item[1]))
    line = f"{len(found.plans)} layouts are legal and fit; {found.too_large} need more memory than there is"
    if not found.plans and found.smallest:
        layout, memory = found.smallest
        line += (f"; the closest ({_name(layout)}) needs {memory.total / 1e9:.1f} GB of "
                 f"{(config.device.memory.value - config.device.reserve.value) / 1e9:.1f}")
    return f"{line}; refused: {refused or 'none'}"


def _name(layout: Layout) -> str:
    p = layout.parallel
    chunks = f" x {p.vpp}" if p.vpp > 1 else ""
    return f"pp {p.pp}{chunks} {p.schedule} cp {p.cp} tp {p.tp} ep {p.ep}"


def _layouts(config: PlannerConfig, plans: Sequence[Plan]) -> str:
    rows = []
    for plan in plans[: config.plan.top]:
        layout, t, p = plan.layout, plan.time, plan.layout.parallel
        rows.append([str(p.pp), str(p.vpp), str(p.cp), str(p.tp), str(p.ep), str(p.dp(t.ranks)), f"{layout.tokens_per_forest:,}",
                     p.schedule, "yes" if p.recompute else "no", str(layout.sharding.zero), f"{plan.memory.total / 1e9:.1f}",
                     f"{t.total:.3g}", f"{t.tokens_per_s:,.0f}", f"{t.tokens_per_s / t.ranks:,.0f}", f"{100 * t.mfu:.1f}%",
                     f"{100 * t.seconds['idle'] / t.total:.0f}%"])
    header = ["pp", "vpp", "cp", "tp", "ep", "dp", "forest", "schedule", "recompute", "zero", "GB", "s/step", "tokens/s", "each", "MFU",
              "idle"]
    return table(header, rows)


def _best(config: PlannerConfig, plan: Plan) -> str:
    job, layout, t = config.job(), plan.layout, plan.time
    room = config.device.memory.value - config.device.reserve.value
    chunks = " ".join("+".join(map(str, stage.layers)) for stage in stages(job, layout))
    memory = [[name, f"{size / 1e9:.2f}"] for name, size in _memory_parts(plan.memory)]
    seconds = [[_PARTS[name], f"{value:.3f}", f"{100 * value / t.total:.1f}%"] for name, value in t.seconds.items() if value > 0]
    traffic = [[x.name, f"{x.near / 1e9:.2f}", f"{x.far / 1e9:.2f}", f"{x.messages:,.0f}", f"{x.seconds(config.device):.3f}"]
               for x in t.traffic]
    lines = [f"The first of these: {_name(layout)} dp {layout.parallel.dp(t.ranks)}, {microbatches(job, layout)} microbatches of "
             f"{layout.tokens_per_forest:,} tokens each way, {forests_per_step(job, layout):,} forests a step",
             f"layers of each stage: {chunks}",
             "", table([f"memory of the fullest rank (stage {plan.stage}; {room / 1e9:.1f} GB to use)", "GB"], memory),
             "", table(["a step of the slowest stage", "s", "share"], seconds),
             "", f"{t.flops / 1e15:,.1f} PFLOP a step, {t.flops / t.ranks / 1e12:,.1f} TFLOP each, "
                 f"{t.flops / t.total / t.ranks / 1e12:.0f} TFLOP/s each of {t.peak / 1e12:.0f}"]
    if traffic:
        lines += ["", table(["a rank sends in a step", "GB in the node", "GB out of it", "messages", "s if not hidden"], traffic)]
    return "\n".join(lines)


def _memory_parts(memory: Memory) -> list[tuple[str, int]]:
    parts = [(f.name, getattr(memory, f.name)) for f in fields(memory) if f.name != "mtp"]
    return [*parts, ("total", memory.total), ("of these for MTP", memory.mtp)]


def _checkpoints(c: Checkpoints) -> str:
    return (f"a checkpoint has {c.bytes / 1e12:.3g} TB and takes {c.seconds:.0f} s; one failure in {c.failures / 3600:.3g} h: save every "
            f"{c.interval / 60:.0f} min of training, {100 * c.useful:.1f}% of the time is then useful")


def _stretches(config: PlannerConfig, stretches: Sequence[Stretch]) -> str:
    rows = []
    for s in stretches:
        cells = [s.name, f"{s.stage.tokens / 1e12:g}T", f"{s.stage.seq_len:,}", str(s.stage.num_mtp_modules)]
        if s.plan is None:
            rows.append([*cells, s.why, *[""] * 6])
            continue
        t, layout = s.plan.time, s.plan.layout
        how = f"{_name(layout)}{' recompute' if layout.parallel.recompute else ''} zero {layout.sharding.zero}"
        rows.append([*cells, how, f"{t.tokens_per_s:,.0f}", f"{t.tokens_per_s / t.ranks:,.0f}", f"{100 * t.mfu:.1f}%", f"{s.days:.1f}",
                     f"{s.elapsed:.1f}", f"{s.days * 24 * t.ranks / 1e6:.2f}M"])
    lines = table(["stage", "tokens", "chain", "MTP", "layout", "tokens/s", "each", "MFU", "days", "with failures", "GPU hours"], rows)
    done = [s for s in stretches if s.plan]
    return (f"{lines}\n{sum(s.stage.tokens for s in done) / 1e12:.1f}T tokens in {sum(s.days for s in done):.1f} days of steps, "
            f"{sum(s.elapsed for s in done):.1f} with checkpoints and failures")


def _assumptions(device: Device) -> str:
    names = [f.name for f in fields(device) if getattr(device, f.name).kind == "assumption"]
    return (f"Estimates. Measured or published by others, not by this code on a GPU: all rates but the assumed {', '.join(names)}.\n"
            "Sources: hydra_configs/rates; the decay's split into contexts is assumed: hydra_configs/recipe. How far off: --calibrate.")


def calibration(comparisons: Sequence[Comparison]) -> str:
    """Published runs and the estimates beside them."""
    rows = [[c.run.name, c.run.routing, f"{c.run.tokens_per_s:,.0f}", f"{c.tokens_per_s:,.0f}", f"{c.ratio:.2f}",
             f"{100 * c.time.mfu:.1f}%", c.run.source, c.run.differs] for c in comparisons]
    ratios = [c.ratio for c in comparisons]
    return (table(["published run", "routing", "tokens/s each", "estimate", "ratio", "MFU", "source", "left out"], rows)
            + f"\nestimates are {min(ratios):.2f} to {max(ratios):.2f} times what was published")


def values(config: PlannerConfig, found: Found, stretches: Sequence[Stretch], checkpoints: Checkpoints) -> dict[str, Any]:
    """The same for a program."""
    return {"parameters": config.model.num_parameters(), "ranks": config.cluster.ranks, "fitting": len(found.plans),
            "too_large": found.too_large, "refused": found.refused,
            "plans": [_plan_values(plan) for plan in found.plans[: config.plan.top]],
            "checkpoints": asdict(checkpoints), "recipe": [_stretch_values(s) for s in stretches]}


def _stretch_values(s: Stretch) -> dict[str, Any]:
    if s.plan is None:
        return {"name": s.name, **asdict(s.stage), "plan": None, "why": s.why}
    return {"name": s.name, **asdict(s.stage), "days": s.days, "days_with_failures": s.elapsed, "plan": _plan_values(s.plan)}


def _plan_values(plan: Plan) -> dict[str, Any]:
    t = plan.time
    return {"layout": asdict(plan.layout), "dp": plan.layout.parallel.dp(t.ranks), "fullest_stage": plan.stage,
            "memory_bytes": {**asdict(plan.memory), "total": plan.memory.total}, "seconds": {**t.seconds, "total": t.total},
            "flops": t.flops, "tokens_per_s": t.tokens_per_s, "tokens_per_s_per_gpu": t.tokens_per_s / t.ranks, "mfu": t.mfu,
            "traffic": [{**x._asdict(), "bytes": x.bytes} for x in t.traffic]}

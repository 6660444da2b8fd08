"""Warm-up, stable, decay: everything that changes with the step is a pure function of it, so a resumed run needs no schedule state."""

from __future__ import annotations

from megatron_m2.training.config import OptimConfig, StageConfig


def wsd(step: int, stage: StageConfig) -> float:
    """Share of the peak at optimizer step ``step`` (from 0): linear up over the warm-up, 1, linear down over the decay to 0."""
    if step < stage.warmup_steps:
        return (step + 1) / stage.warmup_steps
    return 1.0 - decay_progress(step, stage)


def decay_progress(step: int, stage: StageConfig) -> float:
    """0 until the decay phase starts, then linearly to 1 at the last step."""
    into = step + 1 - (stage.steps - stage.decay_steps)
    return 0.0 if into <= 0 else into / stage.decay_steps


def learning_rate(step: int, optim: OptimConfig, stage: StageConfig) -> float:
    """Between ``min_lr_ratio * lr`` and ``lr`` in the decay; from 0 in the warm-up."""
    share = wsd(step, stage)
    if step < stage.warmup_steps:
        return optim.lr * share
    return optim.lr * (optim.min_lr_ratio + (1 - optim.min_lr_ratio) * share)


def mtp_weight(step: int, stage: StageConfig) -> float:
    """Weight of the MTP loss: constant, then annealed over the decay phase (M2: 0.3 to 0.1)."""
    return stage.mtp_weight + (stage.mtp_weight_end - stage.mtp_weight) * decay_progress(step, stage)


def router_bias_rate(step: int, stage: StageConfig) -> float:
    """Step of the bias update: constant, then falling to a tenth, so that the balance settles instead of oscillating."""
    return stage.router_bias_rate * (1 - 0.9 * decay_progress(step, stage))

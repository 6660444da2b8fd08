"""AdamW on fp32 master weights, with gradients accumulated in fp32, for a model that computes in bf16."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from megatron_m2.training.config import OptimConfig


class MasterAdamW:
    """torch's AdamW over fp32 copies of the parameters.

    Each backward adds a parameter's gradient to its fp32 sum and frees it at once; :meth:`step` clips by the global norm, updates the
    masters and writes them back. A parameter that is fp32 (or fp64) is its own master. One-dimensional weights (norms) are not decayed.

    Args:
        named: the model's ``named_parameters()``.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], config: OptimConfig) -> None:
        self.config = config
        self.parameters = dict(named)
        self.masters: dict[str, Tensor] = {}
        for name, p in self.parameters.items():
            master = p if p.dtype in (torch.float32, torch.float64) else nn.Parameter(p.detach().float())
            self.masters[name] = master
            if master is not p:
                p.register_post_accumulate_grad_hook(lambda p, master=master: _move_gradient(p, master))
        matrices = [m for m in self.masters.values() if m.dim() > 1]
        vectors = [m for m in self.masters.values() if m.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=(config.beta1, config.beta2),
                                       eps=config.eps, fused=True)

    def step(self, lr: float) -> float:
        """One update with the gathered gradients, which are then dropped.

        Returns:
            The global gradient norm before clipping.

        Raises:
            FloatingPointError: the norm is not finite; nothing was updated.
        """
        norm = float(nn.utils.clip_grad_norm_(list(self.masters.values()), self.config.grad_clip))
        if norm != norm or norm == float("inf"):
            raise FloatingPointError(f"gradient norm is {norm}")
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        self.write_back()
        return norm

    @torch.no_grad()
    def write_back(self) -> None:
        """Rounds the masters into the model's parameters."""
        for name, p in self.parameters.items():
            if self.masters[name] is not p:
                p.copy_(self.masters[name])

    def state_dict(self) -> dict[str, Any]:
        """Tensors by parameter name: ``master``, ``exp_avg``, ``exp_avg_sq``, ``step``; the latter three exist after the first step."""
        state = {}
        for name, master in self.masters.items():
            state[name] = {"master": master.detach(), **self._moments(master)}
        return state

    def _moments(self, master: Tensor) -> dict[str, Tensor]:
        """AdamW's state of one master, made (as zeros) when there is none yet, so that a checkpoint can be read into it."""
        state = self.adamw.state[master]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(master), torch.zeros_like(master)
        return {k: state[k] for k in ("step", "exp_avg", "exp_avg_sq")}


@torch.no_grad()
def _move_gradient(p: nn.Parameter, master: Tensor) -> None:
    assert p.grad is not None
    if master.grad is None:
        master.grad = p.grad.to(master.dtype)
    else:
        master.grad.add_(p.grad)
    p.grad = None

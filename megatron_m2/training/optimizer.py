"""AdamW on fp32 master weights that are sharded over the ranks holding a weight, for a model that computes in bf16."""

from __future__ import annotations

import importlib
import logging
import math
import time
from collections.abc import Iterable
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megatron_m2.parallel.box import Box, boxed
from megatron_m2.parallel.collectives import gather_rows
from megatron_m2.parallel.data import Bucket, GradientBuckets
from megatron_m2.parallel.mesh import ONE, Mesh
from megatron_m2.parallel.placement import placement_of
from megatron_m2.parallel.sharding import Sharding
from megatron_m2.training.config import OptimConfig

_log = logging.getLogger(__name__)


class MasterAdamW:
    """AdamW over fp32 (fp64 for fp64 weights) copies of the parameters, of which each rank keeps its shards.

    Each backward adds a parameter's gradient to its fp32 sum and frees it at once; :meth:`step` sums over replicas, clips by the global
    norm, updates the masters and writes them back. A parameter that is fp32 or fp64 and not sharded is its own master.
    One-dimensional weights (norms) are not decayed. Building, :meth:`step` and :meth:`write_back` are collective over the mesh.

    Args:
        named: the model's ``named_parameters()``; a rank has its part of them, under the names of the whole model.
        mesh: where :func:`megatron_m2.parallel.placement.placement_of` finds who else holds a parameter.
        apart: gradients of weights whose names begin so are clipped by their own norm, and do not count in that of the others.

    Attributes:
        norm_apart: of the last step, before clipping.
        waited_s: for the last step's gradients to be summed over replicas.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], config: OptimConfig, mesh: Mesh = ONE,
                 sharding: Sharding | None = None, apart: str | None = None) -> None:
        self.config, self.mesh, self.apart, self.norm_apart = config, mesh, apart, 0.0
        self.waited_s = 0.0
        self.parameters = dict(named)
        self.gradients = GradientBuckets(self.parameters.items(), mesh, sharding or Sharding())
        self.masters: dict[str, Tensor] = dict(self.gradients.bare)
        self._place: dict[str, tuple[Bucket, int]] = {n: (b, i) for b in self.gradients.buckets for i, n in enumerate(b.names)}
        self._shards: dict[int, Tensor] = {}  # by bucket: what its masters are parts of
        for number, bucket in enumerate(self.gradients.buckets):
            if _is_master(bucket):
                self.masters |= zip(bucket.names, bucket.parameters, strict=True)
            else:
                self._shards[number] = bucket.new_shard()
                self.masters |= zip(bucket.names, map(nn.Parameter, bucket.boxes(self._shards[number])), strict=True)
        self.masters = {name: self.masters[name] for name in self.parameters}
        names = [name for name, master in self.masters.items() if master.numel()]
        decayed = [self.masters[n] for n in names if self.parameters[n].dim() > 1]
        others = [self.masters[n] for n in names if self.parameters[n].dim() <= 1]
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.adamw = make_adamw(groups, config, next(iter(self.parameters.values())).device.type)
        _log.info("optimizer: %s", self.adamw.name)

    def before_backward(self, last: bool, parameters: Iterable[nn.Parameter] | None = None) -> None:
        """Lets reductions overlap with the coming backward: see :meth:`GradientBuckets.before_backward`."""
        self.gradients.before_backward(last, parameters)

    def gather_gradients(self) -> None:
        """Moves each ``p.grad`` that no hook has moved (a zero-bubble pipeline writes such) into its sum. Idempotent."""
        self.gradients.gather()

    def step(self, lr: float) -> float:
        """One update with the gathered gradients, which are then dropped.

        Returns:
            The global gradient norm before clipping, the same on every rank; without the weights ``apart``.

        Raises:
            FloatingPointError: on every rank: a norm is not finite; nothing was updated.
        """
        started = time.perf_counter()
        self.gradients.finish()
        self.waited_s = time.perf_counter() - started
        try:
            for bucket in self.gradients.buckets:
                for name, gradient in zip(bucket.names, bucket.gradients(), strict=True):
                    self.masters[name].grad = gradient
            norm, self.norm_apart = norms = self._norms()
            if not all(map(math.isfinite, norms)):
                raise FloatingPointError(f"gradient norm is {norm}" + f", of {self.apart} {self.norm_apart}" * (self.apart is not None))
            for names, each in zip(self._clipped_together(), norms, strict=True):
                self._clip(names, each)
            self.adamw.step(lr)
        finally:
            for master in self.masters.values():
                master.grad = None
            self.gradients.reset()
        self.write_back()
        return norm

    def drop_gradients(self) -> None:
        """Forgets what was gathered since the last step. Collective over the mesh."""
        self.gradients.finish()
        self.gradients.reset()

    def _clipped_together(self) -> tuple[list[str], list[str]]:
        """Names of the others, and of those ``apart``."""
        apart = [name for name in self.masters if self.apart is not None and name.startswith(self.apart)]
        return [name for name in self.masters if name not in set(apart)], apart

    def _norms(self) -> tuple[float, float]:
        """Of the gradients of :meth:`_clipped_together` over the whole mesh; each element counts on one of the ranks that hold it.

        The ranks' sums of squares are gathered and added exactly rounded, so that every rank has the same bits in any order.
        """
        repeated = {name for b in self.gradients.buckets if b.replicas.copies.rank > 0 for name in b.names}
        device = next(iter(self.parameters.values())).device
        squares = torch.zeros(2, dtype=torch.float64, device=device)
        for i, names in enumerate(self._clipped_together()):
            counted = [g for n in names if n not in repeated and (g := self.masters[n].grad) is not None and g.numel()]
            if counted:
                squares[i] = torch.stack([n.double() for n in torch._foreach_norm(counted)]).square().sum()
        ranks = gather_rows(squares[None], self.mesh.world, [1] * self.mesh.world.size)
        others, apart = (math.sqrt(math.fsum(r.tolist())) if bool(r.isfinite().all()) else float(r.sum()) for r in ranks.t())
        return others, apart

    def _clip(self, names: Iterable[str], norm: float) -> None:
        """As ``torch.nn.utils.clip_grad_norm_`` does."""
        factor = self.config.grad_clip / (norm + 1e-6)
        gradients = [g for n in names if (g := self.masters[n].grad) is not None and g.numel()]
        if factor < 1 and gradients:
            torch._foreach_mul_(gradients, factor)

    @torch.no_grad()
    def write_back(self) -> None:
        """Rounds the masters into the model's parameters, on all replicas."""
        earlier = None
        for number, shard in self._shards.items():
            bucket = self.gradients.buckets[number]
            gathering = bucket, *bucket.start_gather(shard)
            if earlier is not None:
                earlier[0].finish_gather(*earlier[1:])
            earlier = gathering
        if earlier is not None:
            earlier[0].finish_gather(*earlier[1:])

    def state_dict(self) -> dict[str, dict[str, Tensor | Box]]:
        """By parameter name: ``master``, ``exp_avg``, ``exp_avg_sq`` as this rank's box of the whole weight's, and ``step``."""
        state: dict[str, dict[str, Tensor | Box]] = {}
        for name, master in self.masters.items():
            tensors = {"master": master.detach(), **self.adamw.moments(master)}
            state[name] = {"step": self.adamw.steps(master), **{k: self._boxed(name, t) for k, t in tensors.items()}}
        return state

    def weights(self) -> dict[str, Tensor | Box]:
        """This rank's shards of the working weights: what replicas have together, each gives a checkpoint a part of."""
        state: dict[str, Tensor | Box] = {}
        for name, p in self.parameters.items():
            mine = p.detach()
            if name in self._place:
                bucket, index = self._place[name]
                mine = bucket.mine(index, mine)
            state[name] = self._boxed(name, mine)
        return state

    def _boxed(self, name: str, local: Tensor) -> Tensor | Box:
        if name in self._place:
            bucket, index = self._place[name]
            return bucket.boxed(index, local)
        placement = placement_of(self.parameters[name])
        return boxed(local, placement.offsets(local.dim()), placement.whole_shape(tuple(local.shape)))


def _is_master(bucket: Bucket) -> bool:
    """Whether its weights are their own masters."""
    return bucket.replicas.shards.size == 1 and bucket.dtype in (torch.float32, torch.float64)


# ---- whose AdamW ------------------------------------------------------------------------------------------------------------------


class InnerAdamW(Protocol):
    """AdamW over given tensors.

    Attributes:
        name: for the log.
    """

    name: str

    def step(self, lr: float) -> None: ...

    def moments(self, master: Tensor) -> dict[str, Tensor]:
        """``exp_avg`` and ``exp_avg_sq``, made (as zeros) when there are none yet, so that a checkpoint can be read into them."""

    def steps(self, master: Tensor) -> Tensor:
        """fp32 scalar: how many there were."""


def make_adamw(groups: list[dict[str, Any]], config: OptimConfig, device_type: str) -> InnerAdamW:
    """apex's FusedAdam for fp32 tensors on CUDA where apex is importable, else torch's fused AdamW.

    Args:
        groups: with ``params`` and ``weight_decay``; either may be empty.
    """
    dtypes = {p.dtype for group in groups for p in group["params"]}
    apex = _import_apex() if device_type == "cuda" and dtypes == {torch.float32} else None
    return TorchAdamW(groups, config) if apex is None else ApexAdamW([g for g in groups if g["params"]], config, apex)


def _import_apex() -> ModuleType | None:
    try:
        return importlib.import_module("apex.optimizers")
    except ImportError:  # not installed, or PyPI's apex, which is another thing
        return None


class TorchAdamW:
    """torch's fused AdamW."""

    name = "torch.optim.AdamW(fused=True)"

    def __init__(self, groups: list[dict[str, Any]], config: OptimConfig) -> None:
        self._adamw = torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)

    def step(self, lr: float) -> None:
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()

    def _state(self, master: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self._adamw.state[master]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(master), torch.zeros_like(master)
        return state

    def moments(self, master: Tensor) -> dict[str, Tensor]:
        return {k: self._state(master)[k] for k in ("exp_avg", "exp_avg_sq")}

    def steps(self, master: Tensor) -> Tensor:
        return self._state(master)["step"]


class ApexAdamW:
    """apex's FusedAdam, which counts steps per group; here in a tensor, as checkpoints want it."""

    name = "apex.optimizers.FusedAdam"

    def __init__(self, groups: list[dict[str, Any]], config: OptimConfig, apex: ModuleType) -> None:
        self._adam = apex.FusedAdam(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, adam_w_mode=True)
        self._steps = torch.zeros(())

    def step(self, lr: float) -> None:
        for group in self._adam.param_groups:
            group["lr"], group["step"] = lr, int(self._steps)
        self._adam.step()
        self._steps += 1

    def moments(self, master: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self._adam.state[master]
        if not state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(master), torch.zeros_like(master)
        return {k: state[k] for k in ("exp_avg", "exp_avg_sq")}

    def steps(self, master: Tensor) -> Tensor:
        return self._steps

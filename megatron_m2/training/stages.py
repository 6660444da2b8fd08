"""The model on this rank: its pipeline stages (on a laptop one, the whole), forward and backward over a step's forests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from megatron_m2.forest import TokenForest
from megatron_m2.model.config import ModelConfig
from megatron_m2.model.layers import Router
from megatron_m2.model.m2 import NOTHING_ELSE, Asked, M2Output, StageOutput, build_stages
from megatron_m2.ops.weight_grad import Later
from megatron_m2.parallel.box import Box, module_boxes
from megatron_m2.parallel.context import TokenShards
from megatron_m2.parallel.expert import expert_parallel
from megatron_m2.parallel.layout import ParallelConfig
from megatron_m2.parallel.mesh import Mesh
from megatron_m2.parallel.peer_memory import peer_memory
from megatron_m2.parallel.pipeline import SPLIT_BACKWARD, Action, Part, Pipeline, schedule, split_layers, stage_ranks
from megatron_m2.training.streaming import stream

Objective = Callable[[int, StageOutput], Tensor]  # a forest's number, a stage's output -> its share of the loss


class ModelStages:
    """This rank's stages of the model.

    Args:
        depth: mean position of a token, at which stages are balanced: attention costs more the deeper it is.
        seed: of the initial weights; None leaves them to be loaded.
    """

    def __init__(self, model: ModelConfig, parallel: ParallelConfig, mesh: Mesh, dtype: torch.dtype, device: torch.device | str,
                 seed: int | None, depth: int = 0) -> None:
        self.model, self.parallel, self.mesh = model, parallel, mesh
        rank_of = stage_ranks(self._orders(mesh.pp.size))
        self.spans = split_layers([model.layer_flops(depth)] * model.num_hidden_layers, model.last_flops(depth), len(rank_of))
        mine = [stage for stage, rank in enumerate(rank_of) if rank == mesh.pp.rank]
        self.stages = build_stages(model, self.spans, mine, dtype, device, seed, mesh, parallel.recompute)
        if mesh.ep.size > 1:
            self._set_expert_parallel(device)
        splits = mesh.pp.size > 1 and parallel.schedule in SPLIT_BACKWARD
        later = {stage: Later(m.parameters()) for stage, m in self.stages.items()} if splits else {}
        self.pipeline = Pipeline(mesh.pp, rank_of, self.stages, torch.empty(0, dtype=dtype, device=device), later)

    def _set_expert_parallel(self, device: torch.device | str) -> None:
        """One way to the experts for all layers, as the configuration has it."""
        peers, device = self.parallel.ep_peer_mib, torch.device(device)
        exchange = peer_memory(self.mesh.ep, peers << 20, device) if peers else None
        way = partial(expert_parallel, fp8_payload=self.parallel.ep_fp8_payload, chunks=self.parallel.ep_chunks, exchange=exchange)
        for stage in self.stages.values():
            for layer in stage.moe_layers():
                layer.expert_parallel = way

    def _orders(self, microbatches: int) -> Sequence[Sequence[Action]]:
        return schedule(self.parallel.schedule, self.mesh.pp.size, self.parallel.vpp, microbatches)

    # ---- weights --------------------------------------------------------------------------------------------------------------

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Each once, under its name in the whole model."""
        seen: set[str] = set()
        for stage in self.stages.values():
            for name, p in stage.named_parameters():
                if name not in seen:
                    seen.add(name)
                    yield name, p

    def _completed_by(self, stage: int) -> list[nn.Parameter]:
        """Weights whose gradients of a forest are whole after this stage's backward: an embedding that two stages here share gets the
        rest of its own from the first, which comes later."""
        earlier = {id(p) for number, model in self.stages.items() if number < stage for p in model.parameters()}
        return [p for p in self.stages[stage].parameters() if id(p) not in earlier]

    def state_dict(self) -> dict[str, Tensor]:
        """Parameters and router biases, under their names in the whole model."""
        return {name: value for stage in self.stages.values() for name, value in stage.state_dict().items()}

    def boxes(self) -> dict[str, Tensor | Box]:
        """The same at their places in the whole weights: what goes into checkpoints."""
        return {name: value for stage in self.stages.values() for name, value in module_boxes(stage).items()}

    def routers(self) -> Iterator[tuple[int, Router]]:
        """Every router, with its row in the whole model's expert counts."""
        for stage in self.stages.values():
            yield from zip(stage.counted_layers, stage.routers(), strict=True)

    # ---- passes ---------------------------------------------------------------------------------------------------------------

    def train(self, forests: Sequence[TokenForest], objective: Objective,
              before_backward: Callable[[bool, Sequence[nn.Parameter]], None] = lambda last, parameters: None, asked: Asked = NOTHING_ELSE
              ) -> Tensor:
        """Forward and backward over this rank's forests of one step; gradients stay where they were added.

        Args:
            objective: of a forest's number and a stage's output, what to differentiate.
            before_backward: told which weights get their gradients of one more forest next, and whether it is the step's last.
            asked: what the model gives beside log-probs.

        Returns:
            This rank's share of the expert counts, int64 [layers + MTP, E].
        """
        counts = self.no_counts()
        left = dict.fromkeys(self.stages, len(forests))

        def announce(stage: int) -> None:
            left[stage] -= 1
            before_backward(left[stage] == 0, self._completed_by(stage))

        def forward(stage: int, microbatch: int, x: Tensor | None) -> Part:
            part, stage_counts = self.part(stage, microbatch, forests[microbatch], x, objective, asked)
            counts[self.stages[stage].counted_layers] += stage_counts
            return part

        self.pipeline.train(self._orders(len(forests))[self.mesh.pp.rank], forward, self._shapes(forests), announce)
        return counts

    def stream(self, forest: TokenForest, objective: Objective, microbatch: int, piece_tokens: int,
               before_backward: Callable[[bool, Sequence[nn.Parameter]], None] = lambda last, parameters: None, last: bool = True,
               asked: Asked = NOTHING_ELSE) -> Tensor:
        """Forward and backward of one forest in pieces, whatever its size: see :func:`megatron_m2.training.streaming.stream`.

        Args:
            before_backward: as in :meth:`train`, called once: a forest is one microbatch, since other ranks' have other numbers of pieces.
            last: whether it is the step's last forest.
        """
        (model, *_) = self.stages.values()

        def announce(complete: bool) -> None:
            if complete:
                before_backward(last, list(model.parameters()))

        return stream(model, forest, objective, microbatch, piece_tokens, announce, asked)

    def part(self, stage: int, microbatch: int, forest: TokenForest, x: Tensor | None, objective: Objective, asked: Asked = NOTHING_ELSE
             ) -> tuple[Part, Tensor]:
        """Forward of one forest through one stage: what the pipeline needs of it, and its expert counts."""
        model = self.stages[stage]
        output = model(forest, x, asked)
        loss = objective(microbatch, output)
        return Part(None if model.span.last else output.hidden_states, loss), output.expert_counts

    def evaluate(self, forests: Sequence[TokenForest], take: Callable[[int, M2Output], object], asked: Asked = NOTHING_ELSE) -> Tensor:
        """Forward over forests, no gradients.

        Args:
            take: gets a forest's number and the model's output, on the ranks of the last stage.

        Returns:
            This rank's share of the expert counts, int64 [layers + MTP, E].
        """
        counts = self.no_counts()

        def forward(stage: int, microbatch: int, x: Tensor | None) -> Part:
            model = self.stages[stage]
            output = model(forests[microbatch], x, asked)
            counts[model.counted_layers] += output.expert_counts
            if isinstance(output, M2Output):
                take(microbatch, output)
            return Part(None if model.span.last else output.hidden_states, None)

        self.pipeline.forward_only(len(forests), forward, self._shapes(forests))
        return counts

    def no_counts(self) -> Tensor:
        """Zeros, int64 [layers + MTP, E]."""
        rows = self.model.num_hidden_layers + self.model.num_mtp_modules
        return torch.zeros(rows, self.model.num_experts, dtype=torch.int64, device=self.pipeline.like.device)

    def _shapes(self, forests: Sequence[TokenForest]) -> list[tuple[int, ...]]:
        """Of the hidden states of this rank's tokens, forest by forest; a single stage passes none on."""
        if self.mesh.pp.size == 1:
            return []
        return [(len(TokenShards.split(f.depth, self.mesh).index_R), self.model.hidden_size) for f in forests]

"""A forest trained in pieces gives the whole forest's loss, gradients and expert counts, in the memory of one path."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_m2.forest import TokenForest
from megatron_m2.model.m2 import NOTHING_ELSE, Asked, M2Model, M2Output, build_model
from megatron_m2.parallel.layout import ParallelConfig
from megatron_m2.parallel.mesh import ONE, Axis, build_mesh
from megatron_m2.parallel.sharding import Sharding
from megatron_m2.training.config import OptimConfig
from megatron_m2.training.memory import peak_bytes
from megatron_m2.training.open_path import KeptRows
from megatron_m2.training.optimizer import MasterAdamW
from megatron_m2.training.pieces import cut, lightest_first
from megatron_m2.training.stages import ModelStages
from megatron_m2.training.streaming import stream
from tests.conftest import needs_kernels, relative_error, tiny_config
from tests.model.test_m2 import model_with_bias
from tests.parallel.ranks import on_ranks
from tests.training.test_pieces import random_forest, star


def forest_for(model: M2Model, seed: int, tokens: int, fork: float, end: float, counted: bool, routed: bool) -> TokenForest:
    """A random forest of which some tokens weigh nothing, some are shared by samples, and some have routes."""
    forest = random_forest(seed, tokens, fork, end)
    config, generator = model.config, torch.Generator().manual_seed(seed)
    weight = torch.randn(tokens, generator=generator) * (torch.rand(tokens, generator=generator) < 0.6) * (forest.parent >= 0)
    forest = replace(forest, tokens=torch.randint(0, config.vocab_size, (tokens,), generator=generator), weight=weight)
    if counted:
        forest = replace(forest, multiplicity=torch.randint(1, 5, (tokens,), generator=generator, dtype=torch.int32))
    if routed:
        routes = torch.rand(tokens, config.num_hidden_layers, config.num_experts, generator=generator).topk(config.top_k).indices
        forest = replace(forest, routes=routes.masked_fill(torch.rand(tokens, 1, 1, generator=generator) < 0.3, -1).short())
    return forest


class Recorder:
    """An objective that is no more linear than RL's: each log-prob has a coefficient of its own and a square. Sums up what it is given."""

    def __init__(self, forest: TokenForest, of_mtp: bool = True) -> None:
        self.forest, self.of_mtp = forest, of_mtp
        self.coefficient = torch.randn(len(forest), generator=torch.Generator().manual_seed(3))
        self.loss, self.vectors, self.predicted, self.microbatches = 0.0, 0, [], []

    def __call__(self, microbatch: int, output: M2Output) -> torch.Tensor:
        drafts = [x for draft in output.drafts for x in draft]
        vectors = [output.logprobs, *output.mtp_logprobs, *drafts, *([] if output.entropy is None else [output.entropy])]
        self.vectors = self.vectors + torch.stack([v.detach() for v in vectors])
        self.predicted += output.predicted.tolist()
        self.microbatches.append(microbatch)
        loss = (self.forest.weight * (output.logprobs + 0.1 * output.logprobs**2)).sum()
        if self.of_mtp:
            for further in (*output.mtp_logprobs, *(draft.kl for draft in output.drafts)):
                loss = loss + 0.3 * (self.coefficient * further).sum()
        self.loss += float(loss.detach())
        return loss


def gradients(model: M2Model) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def compare(model: M2Model, forest: TokenForest, piece_tokens: int, tolerance: float, asked: Asked = NOTHING_ELSE, of_mtp: bool = True
            ) -> None:
    """Trains a forest whole and in pieces."""
    whole, parts = Recorder(forest, of_mtp), Recorder(forest, of_mtp)
    output = model(forest, None, asked)
    whole(5, output).backward()
    expected = gradients(model)
    counts = stream(model, forest, parts, 5, piece_tokens, asked=asked)
    actual = gradients(model)
    assert torch.equal(counts, output.expert_counts)
    assert set(parts.microbatches) == {5}
    assert sorted(parts.predicted) == whole.predicted  # each token once
    assert parts.loss == pytest.approx(whole.loss, rel=tolerance, abs=tolerance)
    assert relative_error(parts.vectors, whole.vectors) < tolerance
    assert set(actual) == set(expected)
    for name, gradient in expected.items():
        assert (actual[name] - gradient).abs().max() <= tolerance * gradient.abs().max().clamp_min(1e-2), name


@settings(max_examples=100)
@given(seed=st.integers(0, 10**6), tokens=st.integers(1, 40), fork=st.sampled_from([0, 0.1, 0.4]), end=st.sampled_from([0, 0.1]),
       piece_tokens=st.one_of(st.integers(1, 5), st.integers(1, 45)), mtp=st.integers(0, 2), recompute=st.booleans(), drafts=st.booleans(),
       counted=st.booleans(), routed=st.booleans())
def test_pieces_give_what_the_whole_gives(seed, tokens, fork, end, piece_tokens, mtp, recompute, drafts, counted, routed):
    model = model_with_bias(tiny_config(num_mtp_modules=mtp))
    model.recompute = recompute
    forest = forest_for(model, seed, tokens, fork, end, counted, routed)
    compare(model, forest, piece_tokens, 1e-10, Asked(entropy=drafts, draft_top_k=5 if drafts else 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("piece_tokens", [1, 7, 16])
def test_a_path_longer_than_a_piece(dtype, piece_tokens):
    model = model_with_bias(tiny_config(num_mtp_modules=2), dtype)
    forest = forest_for(model, 0, 150, 0, 0, False, False)
    assert int(forest.depth.max()) == 149
    compare(model, forest, piece_tokens, 1e-5 if dtype == torch.float32 else 1e-10)


def test_fp32_with_forks_and_drafts():
    model = model_with_bias(tiny_config(num_mtp_modules=2), torch.float32)
    for seed in range(4):
        compare(model, forest_for(model, seed, 120, 0.1, 0.02, True, True), 16, 1e-5, Asked(True, 5 * (seed % 2)))


def test_what_the_loss_is_not_of_gets_no_gradient():
    """As of a whole forest: weights of MTP modules that nobody asked anything of are not even given zeros."""
    model = model_with_bias(tiny_config(num_mtp_modules=2))
    compare(model, forest_for(model, 1, 60, 0.2, 0, False, False), 8, 1e-10, of_mtp=False)
    stream(model, random_forest(0, 20, 0.2), Recorder(random_forest(0, 20, 0.2), of_mtp=False), 0, 4)
    assert not any(name.startswith("mtp") for name in gradients(model))


def test_a_prompt_that_is_not_predicted_learns_from_its_answers():
    """The loss does not depend on what the prompt's own piece computes, only on rows that others read."""
    model = model_with_bias(tiny_config(num_mtp_modules=1))
    forest = star(24, 3, 8)
    forest = replace(forest, tokens=forest.tokens % 97, weight=torch.where(forest.depth > 25, 1.0, 0.0))

    def indifferent(microbatch: int, output: M2Output) -> torch.Tensor:
        """A number where nothing is predicted."""
        return Recorder(forest)(microbatch, output) if len(output.predicted) else torch.zeros(())

    Recorder(forest)(0, model(forest)).backward()
    expected = gradients(model)
    stream(model, forest, indifferent, 0, 8)
    actual = gradients(model)
    for name, gradient in expected.items():
        assert (actual[name] - gradient).abs().max() <= 1e-10 * gradient.abs().max().clamp_min(1e-2), name


# ---- rounding ----------------------------------------------------------------------------------------------------------------------


def test_gradients_of_kept_rows_are_summed_in_fp32():
    """256 + 100 x 0.5: in bf16 every addition would be lost."""
    rows, none, both = KeptRows(4, 2), torch.empty(0, dtype=torch.int64), torch.tensor([0, 1])
    own = torch.zeros(2, 1, dtype=torch.bfloat16)
    rows.join(own, both)
    rows.keep(both)
    for value in [256.0] + [0.5] * 100:
        leaf = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
        rows.join(leaf, none).backward(torch.full((3, 1), value, dtype=torch.bfloat16))
        assert leaf.grad.tolist() == [[value]]
    rows.drop(2)
    own.requires_grad_()
    rows.join(own, both).backward(torch.zeros(2, 1, dtype=torch.bfloat16))
    assert own.grad.tolist() == [[306.0], [306.0]]


@needs_kernels
@pytest.mark.parametrize("piece_tokens", [16, 64])
def test_bf16_is_as_near_to_fp64_as_the_whole_forest_is(piece_tokens):
    """A backward in pieces rounds a weight's gradient, and that of a row which several pieces read, to bf16 once for each piece, where the
    whole rounds the sum; everything else is rounded alike. Such errors are independent and no larger than those that are there anyway, so
    the error against fp64 grows by less than sqrt 2, most often far less. Routes are given: a choice that flips is no rounding."""
    config = tiny_config(hidden_size=64, num_hidden_layers=3)
    exact = build_model(config, torch.float64, seed=1)
    forest = forest_for(exact, 2, 400, 0.02, 0, False, True)
    forest = replace(forest, routes=torch.where(forest.routes < 0, torch.arange(config.top_k).short(), forest.routes))

    def trained(train) -> dict[str, torch.Tensor]:
        """Gradients of a bf16 model, each backward's added to sums in fp32."""
        model = build_model(config, torch.bfloat16, seed=1)
        exact.load_state_dict(model.state_dict())
        buckets = MasterAdamW(model.named_parameters(), OptimConfig()).gradients
        train(model)
        buckets.finish()
        sums = {name: g for b in buckets.buckets for name, g in zip(b.names, b.gradients(), strict=True)}
        return sums | gradients(model)

    whole = trained(lambda model: Recorder(forest)(0, model(forest)).backward())
    parts = trained(lambda model: stream(model, forest, Recorder(forest), 0, piece_tokens))
    Recorder(forest)(0, exact(forest)).backward()
    expected = gradients(exact)
    assert set(whole) == set(parts) == set(expected)
    of_whole, of_parts = (torch.stack([(found[n] - g).norm() / g.norm() for n, g in expected.items()]) for found in (whole, parts))
    assert of_whole.max() < 0.1  # the comparison says something
    assert (of_parts / of_whole).max() < 1.5
    assert of_parts.mean() < 1.15 * of_whole.mean()


# ---- memory ------------------------------------------------------------------------------------------------------------------------


@needs_kernels
def test_memory_is_that_of_the_longest_path():
    """16 branches of 256 behind 2048 tokens, in pieces of 256: as one path in pieces, and far below that path whole."""
    torch.set_num_threads(1)
    config = tiny_config(vocab_size=512, hidden_size=128, intermediate_size=64, num_hidden_layers=2, max_position_embeddings=4096)
    model = build_model(config, torch.bfloat16, seed=1)
    tree, path = star(2048, 16, 256), star(2048, 1, 256)
    tree, path = (replace(f, tokens=f.tokens % 512) for f in (tree, path))

    def lm(microbatch: int, output: M2Output) -> torch.Tensor:
        return -output.logprobs.sum()

    for forest in (path, tree):
        stream(model, forest, lm, 0, 256)  # gradients are there, libraries are loaded
    in_pieces, of_tree = (peak_bytes(lambda f=f: stream(model, f, lm, 0, 256)) for f in (path, tree))
    at_once = peak_bytes(lambda: lm(0, model(path)).backward())
    assert of_tree <= 1.1 * in_pieces
    assert of_tree <= 0.5 * at_once


# ---- in a step ---------------------------------------------------------------------------------------------------------------------


def test_a_step_of_the_stages_and_what_is_told_before_backwards():
    config = tiny_config(num_mtp_modules=1)
    forests = [random_forest(s, 30, 0.2) for s in range(2)]
    weights = []
    for streamed in (False, True):
        stages = ModelStages(config, ParallelConfig(), ONE, torch.float64, "cpu", seed=1)
        optimizer = MasterAdamW(stages.named_parameters(), OptimConfig(grad_clip=1e9))
        told = []

        def before_backward(last, parameters, told=told, optimizer=optimizer):
            told.append((last, len(list(parameters))))
            optimizer.before_backward(last, parameters)

        def objective(microbatch: int, output: M2Output) -> torch.Tensor:
            return Recorder(forests[microbatch])(microbatch, output)

        if streamed:
            counts = sum(stages.stream(f, objective, m, 8, before_backward, last=m == 1) for m, f in enumerate(forests))
        else:
            expected_counts = stages.train(forests, objective, before_backward)
        number = len(list(stages.named_parameters()))
        assert told == [(False, number), (True, number)]
        optimizer.step(1e-2)
        weights.append(stages.state_dict())
    assert torch.equal(counts, expected_counts)
    assert all(relative_error(weights[1][name], w) < 1e-8 for name, w in weights[0].items() if w.any())


def test_before_every_backward_it_is_told_whether_it_is_the_last():
    model, forest, told = model_with_bias(tiny_config()), random_forest(0, 40, 0.2), []
    stream(model, forest, Recorder(forest), 0, 8, told.append)
    assert told == [False] * (len(cut(lightest_first(forest)[0], 8)) - 1) + [True]


def _steps_on_two_ranks(zero: int) -> None:
    """Ranks whose forests have different numbers of pieces, some of them too shallow for MTP."""
    config, parallel = tiny_config(num_mtp_modules=2), ParallelConfig()
    mesh = build_mesh(parallel, "cpu", config.num_key_value_heads)
    mine = [random_forest(10 * mesh.world.rank + m, 9 + 20 * mesh.world.rank, 0.3, 0.1) for m in range(2)]
    weights = []
    for streamed in (False, True):
        stages = ModelStages(config, parallel, mesh, torch.float32, "cpu", seed=1)
        optimizer = MasterAdamW(stages.named_parameters(), OptimConfig(grad_clip=1e9), mesh, Sharding(zero=zero, bucket_bytes=1 << 14))

        def objective(microbatch: int, output: M2Output) -> torch.Tensor:
            return Recorder(mine[microbatch])(microbatch, output)

        if streamed:
            for m, forest in enumerate(mine):
                stages.stream(forest, objective, m, 1 + 3 * mesh.world.rank, optimizer.before_backward, m == 1)
        else:
            stages.train(mine, objective, optimizer.before_backward)
        optimizer.step(1e-3)
        weights.append(stages.state_dict())
    for name, expected in weights[0].items():
        assert (weights[1][name] - expected).abs().max() < 1e-5, name


@pytest.mark.parametrize("zero", [1, 2])
def test_data_parallel_ranks_have_pieces_of_their_own(zero):
    on_ranks(2, _steps_on_two_ranks, zero)


def test_refusals():
    forest = TokenForest.from_documents([[1, 2, 3]])

    def run(model, piece_tokens=2, forest=forest):
        stream(model, forest, Recorder(forest), 0, piece_tokens)

    model = build_model(tiny_config(), seed=0)
    with pytest.raises(ValueError, match=r"piece_tokens: 0, need 1 or more"):
        run(model, 0)
    with pytest.raises(ValueError, match=r"forest.tokens: id 97 outside the vocabulary of 97"):
        run(model, forest=TokenForest.from_documents([[1, 97]]))
    with pytest.raises(ValueError, match=r"model.router_aux_loss_coef = 0.01: the balance loss"):
        run(build_model(tiny_config(router_aux_loss_coef=0.01), seed=0))
    for axis in ("pp", "cp", "tp", "ep"):
        with pytest.raises(ValueError, match=rf"parallel.{axis} = 2: .*; nearest is 1"):
            run(SimpleNamespace(mesh=replace(ONE, **{axis: Axis(2)}), config=model.config))

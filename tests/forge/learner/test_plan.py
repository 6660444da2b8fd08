"""Plans of a step: every sample once, budgets kept, ranks even, trees whole where they may be. Tokens are counted as sets."""

from __future__ import annotations

from itertools import chain, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_m2.forest import merge_samples
from megatron_m2.forge.learner.plan import Budget, Cost, Microbatch, Plan, plan
from tests.conftest import random_samples, tiny_config

FREE = Budget(10**9)
LINEAR = Cost(1.0)


class Step:
    """Samples, merged; ``paths[s]`` is the set of forest tokens of sample s."""

    def __init__(self, samples: list[list[int]], seed: int = 0) -> None:
        self.forest, places = merge_samples(samples)
        self.trained = np.random.default_rng(seed).random(len(self.forest)) < 0.5
        self.paths = [set(place.tolist()) for place in places]
        self.last = np.array([place[-1] for place in places])

    def plan(self, budget: Budget, cost: Cost, ranks: int, **options) -> Plan:
        return plan(self.forest.depth.numpy(), self.forest.subtree_end.numpy(), self.last, self.trained, budget, cost, ranks, **options)

    def tokens(self, microbatch: Microbatch) -> set[int]:
        return set().union(*(self.paths[s] for s in microbatch.samples))

    def check(self, made: Plan, budget: Budget, cost: Cost) -> None:
        every = [*chain(*made.ranks), *made.streamed]
        assert sorted(chain(*(m.samples.tolist() for m in every))) == list(range(len(self.paths)))
        assert len({len(mine) for mine in made.ranks}) == 1
        for i, m in enumerate(every):
            tokens = self.tokens(m)
            elsewhere = set().union(*(self.tokens(other) for j, other in enumerate(every) if j != i))
            depth = self.forest.depth.numpy()[sorted(tokens)].astype(np.int64)
            assert (m.tokens, m.pairs, m.trained) == (len(tokens), (depth + 1).sum(), self.trained[sorted(tokens)].sum())
            assert m.cost == pytest.approx(cost.per_token * m.tokens + cost.per_pair * m.pairs + cost.per_trained * m.trained)
            assert m.repeated == len(tokens & elsewhere)
            assert m.samples.tolist() == sorted(m.samples)
        for m in chain(*made.ranks):
            assert m.tokens <= budget.tokens
            assert budget.bytes_per_token * m.tokens + budget.bytes_per_trained * m.trained <= budget.memory_bytes * (1 + 1e-6)
        for mine in made.ranks:
            assert all(len(m.samples) for m in mine[:-1])
        for dear, cheap in pairwise(zip(*made.ranks, strict=True)):
            assert min(m.cost for m in dear) >= max(m.cost for m in cheap)
        assert made.unique_tokens == len(self.forest)
        assert made.repeated_tokens == sum(len(self.tokens(m)) for m in every) - len(self.forest)


def as_lists(made: Plan) -> list:
    return [[(*m.samples.tolist(), m.tokens, m.cost) for m in mine] for mine in (*made.ranks, made.streamed)]


@given(st.integers(0, 10**6), st.integers(1, 14), st.integers(1, 4), st.integers(1, 5), st.integers(1, 40), st.booleans(), st.booleans())
def test_every_sample_once_and_every_count_as_counted_by_hand(seed, count, branching, ranks, room, by_memory, stream):
    step = Step(random_samples(seed, count=count, vocab=4, length=12, branching=branching), seed)
    longest = max(map(len, step.paths))
    tokens = room if stream else longest + room
    budget = Budget(10**6, 3.0, 5.0, 8.0 * tokens) if by_memory else Budget(tokens)
    cost = Cost(1.0, 0.25, 0.5)
    made = step.plan(budget, cost, ranks, stream=stream)
    step.check(made, budget, cost)
    assert as_lists(step.plan(budget, cost, ranks, stream=stream)) == as_lists(made)
    for m in made.streamed:
        assert any(len(step.paths[s]) > budget.tokens or budget.bytes_per_token * len(step.paths[s]) + budget.bytes_per_trained
                   * step.trained[sorted(step.paths[s])].sum() > budget.memory_bytes for s in m.samples)


def test_a_cost_is_the_flops_of_the_step():
    model = tiny_config(num_mtp_modules=2)
    step = Step(random_samples(1, count=9))
    for m in chain(*step.plan(FREE, Cost.of(model), 3).ranks):
        assert m.cost == pytest.approx(3 * model.forward_flops(m.tokens, m.pairs, 3 * m.trained, 2 * m.tokens), rel=1e-12)


def group(prompt: int, answers: list[int], token: int) -> list[list[int]]:
    return [[token] * prompt + [1000 + i] * length for i, length in enumerate(answers)]


def test_groups_that_fit_are_not_cut():
    random = np.random.default_rng(0)
    samples = [s for g in range(24) for s in group(40, random.integers(10, 60, 6).tolist(), g)]
    step = Step([samples[i] for i in random.permutation(len(samples))])
    made = step.plan(Budget(800), LINEAR, 4)
    step.check(made, Budget(800), LINEAR)
    assert made.repeated_tokens == 0
    assert all(m.repeated == 0 for m in chain(*made.ranks))


def test_a_tree_over_the_budget_is_cut_where_least_is_shared():
    step = Step([[0] * 10 + [branch] * 30 + [10 + leaf] * 5 for branch in (1, 2) for leaf in range(4)])
    made = step.plan(Budget(90), LINEAR, 1)
    assert [sorted(m.samples.tolist()) for m in sorted(made.ranks[0], key=lambda m: m.samples[0])] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert made.repeated_tokens == 10
    assert [m.repeated for m in made.ranks[0]] == [10, 10]


def test_an_idle_rank_is_filled_where_that_repeats_next_to_nothing():
    long = [[7] * 1000]
    free = Step(long + [[100 + i] * 20 for i in range(8)])
    assert all(len(mine[0].samples) for mine in free.plan(FREE, LINEAR, 4).ranks)
    prompt = Step(long + [[8] * 300 + [100 + i] * 2 for i in range(8)])
    made = prompt.plan(FREE, LINEAR, 4)
    assert made.repeated_tokens == 0
    assert sorted(len(mine[0].samples) for mine in made.ranks) == [0, 0, 1, 8]


def test_the_dearest_of_a_round_goes_to_the_rank_with_least():
    made = Step([[token] * length for token, length in enumerate((12, 10, 20, 11))]).plan(Budget(20), LINEAR, 2)
    assert [[m.tokens for m in mine] for mine in made.ranks] == [[20, 10], [12, 11]]
    assert made.imbalance == pytest.approx(30 / 26.5)
    assert made.lockstep_cost == 31


def test_identical_samples_and_prefixes_stay_together():
    same = Step([[1, 2, 3]] * 5 + [[4, 5], [4, 5, 6], [4], [4, 5, 6, 7]])
    made = same.plan(Budget(4), LINEAR, 2)
    same.check(made, Budget(4), LINEAR)
    assert sorted(m.samples.tolist() for m in chain(*made.ranks)) == [[0, 1, 2, 3, 4], [5, 6, 7, 8]]
    assert made.repeated_tokens == 0


def test_more_ranks_than_samples_and_none_at_all():
    step = Step([[1, 2], [3, 4]])
    made = step.plan(FREE, LINEAR, 3)
    step.check(made, FREE, LINEAR)
    assert [len(mine[0].samples) for mine in made.ranks] == [1, 1, 0]
    nothing = plan(step.forest.depth.numpy(), step.forest.subtree_end.numpy(), np.empty(0, dtype=np.int64), step.trained, FREE, LINEAR, 3)
    assert (nothing.ranks, nothing.streamed, nothing.unique_tokens, nothing.imbalance) == ([[], [], []], [], 0, 1.0)


def test_samples_over_the_budget_are_streamed_by_tree():
    system = [0] * 4
    samples = [system + [1] * 60 + [11] * 40, system + [1] * 60 + [12] * 40, system + [2] * 90,  # over
               system + [1] * 60, system + [2] * 5, system + [3] * 20, system + [1] * 10 + [4]]
    step = Step(samples)
    budget = Budget(80)
    made = step.plan(budget, LINEAR, 2, stream=True)
    step.check(made, budget, LINEAR)
    # 3 and 4 end on the path of a streamed sample; what all trees have in common ties none together
    assert [m.samples.tolist() for m in made.streamed] == [[0, 1, 3], [2, 4]]
    assert sorted(chain(*(m.samples.tolist() for m in chain(*made.ranks)))) == [5, 6]
    only = Step(samples[:1]).plan(budget, LINEAR, 2, stream=True)
    assert only.ranks == [[], []]
    assert only.streamed[0].tokens == 104


def mixed(seed: int, system: int = 0) -> list[list[int]]:
    """256 samples: groups of answers, agent episodes of growing and at times rewritten context, single ones."""
    random = np.random.default_rng(seed)

    def fresh(low: int, high: int) -> list[int]:
        return random.integers(10, 10**6, random.integers(low, high)).tolist()

    samples: list[list[int]] = []
    while len(samples) < 256:
        prompt = [1] * system + fresh(20, 200)
        kind = random.integers(3)
        if kind == 0:
            samples += [prompt + fresh(20, 300) for _ in range(16)]
        elif kind == 1:
            context = prompt
            for _ in range(random.integers(3, 20)):
                context = context + fresh(5, 80)
                samples.append(context)
                context = context[:len(context) // 2] if random.random() < 0.2 else context
        else:
            samples.append(prompt + fresh(100, 900))
    return samples[:256]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("system", "tokens"), [(0, 10**6), (0, 2500), (100, 10**6), (100, 2500)])
def test_ranks_are_even_on_a_mixed_step(seed, system, tokens):
    step = Step(mixed(seed, system), seed)
    budget, cost = Budget(tokens), Cost(1.0, 1e-3, 0.1)
    made = step.plan(budget, cost, 8)
    step.check(made, budget, cost)
    assert made.imbalance <= 1.05
    mean = sum(m.cost for m in chain(*made.ranks)) / 8
    assert made.lockstep_cost <= 1.1 * mean
    assert (made.rounds == 1) == (tokens == 10**6)


@pytest.mark.parametrize(("changes", "said"), [
    ({"tokens": 0}, "budget.tokens = 0"), ({"tokens": -5}, "budget.tokens = -5"), ({"memory_bytes": 0.0}, "budget.memory_bytes = 0.0"),
    ({"bytes_per_token": -1.0}, "budget.bytes_per_token = -1.0"), ({"bytes_per_trained": float("nan")}, "budget.bytes_per_trained = nan")])
def test_a_wrong_budget_is_refused_by_field(changes, said):
    with pytest.raises(ValueError, match=said):
        Budget(**{"tokens": 10, **changes})


@pytest.mark.parametrize(("values", "said"), [((0.0,), "cost.per_token = 0"), ((1.0, -1.0), "cost.per_pair = -1.0"),
                                              ((1.0, 0.0, float("inf")), "cost.per_trained = inf")])
def test_a_wrong_cost_is_refused_by_field(values, said):
    with pytest.raises(ValueError, match=said):
        Cost(*values)


def test_a_sample_over_the_budget_is_refused_by_number():
    step = Step([[1, 2], [3] * 9, [4] * 12])
    with pytest.raises(ValueError, match=r"samples\[1\]: 9 tokens, over budget.tokens = 8 \(1 more like it\);.* stream=True"):
        step.plan(Budget(8), LINEAR, 1)
    step.trained[:] = True
    with pytest.raises(ValueError, match=r"samples\[2\]: 12 tokens, 12 of them trained, which take 36 bytes, over budget.mem"):
        step.plan(Budget(99, 1.0, 2.0, 30.0), LINEAR, 1)


def test_arrays_that_do_not_fit_are_refused():
    step = Step([[1, 2], [3]])
    depth, end = step.forest.depth.numpy(), step.forest.subtree_end.numpy()
    with pytest.raises(ValueError, match="ranks = 0"):
        step.plan(FREE, LINEAR, 0)
    with pytest.raises(ValueError, match=r"trained_T: shape \[2\], but depth_T has \[3\]"):
        plan(depth, end, step.last, step.trained[:2], FREE, LINEAR, 1)
    with pytest.raises(ValueError, match="trained_T: int64, must be bool"):
        plan(depth, end, step.last, step.trained.astype(np.int64), FREE, LINEAR, 1)
    with pytest.raises(ValueError, match=r"last_S\[1\] = 3: must be from 0 to 2"):
        plan(depth, end, np.array([1, 3]), step.trained, FREE, LINEAR, 1)

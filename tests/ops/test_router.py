"""The router op beside its fp64 reference: values, gradients, choice among ties, counts, replay, errors."""

from __future__ import annotations

import importlib.util
import logging

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_m2.ops import _extension
from megatron_m2.ops.router import RouterOutput, router_reference, sigmoid_router, update_router_bias
from tests.conftest import needs_kernels, relative_error


def inputs(seed: int, tokens: int, experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits and biases on coarse grids: many exact ties, and no two unequal choices closer than rounding. And a multiplicity."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(-32, 33, (tokens, experts), generator=generator) / 8
    bias = torch.randint(-2, 3, (experts,), generator=generator) / 16
    return logits, bias, torch.randint(0, 5, (tokens,), generator=generator, dtype=torch.int32)


def forward_backward(route, logits, bias, top_k, **options) -> tuple[RouterOutput, torch.Tensor]:
    logits = logits.clone().requires_grad_()
    output = route(logits, bias, top_k, **options)
    output.weights.backward(torch.linspace(-1, 2, output.weights.numel(), dtype=logits.dtype).view_as(output.weights))
    return output, logits.grad


@st.composite
def shapes(draw) -> tuple[int, int, int]:
    experts = draw(st.integers(1, 300))
    return draw(st.integers(0, 70)), experts, draw(st.integers(1, min(experts, 32)))


@given(shapes(), st.integers(0, 2**31), st.booleans(), st.booleans())
@example((1, 256, 8), 0, False, False)
@example((200, 1024, 32), 1, True, False)  # more tokens than one task takes, every limit reached
@example((5, 7, 7), 2, False, False)  # every expert chosen
@example((3, 1, 1), 3, False, False)
@example((0, 16, 2), 4, True, True)
def test_equals_fp64_reference(shape, seed, with_multiplicity, replay):
    tokens, experts, top_k = shape
    logits, bias, multiplicity = inputs(seed, tokens, experts)
    options = {"multiplicity": multiplicity if with_multiplicity else None}
    if replay:
        options["routes"] = torch.rand(tokens, experts).argsort(-1)[:, :top_k].int()
    output, grad = forward_backward(sigmoid_router, logits, bias, top_k, **options)
    expected, expected_grad = forward_backward(router_reference, logits.double(), bias.double(), top_k, **options)
    assert output.experts.dtype == torch.int32
    assert output.counts.dtype == torch.int64
    assert torch.equal(output.experts, expected.experts)
    assert torch.equal(output.counts, expected.counts)
    if tokens:
        assert relative_error(output.weights.detach(), expected.weights.detach()) < 1e-6
        assert float((grad - expected_grad).abs().max()) < 1e-6  # of gradients near 1 that may cancel to nothing


def test_reference_gradient():
    logits = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, dtype=torch.float64)
    routes = torch.tensor([[0, 3], [5, 1], [2, 4], [1, 0], [3, 5]], dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda x: router_reference(x, bias, 3).weights, logits)
    assert torch.autograd.gradcheck(lambda x: sigmoid_router(x, bias, 2, routes=routes).weights, logits)


def test_gradient_keeps_its_digits_near_saturation():
    logits = torch.tensor([[14.0, 13.0, -20.0]])  # 1 - score is 1e-6: a difference of fp32 numbers would lose it
    _, grad = forward_backward(sigmoid_router, logits, torch.zeros(3), 2)
    _, expected = forward_backward(router_reference, logits.double(), torch.zeros(3).double(), 2)
    torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("route", [sigmoid_router, router_reference])
def test_ties_go_to_the_lower_expert(route):
    output = route(torch.zeros(3, 100), torch.zeros(100), 5)
    assert output.experts.tolist() == [[0, 1, 2, 3, 4]] * 3
    logits = torch.zeros(1, 100)
    logits[0, [70, 20, 50]] = 1.0
    assert route(logits, torch.zeros(100), 5).experts.tolist() == [[20, 50, 70, 0, 1]]


@pytest.mark.parametrize("route", [sigmoid_router, router_reference])
def test_bias_chooses_and_does_not_weigh(route):
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    output = route(logits, torch.tensor([0.0, 0.0, 0.0, 10.0]), 2)
    scores = logits.sigmoid()[0]
    assert output.experts.tolist() == [[3, 0]]
    torch.testing.assert_close(output.weights[0], scores[[3, 0]] / (scores[3] + scores[0]))
    assert output.counts.tolist() == [1, 0, 0, 1]  # experts without a token count 0


def test_multiplicity_counts_samples():
    logits = torch.tensor([[1.0, 0.0, -1.0], [-1.0, 0.0, 1.0]])
    multiplicity = torch.tensor([3, 2**31 - 1], dtype=torch.int32)
    counts = sigmoid_router(logits.repeat(4, 1), torch.zeros(3), 2, multiplicity=multiplicity.repeat(4)).counts
    assert counts.tolist() == [12, 12 + 4 * (2**31 - 1), 4 * (2**31 - 1)]


def test_replay_repeats_the_forward():
    logits, bias, multiplicity = torch.randn(50, 64), torch.randn(64), torch.randint(1, 4, (50,), dtype=torch.int32)
    first, grad = forward_backward(sigmoid_router, logits, bias, 6, multiplicity=multiplicity)
    again, grad_again = forward_backward(sigmoid_router, logits, bias, 6, multiplicity=multiplicity, routes=first.experts)
    for one, other in zip((*first, grad), (*again, grad_again), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)


@pytest.mark.parametrize("route", [sigmoid_router, router_reference])
@pytest.mark.parametrize("nan", [float("nan"), -float("nan")])
def test_nan_is_chosen_first_and_shows(route, nan):
    logits = torch.randn(4, 20)
    logits[1, 17] = nan
    output = route(logits, torch.zeros(20), 3)
    assert output.experts[1, 0] == 17
    assert output.weights.isnan().all(-1).tolist() == [False, True, False, False]
    assert int(output.experts.min()) >= 0
    assert int(output.experts.max()) < 20
    assert route(torch.full((2, 20), nan), torch.zeros(20), 3).experts.tolist() == [[0, 1, 2]] * 2


def test_infinite_logits_are_scores_of_zero_and_one():
    inf = float("inf")
    output = sigmoid_router(torch.tensor([[-inf, inf, 0.0, inf]]), torch.tensor([0.0, 0.0, -inf, 0.0]), 3)
    assert output.experts.tolist() == [[1, 3, 0]]  # a bias of -inf shuts an expert out
    assert output.weights.tolist() == [[0.5, 0.5, 0.0]]


def test_number_of_threads_does_not_show():
    logits, bias = torch.randn(1000, 256), torch.randn(256)
    threads = torch.get_num_threads()
    runs = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            output, grad = forward_backward(sigmoid_router, logits, bias, 8)
            runs.append((*output, grad))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_strided_inputs():
    logits, bias = torch.randn(30, 90).t()[::2], torch.randn(60)[::2]
    assert not logits.is_contiguous()
    output, grad = forward_backward(sigmoid_router, logits, bias, 4)
    expected, expected_grad = forward_backward(sigmoid_router, logits.contiguous(), bias.contiguous(), 4)
    assert all(torch.equal(a, b) for a, b in zip((*output, grad), (*expected, expected_grad), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bias_update(dtype):
    bias = torch.tensor([0.5, 0.5, 0.5, 0.5], dtype=dtype)
    update_router_bias(bias, torch.tensor([1, 3, 8, 0]), 0.125)
    assert bias.tolist() == [0.625, 0.5, 0.375, 0.625]
    large = 2**53  # the comparison with the mean is exact where floats are not
    update_router_bias(bias, torch.tensor([large + 1, large, large, large - 1]), 0.125)
    assert bias.tolist() == [0.5, 0.5, 0.375, 0.75]


LOGITS, BIAS, ROUTES = torch.zeros(4, 8), torch.zeros(8), torch.arange(8, dtype=torch.int32).view(4, 2)


@pytest.mark.parametrize(("message", "changes"), [
    (r"^logits: torch.bfloat16", {"logits_TE": LOGITS.bfloat16()}),
    (r"^logits: .*\[4, 2, 4\]", {"logits_TE": LOGITS.view(4, 2, 4)}),
    (r"^logits: 1025 experts, need 1 to 1024", {"logits_TE": torch.zeros(1, 1025)}),
    (r"^logits: 0 experts", {"logits_TE": torch.zeros(4, 0)}),
    (r"^bias: torch.float64", {"bias_E": BIAS.double()}),
    (r"^bias: .*\[7\]", {"bias_E": BIAS[:7]}),
    (r"^bias: on meta, need cpu", {"bias_E": BIAS.to("meta")}),
    (r"^top_k: 0, need 1 to 8", {"top_k": 0}),
    (r"^top_k: 9, need 1 to 8", {"top_k": 9}),
    (r"^top_k: 33, need 1 to 32", {"top_k": 33, "logits_TE": torch.zeros(1, 64), "bias_E": torch.zeros(64)}),
    (r"^multiplicity: torch.int64", {"multiplicity": torch.ones(4, dtype=torch.int64)}),
    (r"^multiplicity: .*\[3\]", {"multiplicity": torch.ones(3, dtype=torch.int32)}),
    (r"^routes: torch.int64", {"routes": ROUTES.long()}),
    (r"^routes: .*\[4, 1\]", {"routes": ROUTES[:, :1]}),
])
@pytest.mark.parametrize("route", [sigmoid_router, router_reference])
def test_refused_arguments_are_named(route, message, changes):
    arguments = {"logits_TE": LOGITS, "bias_E": BIAS, "top_k": 2, **changes}
    with pytest.raises(ValueError, match=message):
        route(arguments.pop("logits_TE"), arguments.pop("bias_E"), arguments.pop("top_k"), **arguments)


@pytest.mark.parametrize(("message", "bias", "counts"), [
    (r"^bias: torch.int64", torch.zeros(8, dtype=torch.int64), torch.zeros(8, dtype=torch.int64)),
    (r"^bias: torch.float32 \[2, 4\]", torch.zeros(2, 4), torch.zeros(8, dtype=torch.int64)),
    (r"^counts: torch.int32", BIAS, torch.zeros(8, dtype=torch.int32)),
    (r"^counts: .*\[7\]", BIAS, torch.zeros(7, dtype=torch.int64)),
    (r"^counts: .* on meta", BIAS, torch.zeros(8, dtype=torch.int64, device="meta")),
])
def test_bias_update_names_what_it_refuses(message, bias, counts):
    with pytest.raises(ValueError, match=message):
        update_router_bias(bias, counts, 0.1)


@needs_kernels
@pytest.mark.parametrize(("message", "routes"), [
    (r"experts\[2, 1\]: 8, need 0 to 7", [[0, 1], [2, 3], [4, 8], [6, 7]]),
    (r"experts\[0, 0\]: -1, need 0 to 7", [[-1, 1], [2, 3], [4, 5], [6, 7]]),
    (r"experts\[3\]: names expert 6 twice", [[0, 1], [2, 3], [4, 5], [6, 6]]),
])
def test_bad_routes_are_named(message, routes):
    routes = torch.tensor(routes, dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        sigmoid_router(LOGITS, BIAS, 2, routes=routes)
    with pytest.raises(ValueError, match=message):
        torch.ops.m2_ops.router_backward(torch.zeros(4, 2), LOGITS, torch.zeros(4, 2), routes)


@needs_kernels
@pytest.mark.parametrize(("name", "message", "arguments"), [
    ("router_topk", "logits: Double", (LOGITS.double(), BIAS, 2)),
    ("router_topk", "bias: shape", (LOGITS, BIAS[:5], 2)),
    ("router_topk", "top_k: 9, need 1 to 8", (LOGITS, BIAS, 9)),
    ("router_topk", "multiplicity: Long", (LOGITS, BIAS, 2, torch.ones(4, dtype=torch.int64))),
    ("router_replay", "experts: Long", (LOGITS, ROUTES.long())),
    ("router_replay", "experts: shape", (LOGITS, ROUTES[:3])),
    ("router_backward", "weights: shape", (torch.zeros(4, 2), LOGITS, torch.zeros(4, 3), ROUTES)),
    ("router_backward", "grad_weights: Double", (torch.zeros(4, 2).double(), LOGITS, torch.zeros(4, 2), ROUTES)),
    ("router_bias_update", "counts: Int", (BIAS, torch.zeros(8, dtype=torch.int32), 0.1)),
])
def test_kernels_check_for_themselves(name, message, arguments):
    with pytest.raises(ValueError, match=message):
        getattr(torch.ops.m2_ops, name)(*arguments)


@needs_kernels
def test_opcheck():
    logits, bias = torch.randn(6, 20, requires_grad=True), torch.randn(20)
    multiplicity = torch.randint(0, 5, (6,), dtype=torch.int32)
    ops = torch.ops.m2_ops
    torch.library.opcheck(ops.router_topk, (logits, bias, 4))
    torch.library.opcheck(ops.router_topk, (logits, bias, 4, multiplicity))
    weights, experts, counts = ops.router_topk(logits.detach(), bias, 4)
    torch.library.opcheck(ops.router_replay, (logits, experts, multiplicity))
    torch.library.opcheck(ops.router_backward, (torch.randn(6, 4), logits.detach(), weights, experts))
    torch.library.opcheck(ops.router_bias_update, (bias, counts, 0.1))


def test_missing_extension_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with caplog.at_level(logging.WARNING):
        assert _extension._load() == frozenset()
    assert len(caplog.records) == 1
    assert "not built" in caplog.text
    assert "pip install" in caplog.text


def test_broken_extension_is_no_missing_one(monkeypatch):
    def fail(name):
        raise ImportError("undefined symbol")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(ImportError, match="rebuild it by: pip install"):
        _extension._load()


def test_reference_runs_where_there_is_no_kernel(monkeypatch):
    logits, bias, multiplicity = inputs(0, 9, 33)
    fast, counts = sigmoid_router(logits, bias, 3, multiplicity=multiplicity), torch.arange(33)
    updated = bias.clone()
    update_router_bias(updated, counts, 0.1)
    monkeypatch.setattr(_extension, "_DEVICES", frozenset())
    plain = sigmoid_router(logits, bias, 3, multiplicity=multiplicity)
    torch.testing.assert_close(tuple(plain), tuple(fast))
    update_router_bias(bias, counts, 0.1)
    assert torch.equal(bias, updated)

"""Experts over ranks against the definition on one rank, in fp64; what travels, when, and what is refused."""

from __future__ import annotations

import logging
from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from megatron_m2.ops.expert_parallel import plan_rows
from megatron_m2.ops.fp8 import quantize_rows
from megatron_m2.parallel.exchange import AllToAll
from megatron_m2.parallel.expert import expert_parallel
from megatron_m2.parallel.mesh import Axis
from megatron_m2.parallel.peer_memory import peer_memory
from tests.conftest import relative_error
from tests.parallel.ranks import on_ranks

EXPERTS, TOP_K = 8, 3
TOKENS = [7, 0, 33, 12]  # of each rank

# Of bf16 each row of a rank, each sum of two to four of them and each gradient is rounded once, at 2^-9 of it.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 3 * 2**-8}


def axis_of_all() -> Axis:
    return Axis(dist.get_world_size(), dist.get_rank(), dist.group.WORLD)


def batch(kind: str, tokens: int, hidden: int, rank: int):
    """x, weights and experts of one rank, and the gradient of its output, fp64."""
    g = torch.Generator().manual_seed(100 * len(kind) + rank)
    x, grad = (torch.randn(tokens, hidden, generator=g, dtype=torch.float64) for _ in range(2))
    weights = torch.rand(tokens, TOP_K, generator=g, dtype=torch.float64)
    popular = {"spread": torch.ones(EXPERTS), "skewed": torch.logspace(0, -6, EXPERTS), "one rank": torch.ones(EXPERTS)}[kind]
    experts = (torch.rand(tokens, EXPERTS, generator=g).log() / popular).argsort(-1, descending=True)[:, :TOP_K].int()
    if kind == "one rank":  # the others get nothing, and expert 6 of rank 3 neither; some slots go nowhere
        experts = torch.where(torch.rand(experts.shape, generator=g) < 0.3, -1, torch.full_like(experts, EXPERTS - 1))
    return x, weights, experts, grad


def matrices(hidden: int) -> torch.Tensor:
    return torch.randn(EXPERTS, hidden, hidden, generator=torch.Generator().manual_seed(5), dtype=torch.float64) / hidden**0.5


def run_experts(x, weights, experts, matrices_EHH):
    """sum_k weights tanh(x A_e), one expert after the other."""
    out = torch.zeros(x.shape, dtype=weights.dtype, device=x.device)
    for e, matrix in enumerate(matrices_EHH):
        token, slot = (experts == e).nonzero(as_tuple=True)
        out = out.index_add(0, token, (x[token] @ matrix).tanh().to(weights.dtype) * weights[token, slot, None])
    return out.to(x.dtype)


def expected(kind: str, hidden: int, rounded: torch.dtype):
    """The definition over all ranks' tokens in fp64, from inputs rounded as a rank's are: this rank's output and gradients."""
    rank, counts = dist.get_rank(), TOKENS[: dist.get_world_size()]
    parts = [batch(kind, n, hidden, r) for r, n in enumerate(counts)]
    x, weights, grad = (torch.cat([p[i] for p in parts]).to(rounded if i != 1 or rounded == torch.float64 else torch.float32).double()
                        for i in (0, 1, 3))
    weight = matrices(hidden).to(rounded).double()
    for t in (x, weights, weight):
        t.requires_grad_()
    out = run_experts(x, weights, torch.cat([p[2] for p in parts]), weight)
    grads = torch.autograd.grad(out, (x, weights, weight), grad)
    mine, per_rank = slice(sum(counts[:rank]), sum(counts[: rank + 1])), EXPERTS // len(counts)
    return out[mine], grads[0][mine], grads[1][mine], grads[2][rank * per_rank : (rank + 1) * per_rank]


def on_this_rank(kind: str, hidden: int, dtype: torch.dtype, device: str = "cpu", recompute: bool = False, **options):
    """expert_parallel's output and gradients, those of the experts included."""
    axis = axis_of_all()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, weights, experts, grad = (t.to(device) for t in batch(kind, TOKENS[axis.rank], hidden, axis.rank))
    x, weights = x.to(dtype).requires_grad_(), weights.to(wide).requires_grad_()
    per_rank = EXPERTS // axis.size
    weight = matrices(hidden)[axis.rank * per_rank :][:per_rank].to(device, dtype).requires_grad_()

    def local(x, weights, experts, routed):
        assert int((experts >= 0).sum()) == routed
        assert experts.dtype == torch.int32
        return run_experts(x, weights, experts, weight)

    def layer(x, weights):
        return expert_parallel(x, weights, experts, EXPERTS, axis, local, **options)

    out = checkpoint(layer, x, weights, use_reentrant=False) if recompute else layer(x, weights)
    assert out.dtype == dtype
    return out.detach(), *torch.autograd.grad(out, (x, weights, weight), grad.to(dtype))


def compare(hidden):
    for dtype, kind in product(TOLERANCE, ("spread", "skewed", "one rank")):
        wanted = expected(kind, hidden, dtype)
        for chunks, recompute in ((1, False), (3, False), (1, True), (40, True)):
            actual = on_this_rank(kind, hidden, dtype, chunks=chunks, recompute=recompute)
            for name, a, b in zip(("out", "dx", "d_weights", "d_experts"), actual, wanted, strict=True):
                assert a.shape == b.shape
                assert a.numel() == 0 or relative_error(a, b) < TOLERANCE[dtype], (kind, dtype, chunks, name, relative_error(a, b))


def test_equals_the_definition():
    """Ranks with other numbers of tokens, or none; ranks and experts that get none; chunks without tokens; recomputed in the backward."""
    on_ranks(4, compare, 20)


def scaled(x, weights, experts, _):
    """Experts that do the same to a row whatever rows are beside it."""
    return (x.float() * (weights * (experts >= 0)).sum(1, keepdim=True)).to(x.dtype)


def compare_roundings():
    axis, hidden = axis_of_all(), 200
    for dtype in (torch.bfloat16, torch.float32):
        x, weights, experts, grad = batch("spread", TOKENS[axis.rank], hidden, axis.rank)
        x = (x * torch.logspace(-3, 3, hidden, dtype=torch.float64)).to(dtype)
        codes, scales = quantize_rows(x)
        rounded = (codes.float() * scales.repeat_interleave(128, 1)[:, :hidden]).bfloat16().to(dtype)
        weights, results = weights.float().requires_grad_(), []
        for source, options in ((x, {"fp8_payload": True, "chunks": 2}), (rounded, {}), (rounded, {"chunks": 5})):
            source.requires_grad_()
            out = expert_parallel(source, weights, experts, EXPERTS, axis, scaled, **options)
            results.append((out, *torch.autograd.grad(out, (source, weights), grad.to(dtype))))
        # only x is rounded, and once; the chunks change no bit
        assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*results, strict=True))
        # e4m3 has 3 bits behind the point down to 2^-6 of the block's factor, and steps of 2^-9 of it below; bf16 rounds the product
        step = torch.maximum(x.double().abs() * 2**-4, scales.repeat_interleave(128, 1)[:, :hidden].double() * 2**-10)
        assert bool(((rounded.double() - x.double()).abs() <= step + x.double().abs() * 2**-8).all())


def test_fp8_payload_is_one_rounding_of_x_and_chunks_are_none():
    on_ranks(4, compare_roundings)


class Watched(AllToAll):
    """Notes what is posted, and how many bytes leave this rank."""

    def __init__(self, axis: Axis) -> None:
        super().__init__(axis)
        self.events: list[str] = []
        self.bytes: list[int] = []

    def pack(self, *arguments):
        self.events.append("pack")
        return super().pack(*arguments)

    def send_back(self, *arguments):
        self.events.append("back")
        return super().send_back(*arguments)

    def _post(self, arriving, sent, *arguments):
        self.bytes.append(sent.nbytes)
        return super()._post(arriving, sent, *arguments)


class Noted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, events):
        ctx.events = events
        events.append("experts")
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.events.append("experts")
        return grad, None


def watch():
    axis = axis_of_all()
    x, weights, experts, grad = batch("spread", TOKENS[axis.rank], 64, axis.rank)
    x, weights = x.bfloat16().requires_grad_(), weights.float().requires_grad_()
    exchange = Watched(axis)

    def noted(x, weights, *_):
        return Noted.apply(x * weights.sum(1, keepdim=True).to(x.dtype), exchange.events)

    out = expert_parallel(x, weights, experts, EXPERTS, axis, noted, chunks=3, exchange=exchange)
    # chunk i + 1 leaves before the experts of chunk i begin
    assert exchange.events == ["pack", "pack", "experts", "back", "pack", "experts", "back", "experts", "back"]
    exchange.events.clear()
    out.backward(grad.bfloat16())
    # all gradients leave at once; those of x and of the weights go back while the chunk before computes
    assert exchange.events == ["pack"] * 3 + ["experts", "back", "back"] * 3
    exchange.events.clear()
    exchange.bytes.clear()
    expert_parallel(x, weights, experts, EXPERTS, axis, lambda x, w, e, _: x, exchange=exchange)
    # one row for each rank with one of the token's experts, but the token's own rank: hidden state, weights, experts
    others = sum(len({e // 2 for e in token} - {axis.rank}) for token in experts.tolist())
    there = others * (64 * 2 + 16 + 16)
    back = sum(len({e // 2 for e in token} & {axis.rank}) for r in range(4) if r != axis.rank
               for token in batch("spread", TOKENS[r], 64, r)[2].tolist()) * 64 * 2
    assert exchange.bytes == [there, back]
    exchange.bytes.clear()
    expert_parallel(x, weights, experts, EXPERTS, axis, lambda x, w, e, _: x, exchange=exchange, fp8_payload=True)
    assert exchange.bytes == [others * (64 + 3 * 16), back]


def test_what_travels_and_when():
    on_ranks(4, watch)


def test_one_rank_calls_its_experts():
    x, weights, experts, _ = batch("spread", 5, 4, 0)
    got = expert_parallel(x, weights, experts, EXPERTS, Axis(), lambda *arguments: arguments)
    assert got == (x, weights, experts, 15)


def test_arguments_that_do_not_fit_are_named():
    x, weights, experts, _ = batch("spread", 5, 4, 0)

    def call(x=x, weights=weights, experts=experts, num_experts=EXPERTS, **options):
        return expert_parallel(x, weights, experts, num_experts, Axis(3, 0), lambda x, *_: x, **options)

    with pytest.raises(ValueError, match=r"^x: torch\.int64 \[5, 4\], need"):
        call(x=x.long())
    with pytest.raises(ValueError, match=r"^weights: torch\.float32 \[5, 3\], need torch\.float64 \[5, top_k\]"):
        call(weights=weights.float())
    with pytest.raises(ValueError, match=r"^weights: torch\.float64 \[4, 3\]"):
        call(weights=weights[1:])
    with pytest.raises(ValueError, match=r"^experts: torch\.int64 \[5, 3\], need torch\.int32 \[5, 3\]"):
        call(experts=experts.long())
    with pytest.raises(ValueError, match=r"^num_experts: 8, need a multiple of the 3 ranks; nearest is 9"):
        call()
    with pytest.raises(ValueError, match=r"^fp8_payload: True, but x is torch\.float64"):
        call(fp8_payload=True)
    with pytest.raises(ValueError, match=r"^chunks: 0, need 1 or more"):
        call(chunks=0)


def without_peer_memory():
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("megatron_m2.parallel.peer_memory").addHandler(handler)
    assert peer_memory(axis_of_all(), 1000, torch.device("cpu")) is None
    assert len(said) == (dist.get_rank() == 0)
    assert all(line.startswith("experts' rows travel by all-to-all, not through peer memory: ") and "\n" not in line for line in said)
    with pytest.raises(ValueError, match=r"^slot_bytes: 0, need 1 or more"):
        peer_memory(axis_of_all(), 0, torch.device("cpu"))


def test_ranks_without_peer_memory_say_so_once():
    on_ranks(2, without_peer_memory)


def test_the_cases_are_what_they_are_named():
    """No tokens on a rank, none for a rank, an expert without any, a token with all choices on one rank."""
    assert 0 in TOKENS
    counts = sum(plan_rows(batch("one rank", n, 4, r)[2], EXPERTS, 4).counts for r, n in enumerate(TOKENS))
    assert counts[:3].tolist() == [[0, 0]] * 3
    assert int(counts[3, 1]) > int(counts[3, 0]) > 0
    assert not any(bool((batch("one rank", n, 4, r)[2] == 6).any()) for r, n in enumerate(TOKENS))

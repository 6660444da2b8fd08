"""The same model in transformers: logits, gradients, training and greedy text, through both directions of conversion."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import megatron_m2
from megatron_m2.forest import TokenForest
from megatron_m2.model.config import ModelConfig
from megatron_m2.model.hf import layout
from megatron_m2.model.m2 import M2Model, build_model

transformers = pytest.importorskip("transformers", minversion="5.19")

CONFIGS = {
    "m2_like": ModelConfig(vocab_size=211, hidden_size=48, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, head_dim=16,
                           rotary_dim=8, num_experts=8, top_k=2, intermediate_size=24, max_position_embeddings=128),
    "one_kv_head_quarter_rotary": ModelConfig(vocab_size=97, hidden_size=40, num_hidden_layers=2, num_attention_heads=4,
                                              num_key_value_heads=1, head_dim=24, rotary_dim=6, rope_theta=1e4, num_experts=5, top_k=3,
                                              intermediate_size=20, rms_norm_eps=1e-5, max_position_embeddings=128),
    "full_rotary_top1": ModelConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4,
                                    head_dim=8, rotary_dim=8, num_experts=4, top_k=1, intermediate_size=16, max_position_embeddings=128),
    # int(44 * (30 / 44)) is 29: the factor in config.json must survive transformers' rounding
    "awkward_rotary_all_experts": ModelConfig(vocab_size=130, hidden_size=56, num_hidden_layers=4, num_attention_heads=3,
                                              num_key_value_heads=3, head_dim=44, rotary_dim=30, rope_theta=5e5, num_experts=6, top_k=6,
                                              intermediate_size=12, max_position_embeddings=128),
    "many_experts": ModelConfig(vocab_size=301, hidden_size=64, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
                                head_dim=8, rotary_dim=4, num_experts=32, top_k=8, intermediate_size=8, max_position_embeddings=128),
}


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Weights large enough for sharp attention and uneven logits; norms and router biases random too."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith(("router.bias", "e_score_correction_bias")):
            tensor.copy_(0.2 * noise)
        elif tensor.dim() == 1:
            tensor.copy_(1 + 0.3 * noise)
        else:
            tensor.copy_(noise * (0.5 if "embed" in name else tensor.shape[-1] ** -0.5))


def reference(path: Path) -> torch.nn.Module:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager",
                                                                    experts_implementation="eager", output_loading_info=True)
    mtp = tuple(f"model.layers.{model.config.num_hidden_layers + k}." for k in range(model.config.num_mtp_modules or 0))
    info["unexpected_keys"] = {key for key in info["unexpected_keys"] if not key.startswith(mtp)}  # transformers has no MTP for M2
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def exported(config: ModelConfig, path: Path, seed: int = 0) -> tuple[M2Model, torch.nn.Module]:
    """Ours, and transformers' model read from our export."""
    ours = build_model(config, seed=seed)
    randomize(ours, seed)
    megatron_m2.save_hf(ours, path)
    return ours, reference(path)


def relative(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over largest magnitude of the reference."""
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def tokens_of(config: ModelConfig, *shape: int, seed: int = 1) -> Tensor:
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def their_gradients(theirs: torch.nn.Module, config: ModelConfig) -> dict[str, Tensor]:
    """Their gradients under the names of the files; transformers keeps experts stacked in memory, as we do."""
    found = {}
    for name, parameter in theirs.named_parameters():
        key = name.replace(".mlp.gate.weight", ".block_sparse_moe.gate.weight")
        if ".mlp.experts." not in name:
            found[key] = parameter.grad
            continue
        stem = key.split(".mlp.")[0] + ".block_sparse_moe.experts"
        for e, grad in enumerate(parameter.grad):
            if name.endswith("down_proj"):
                found[f"{stem}.{e}.w2.weight"] = grad
            else:
                found[f"{stem}.{e}.w1.weight"], found[f"{stem}.{e}.w3.weight"] = grad.split(config.intermediate_size)
    return found


def our_loss(model: M2Model, batch: Tensor) -> Tensor:
    forest = TokenForest.from_documents(list(batch.numpy()))
    return -(model(forest).logprobs * forest.weight).sum() / forest.weight.sum()


def their_loss(model: torch.nn.Module, batch: Tensor) -> Tensor:
    logits = model(batch, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_of_our_export(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    ours, theirs = exported(config, tmp_path / "hf")
    batch = tokens_of(config, 3, 64)
    with torch.no_grad():
        expected = theirs(batch).logits
    frequencies = config.rope_theta ** -(torch.arange(0, config.rotary_dim, 2) / config.rotary_dim)
    torch.testing.assert_close(theirs.model.rotary_emb.inv_freq, frequencies)
    assert relative(megatron_m2.logits(ours, batch), expected) < 1e-5
    # the training path: a forest of documents of several lengths gives each document's own log-probabilities
    lengths = (64, 1, 17, 40)
    documents = [batch[i % 3, :n] for i, n in enumerate(lengths)]
    with torch.no_grad():
        together = ours(TokenForest.from_documents([d.numpy() for d in documents])).logprobs.split(lengths)
        for document, got in zip(documents, together, strict=True):
            want = theirs(document[None]).logits[0, :-1].log_softmax(-1).gather(1, document[1:, None]).squeeze(1)
            assert got[0] == 0
            torch.testing.assert_close(got[1:], want, rtol=1e-5, atol=1e-5)
            alone = ours(TokenForest.from_documents([document.numpy()])).logprobs
            torch.testing.assert_close(got, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_of_their_checkpoint(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    theirs = transformers.MiniMaxM2ForCausalLM(transformers.MiniMaxM2Config(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers, num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads, head_dim=config.head_dim, rms_norm_eps=config.rms_norm_eps,
        max_position_embeddings=config.max_position_embeddings, num_experts_per_tok=config.top_k, num_local_experts=config.num_experts,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta,
                         "partial_rotary_factor": (config.rotary_dim + 0.5) / config.head_dim},
        bos_token_id=None, eos_token_id=None, attn_implementation="eager", experts_implementation="eager")).eval()
    randomize(theirs, 7)
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="100KB")
    batch = tokens_of(config, 2, 50)
    with torch.no_grad():
        assert relative(megatron_m2.logits(megatron_m2.load(tmp_path / "hf"), batch), theirs(batch).logits) < 1e-5


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    ours, theirs = exported(config, tmp_path / "hf", seed=3)
    batch = tokens_of(config, 4, 48)
    our_loss(ours, batch).backward()
    their_loss(theirs, batch).backward()
    expected, ours_by_name = their_gradients(theirs, config), {n: p.grad for n, p in ours.named_parameters()}
    compared = [slot for slot in layout(config) if slot.name in ours_by_name]
    assert {slot.key for slot in compared} == set(expected)
    for slot in compared:
        got, want = slot.view(ours_by_name), expected[slot.key]
        if config.top_k == 1 and slot.key.endswith("gate.weight"):
            assert got.abs().max() < 1e-6  # one expert's normalised weight is 1: its router gets no gradient, only rounding
            assert want.abs().max() < 1e-6
        else:
            assert relative(got, want) < 1e-4, slot.key


@pytest.mark.parametrize("name", CONFIGS)
def test_fifty_adamw_steps(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    ours, theirs = exported(config, tmp_path / "hf", seed=5)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.1) for m in (ours, theirs)]
    losses = []
    for step in range(50):
        batch = tokens_of(config, 2, 32, seed=100 + step % 10)
        pair = our_loss(ours, batch), their_loss(theirs, batch)
        for loss, optimizer in zip(pair, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append([loss.item() for loss in pair])
    mine, reference_losses = torch.tensor(losses).unbind(1)
    torch.testing.assert_close(mine, reference_losses, rtol=1e-4, atol=0)
    assert reference_losses[-10:].mean() < 0.9 * reference_losses[:10].mean()  # they learned something


@pytest.mark.parametrize(("name", "num_mtp_modules"), [("m2_like", 0), ("m2_like", 1), ("many_experts", 0)])
def test_greedy_text(name: str, num_mtp_modules: int, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIGS[name], num_mtp_modules=num_mtp_modules)
    ours, theirs = exported(config, tmp_path / "hf")
    prompts = tokens_of(config, 3, 9)
    with torch.no_grad():
        expected = theirs.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=40, do_sample=False, eos_token_id=None,
                                   pad_token_id=0)
    assert torch.equal(megatron_m2.generate(ours, prompts, 40, temperature=0), expected)


def test_the_reference_notices_full_rotary(tmp_path: Path) -> None:
    """The comparison above can fail: a model that rotates whole heads is far off."""
    config = CONFIGS["m2_like"]
    ours, theirs = exported(config, tmp_path / "hf")
    wrong = copy.deepcopy(ours)
    object.__setattr__(wrong.config, "rotary_dim", config.head_dim)
    batch = tokens_of(config, 1, 64)
    with torch.no_grad():
        assert relative(megatron_m2.logits(wrong, batch), theirs(batch).logits) > 1e-2

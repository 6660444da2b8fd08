"""The loop: it learns, balances its experts, evaluates in bits per byte, reports, and says what is wrong in one line."""

from __future__ import annotations

import json
import math
import os
from itertools import pairwise

import matplotlib.image
import pytest
import torch

import megatron_m2
from megatron_m2.data.dataset import Dataset
from megatron_m2.forest import TokenForest
from megatron_m2.model.m2 import build_model
from megatron_m2.parallel.layout import ParallelConfig
from megatron_m2.parallel.mesh import ONE
from megatron_m2.train import main
from megatron_m2.training.compose import read_config
from megatron_m2.training.evaluate import evaluate
from megatron_m2.training.metrics import expert_load, forest_forward_flops, read_metrics
from megatron_m2.training.stages import ModelStages
from megatron_m2.training.trainer import Trainer, pick_device
from tests.conftest import tiny_config
from tests.training.conftest import overrides


def test_a_run_learns_and_leaves_everything(data, tmp_path, capsys):
    arguments = overrides(data, tmp_path, **{"stage.steps": 60, "run.sample_tokens": 12, "run.export": "true", "run.wandb": "offline"})
    assert main(arguments) == 0
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in rows] == list(range(1, 61))
    assert rows[0]["loss/lm"] == pytest.approx(math.log(320), abs=0.2)
    assert rows[-1]["loss/lm"] < 0.6 * rows[0]["loss/lm"]
    assert rows[-1]["loss/mtp"] < 0.8 * rows[0]["loss/mtp"]
    assert rows[-1]["loss/mtp_weight"] == pytest.approx(0.1)
    assert rows[-1]["eval/bits_per_byte"] < 0.7 * rows[6]["eval/bits_per_byte"]
    assert rows[-1]["data/tokens"] == 60 * 2 * 256
    for name in ("throughput/tokens_per_s", "throughput/model_tflops_per_s", "time/step_s", "optim/grad_norm", "moe/bias_abs_max"):
        assert rows[-1][name] > 0
    assert matplotlib.image.imread(tmp_path / "loss.png").shape[0] > 300
    out = capsys.readouterr().out
    for shown in ("checkpoints", "metrics.jsonl", "loss.png", "hf", "xz -9", "--- sample", "expert load max/mean"):
        assert shown in out
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"] == Dataset(data).tokenizer().eos_id
    native, exported = megatron_m2.load(tmp_path), megatron_m2.load(tmp_path / "hf")
    tokens = torch.randint(0, 320, (1, 20))
    assert torch.equal(megatron_m2.logits(native, tokens), megatron_m2.logits(exported, tokens))
    assert len(list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))) == 1
    assert (tmp_path / "wandb_id").read_text().strip()


def whole(config):
    return ModelStages(config, ParallelConfig(), ONE, torch.float64, "cpu", seed=0)


def test_fp8_experts_learn_as_bf16_ones(data, tmp_path):
    losses = []
    for fp8 in ("false", "true"):
        folder = tmp_path / fp8
        assert main(overrides(data, folder, **{"stage.steps": 40, "model.fp8_experts": fp8})) == 0
        losses.append([r["loss/lm"] for r in read_metrics(folder / "metrics.jsonl")])
    assert losses[0] != losses[1]
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 0.03 * losses[0][0]


def test_bits_per_byte_of_a_uniform_model_is_known(data):
    stages = whole(tiny_config(vocab_size=320))
    with torch.no_grad():
        stages.state_dict()["lm_head.weight"].zero_()
    dataset = Dataset(data)
    forests, text_bytes = dataset.held_out("prose", 256, 64)
    result = evaluate(stages, forests)
    held_out = dataset.manifest["datasets"]["prose"]
    # every token but the bos of each document is predicted once, at log2(vocabulary) bits
    assert result.tokens == held_out["heldout_tokens"] - held_out["heldout_documents"]
    assert result.bits_per_byte(text_bytes) == pytest.approx(result.tokens * math.log2(320) / held_out["heldout_bytes"], rel=1e-12)


def test_evaluating_nothing_is_refused():
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate(whole(tiny_config()), [])
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate(whole(tiny_config()), [TokenForest.from_documents([[1]])])


def test_accumulation_equals_one_large_batch(data, tmp_path):
    """Two forests per step give the gradient of all their tokens together, however they are cut."""
    trainer = Trainer(read_config(overrides(data, tmp_path, **{"run.dtype": "float64", "model.router_aux_loss_coef": 0.0})))
    twin = build_model(trainer.config.model, torch.float64, seed=trainer.config.run.seed)
    stream = Dataset(data).stream(trainer.config.data.blend, tokens_per_forest=256, seq_len=64, seed=0,
                                  open_documents=trainer.config.data.open_documents)
    forests = [next(stream) for _ in range(2)]
    roots = [(f.depth == 0).nonzero().squeeze(1).tolist() for f in forests]
    chains = [f.tokens[a:b].numpy() for f, starts in zip(forests, roots, strict=True) for a, b in pairwise([*starts, len(f)])]
    together = TokenForest.from_documents(chains)
    output = twin(together)
    deep = (together.weight * (together.depth > 1)).sum()
    loss = -(together.weight * output.logprobs).sum() / together.weight.sum()
    loss = loss - 0.3 * (together.weight * output.mtp_logprobs[0]).sum() / deep
    loss.backward()
    norm = float(torch.nn.utils.get_total_norm([p.grad for p in twin.parameters()]))
    assert trainer.train_step()["optim/grad_norm"] == pytest.approx(norm, rel=1e-10)


def test_router_bias_moves_against_the_load(data, tmp_path):
    trainer = Trainer(read_config(overrides(data, tmp_path, **{"stage.router_bias_rate": 0.01})))
    trainer.train_step()
    assert [row for row, _ in trainer.stages.routers()] == [0, 1, 2]  # two layers, one MTP module
    for row, router in trainer.stages.routers():
        counts = trainer.last_counts[row].double()
        expected = 0.01 * torch.sign(counts.mean() - counts)
        assert torch.allclose(router.bias.double(), expected, atol=1e-8)


def test_divergence_stops_the_run_with_one_line(data, tmp_path, capsys):
    assert main(overrides(data, tmp_path, **{"optim.lr": 1e30, "run.dtype": "float32", "stage.warmup_steps": 0})) == 1
    assert "error: training diverged: gradient norm is" in capsys.readouterr().err


def test_flops_count_every_part():
    config = tiny_config(num_mtp_modules=1)
    forest = TokenForest.from_documents([range(10), range(5)])
    without = forest_forward_flops(tiny_config(), forest)
    assert without == config.forward_flops(15, 55 + 15, 13)
    assert forest_forward_flops(config, forest) == config.forward_flops(15, 70, 13 + 11, 13)


def test_expert_load():
    load = expert_load(torch.tensor([[4, 4, 4, 4], [8, 8, 0, 0]]))
    assert load["moe/max_over_mean_load"] == 2.0
    assert load["moe/max_over_mean_load_layer_avg"] == 1.5
    assert load["moe/idle_experts_share"] == 0.25


def test_a_row_that_a_kill_cut_short_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "x": 2}\n{"step": 2, "x"')
    assert read_metrics(path) == [{"step": 1, "x": 2}]
    assert read_metrics(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize(("changes", "message"), [
    ({"data.path": "/nowhere"}, "data.path = /nowhere: no manifest.json here"),
    ({"model.vocab_size": 300}, "model.vocab_size = 300:"),
    ({"data.blend": "{poetry: 1.0, code: 0.0, prose: 0.0}"}, "poetry"),
    ({"run.device": "cuda"}, "run.device = cuda: "),
])
def test_what_does_not_fit_is_refused_in_one_line(changes, message, data, tmp_path, capsys):
    if "run.device" in changes and torch.cuda.is_available():
        pytest.skip("this machine has the GPU that the test needs to be absent")
    assert main(overrides(data, tmp_path, **changes)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


def test_a_truncated_bin_is_refused(data, tmp_path, capsys):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(data, broken)
    victim = broken / "code_train.bin"
    os.truncate(victim, victim.stat().st_size - 2)
    assert main(overrides(broken, tmp_path / "run")) == 2
    assert f"{victim}: " in capsys.readouterr().err


def test_a_disk_that_is_full_while_saving_ends_in_one_line(data, tmp_path, capsys):
    blocked = tmp_path / "run"
    blocked.mkdir()
    (blocked / "checkpoints").write_text("a file where the folder should be")
    assert main(overrides(data, blocked)) == 2
    assert f"error: cannot save {blocked / 'checkpoints'}" in capsys.readouterr().err


def test_device_names():
    assert pick_device("cpu").type == "cpu"
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ValueError, match=r"run.device = tpux"):
        pick_device("tpux")

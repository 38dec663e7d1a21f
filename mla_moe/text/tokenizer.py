"""Tokenizers: raw bytes, any `tokenizer.json`, or a byte-level BPE that is trained on the text of the run."""

import json
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tokenizers

from mla_moe.config import ConfigError
from mla_moe.config.files import read_text
from mla_moe.config.storage import is_url, local_file
from mla_moe.text.isolated import text_worker
from mla_moe.text.special_tokens import (
    BYTE_SPECIAL_IDS,
    MAX_TOKENIZER_BYTES,
    open_tokenizer,
    tokenizer_errors,
)  # fmt: skip

_FIELD = "data.tokenizer"
_SAMPLE_CHARACTERS = 6_000_000  # enough to rank a few thousand merges; more only takes longer
_MAX_TOKEN_CHARACTERS = 1024  # of a token of a BPE
TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "chat_template.jinja")
_ALPHABET = set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
_BYTE_LEVEL = dict(zip(sorted(_ALPHABET), sorted(range(256), key=lambda b: (chr(b) not in _ALPHABET, b)), strict=True))
"""Characters of byte-level BPE to bytes: printable bytes are themselves, the others follow U+00FF in order."""

Message = Mapping[str, Any]
"""One message of a conversation, `{"role": …, "content": …}`."""
Decode = Callable[[Iterable[int]], str]
"""Token ids to text."""


class Tokenizer(Protocol):
    """The interface of every tokenizer in this package."""

    name: str
    vocab_size: int
    """Largest token id plus one: the number of embedding rows that a model needs at least."""
    bos_id: int
    eos_id: int

    def encode(self, text: str, *, special: bool = False) -> np.ndarray:
        """The token ids of `text`, int32. Special tokens that the text spells are plain text, unless `special`. Raises
        `ConfigError` if the tokenizer fails."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`. Special tokens are skipped; invalid UTF-8 becomes U+FFFD. Raises `ConfigError` if the
        tokenizer fails."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """What a token contributes to the UTF-8 of a text, which may be part of a character; none if it is special."""
        ...

    def token_name(self, token: int) -> str:
        """The name of a token, such as `<s>`."""
        ...


class UnknownTokenizer:
    """Tokenizer of ids that are given without their tokenizer, but for the id that ends a document: `ids:EOS`. It has
    no text."""

    def __init__(self, eos_id: int):
        self.name, self.vocab_size, self.bos_id, self.eos_id = f"ids:{eos_id}", eos_id + 1, eos_id, eos_id

    def encode(self, text: str, *, special: bool = False) -> np.ndarray:
        fix = "has token ids only: a text, such as that of a file or of sample.prompts, needs a tokenizer; name it"
        raise ConfigError(_FIELD, self.name, fix)

    def decode(self, ids: Iterable[int]) -> str:
        return " ".join(map(self.token_name, ids))

    def token_bytes(self, token: int) -> bytes:
        return b""

    def token_name(self, token: int) -> str:
        return f"<{int(token)}>"


class ByteTokenizer:
    """UTF-8 bytes as token ids 0 … 255, then bos (256) and eos (257)."""

    name = "byte"
    vocab_size = 258
    bos_id = BYTE_SPECIAL_IDS["bos_token_id"]
    eos_id = BYTE_SPECIAL_IDS["eos_token_id"]

    def encode(self, text: str, *, special: bool = False) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in map(int, ids) if i < 256).decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else b""

    def token_name(self, token: int) -> str:
        return {self.bos_id: "<bos>", self.eos_id: "<eos>"}.get(token, f"<{token}>")


class HFTokenizer:
    """A Hugging Face `tokenizer.json`; `special_tokens.special_ids` finds its bos and eos."""

    def __init__(self, path: str | Path):
        path = Path(path)
        self.name = str(path)
        if not path.exists():
            raise ConfigError(_FIELD, self.name, "no such file; give byte, bpe:SIZE or the path of a tokenizer.json")
        ids = text_worker().open(path)  # opening it may hang or crash: first in a worker process
        self._tokenizer = open_tokenizer(path)
        self._tokenizer.encode_special_tokens = True  # "</s>" in a document is text, not its end
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.bos_id, self.eos_id = ids["bos_token_id"], ids["eos_token_id"]

    @cached_property
    def _with_special(self) -> tokenizers.Tokenizer:
        """A second tokenizer, because threads share the first: changing its setting would change their texts."""
        return open_tokenizer(Path(self.name))

    def encode(self, text: str, *, special: bool = False) -> np.ndarray:
        tokenizer = self._with_special if special else self._tokenizer
        with tokenizer_errors(_FIELD, self.name, f"cannot encode {text[:40]!r}"):
            return np.asarray(tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        tokens = [int(i) for i in ids]
        with tokenizer_errors("tokenizer", self.name, f"cannot decode {len(tokens)} tokens"):
            return self._tokenizer.decode(tokens, skip_special_tokens=True)

    def token_name(self, token: int) -> str:
        return self._tokenizer.id_to_token(token) or f"<{token}>"

    def token_bytes(self, token: int) -> bytes:
        # After itself a token keeps the space that starts a word, which decoders strip from the start of a text.
        text = self.decode([token, token])[len(self.decode([token])) :]
        piece = self._tokenizer.id_to_token(token)
        if "\ufffd" not in text or piece is None:
            return text.encode()
        if re.fullmatch("<0x[0-9A-F]{2}>", piece):  # SentencePiece's byte fallback
            return bytes.fromhex(piece[3:5])
        return bytes(_BYTE_LEVEL[c] for c in piece) if _BYTE_LEVEL.keys() >= set(piece) else text.encode()


def train_bpe(documents: Sequence[str], vocab_size: int, path: str | Path) -> None:
    """Train a byte-level BPE tokenizer of exactly `vocab_size` tokens on a sample of `documents`.

    Writes `tokenizer.json` to `path`, and beside it the `tokenizer_config.json` that transformers needs. The same
    documents give the same file, byte for byte, and the write is atomic: processes that share a run directory may all
    train and write it. Each digit is a token of its own, as in DeepSeek's tokenizers. Raises `ConfigError` where the
    text has too few different tokens.
    """
    path = Path(path)
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([digits, byte_level])
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(byte_level.alphabet()),  # all 256 bytes, so that any text can be encoded
        max_token_length=_MAX_TOKEN_CHARACTERS,
        show_progress=False,
    )
    bpe.train_from_iterator(_sample(documents), trainer)
    if bpe.get_vocab_size() < vocab_size:
        raise ConfigError(_FIELD, f"bpe:{vocab_size}", f"the training text yields only {bpe.get_vocab_size()} tokens")
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    _write(path, {"tokenizer_config.json": json.dumps(names), path.name: bpe.to_str()})


def _write(path: Path, texts: Mapping[str, str]) -> None:
    """Write files by name beside `path`, each atomically. `path` itself is the last: if it exists, all do."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for target, text in ((path.with_name(name), text) for name, text in texts.items()):
        unfinished = target.with_name(f"{target.name}.{uuid.uuid4().hex}")
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, target)


def _sample(documents: Sequence[str]) -> Iterator[str]:
    """Documents in a fixed random order, `_SAMPLE_CHARACTERS` in total; the last one is truncated."""
    left = _SAMPLE_CHARACTERS
    for index in np.random.default_rng(0).permutation(len(documents)).tolist():
        text = documents[index]
        yield text[:left]
        left -= len(text)
        if left <= 0:
            return


def load_tokenizer(
    spec: str, run_dir: str | Path, documents: Sequence[str], inherited: Path | None = None
) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names: `byte`, the path of a `tokenizer.json`, a model of the Hub, `ids:EOS`,
    or `bpe:SIZE`.

    `bpe:SIZE` is trained on `documents` when the run starts and saved in `run_dir`, from where a resumed run loads it.
    A run that is initialized from a checkpoint takes the checkpoint's tokenizer `inherited` instead, because token ids
    of another tokenizer have other meanings. Raises `ConfigError` where the size differs.
    """
    if spec == "byte":
        return ByteTokenizer()
    if spec.startswith("ids:"):
        return UnknownTokenizer(int(spec.removeprefix("ids:")))
    if not spec.startswith("bpe:"):
        return HFTokenizer(tokenizer_path(spec))
    size, path = int(spec.removeprefix("bpe:")), Path(run_dir) / "tokenizer.json"
    if not path.exists():
        if inherited is None:
            train_bpe(documents, size, path)
        else:
            _check_size(HFTokenizer(inherited), size, "give data.tokenizer that size")
            files = {name: inherited.with_name(name) for name in TOKENIZER_FILES} | {path.name: inherited}
            found = {name: file for name, file in files.items() if os.path.lexists(file)}
            _write(path, {name: read_text(file, _FIELD, MAX_TOKENIZER_BYTES) for name, file in found.items()})
    tokenizer = HFTokenizer(path)
    _check_size(tokenizer, size, "use another run_dir")
    return tokenizer


def tokenizer_path(spec: str) -> Path:
    """The `tokenizer.json` that `spec` names: a path, or a URL, of which a copy is made."""
    return local_file(spec, _FIELD, "tokenizer.json", TOKENIZER_FILES) if is_url(spec) else Path(spec)


def _check_size(tokenizer: HFTokenizer, size: int, fix: str) -> None:
    if tokenizer.vocab_size != size:
        raise ConfigError(_FIELD, f"bpe:{size}", f"{tokenizer.name} has {tokenizer.vocab_size} tokens; {fix}")

"""Text to token ids and back: raw bytes, any `tokenizer.json`, or a byte-level BPE trained on the run's own text."""

import json
import os
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import tokenizers

from mla_moe.config import ConfigError
from mla_moe.text.special_tokens import BYTE_SPECIAL_IDS, open_tokenizer, special_ids

_FIELD = "data.tokenizer"
_SAMPLE_CHARACTERS = 6_000_000  # enough to rank a few thousand merges; more only takes longer


class Tokenizer(Protocol):
    """What the package needs of a tokenizer."""

    name: str
    vocab_size: int
    """One more than the largest id: the rows that an embedding needs."""
    bos_id: int
    eos_id: int

    def encode(self, text: str) -> np.ndarray:
        """The ids of `text`, int32, with no special token: not even where the text spells one out."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; special ids are skipped, broken UTF-8 becomes U+FFFD."""
        ...


class ByteTokenizer:
    """UTF-8 bytes as ids 0 … 255, then bos and eos."""

    name = "byte"
    vocab_size = 258
    bos_id = BYTE_SPECIAL_IDS["bos_token_id"]
    eos_id = BYTE_SPECIAL_IDS["eos_token_id"]

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in map(int, ids) if i < 256).decode("utf-8", errors="replace")


class HFTokenizer:
    """A Hugging Face `tokenizer.json`, with the bos and eos that `special_ids` finds."""

    def __init__(self, path: str | Path):
        path = Path(path)
        self.name = str(path)
        if not path.is_file():
            raise ConfigError(_FIELD, self.name, "no such file; give byte, bpe:SIZE or the path of a tokenizer.json")
        self._tokenizer = open_tokenizer(path)
        self._tokenizer.encode_special_tokens = True  # a document that spells "</s>" must not end itself
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        ids = special_ids(self._tokenizer, path)
        self.bos_id, self.eos_id = ids["bos_token_id"], ids["eos_token_id"]

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)


def train_bpe(documents: Sequence[str], vocab_size: int, path: str | Path) -> None:
    """Train a byte-level BPE of exactly `vocab_size` tokens on a sample of `documents` and write its `tokenizer.json`,
    and beside it the `tokenizer_config.json` that transformers wants.

    The same documents give the same file, byte for byte, and it appears at once or not at all: processes that share
    a run's directory may all train and write it. Digits stand alone, as in DeepSeek's tokenizers.
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
        initial_alphabet=sorted(byte_level.alphabet()),  # all 256 bytes: any text can be encoded
        show_progress=False,
    )
    bpe.train_from_iterator(_sample(documents), trainer)
    if bpe.get_vocab_size() < vocab_size:
        raise ConfigError(_FIELD, f"bpe:{vocab_size}", f"the training text yields only {bpe.get_vocab_size()} tokens")
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    _write(path, bpe.to_str(), json.dumps(names))


def _write(path: Path, tokenizer: str, config: str | None) -> None:
    """`tokenizer.json` last: where it is, the other is too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for target, text in ((path.with_name("tokenizer_config.json"), config), (path, tokenizer)):
        if text is not None:
            unfinished = target.with_name(f"{target.name}.{uuid.uuid4().hex}")
            unfinished.write_text(text, encoding="utf-8")
            os.replace(unfinished, target)


def _sample(documents: Sequence[str]) -> Iterator[str]:
    """Documents in a fixed random order, the last one cut, `_SAMPLE_CHARACTERS` in all."""
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
    """The tokenizer that `data.tokenizer` names: `byte`, the path of a `tokenizer.json`, or `bpe:SIZE`.

    `bpe:SIZE` is trained on `documents` when the run starts and kept in `run_dir`, from where a resumed run loads it.
    Where the run goes on from a checkpoint, it is that one's instead, `inherited`: to its model the ids of another
    mean nothing.
    """
    if spec == "byte":
        return ByteTokenizer()
    if not spec.startswith("bpe:"):
        return HFTokenizer(spec)
    size, path = int(spec.removeprefix("bpe:")), Path(run_dir) / "tokenizer.json"
    if not path.exists():
        if inherited is None:
            train_bpe(documents, size, path)
        else:
            _check_size(HFTokenizer(inherited), size, "ask for as many")
            config = inherited.with_name("tokenizer_config.json")
            _write(path, inherited.read_text("utf-8"), config.read_text("utf-8") if config.is_file() else None)
    tokenizer = HFTokenizer(path)
    _check_size(tokenizer, size, "use another run_dir")
    return tokenizer


def _check_size(tokenizer: HFTokenizer, size: int, fix: str) -> None:
    if tokenizer.vocab_size != size:
        raise ConfigError(_FIELD, f"bpe:{size}", f"{tokenizer.name} has {tokenizer.vocab_size} tokens; {fix}")

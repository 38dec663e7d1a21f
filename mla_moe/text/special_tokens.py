"""Special tokens: bos, eos and pad of the byte tokenizer and of a `tokenizer.json`."""

import contextlib
import json
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import tokenizers

from mla_moe.config import ConfigError, require
from mla_moe.config.files import read_json_object, read_text

MAX_TOKENIZER_BYTES = 40 << 20
"""Largest size of a `tokenizer.json`; the largest released ones, of 262,144 tokens, have 33 MB."""
MAX_TOKEN_CHARACTERS = 16384
"""Largest length of a token. In released tokenizers the longest are runs of a few hundred spaces, but `train_bpe` once
had no limit."""

BYTE_SPECIAL_IDS = {"bos_token_id": 256, "eos_token_id": 257}
"""Special tokens of the byte tokenizer: the ids after the 256 bytes."""

_FIELD = "data.tokenizer"
_NAMES = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
_BOS_NAMES = (
    "<｜begin▁of▁sentence｜>",  # full-width bars, as in DeepSeek's tokenizers
    "<|begin▁of▁sentence|>",
    "<|begin_of_text|>",
    "<|startoftext|>",
    "<s>",
    "<bos>",
    "[BOS]",
    "<|im_start|>",
)
_EOS_NAMES = (
    "<｜end▁of▁sentence｜>",
    "<|end▁of▁sentence|>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "</s>",
    "<eos>",
    "[EOS]",
    "<|im_end|>",
)


def open_tokenizer(path: Path) -> tokenizers.Tokenizer:
    """Open a `tokenizer.json`, with truncation and padding off. As in transformers, tokens of `special_token_names` are
    special, with the flags that the file gives them. Raises `ConfigError` for any other file, and for a tokenizer whose
    texts could be much longer than their tokens.

    A file may also hang or crash the process that opens it: see `isolated.py`."""
    source, names = read_text(path, _FIELD, MAX_TOKENIZER_BYTES), special_token_names(path.parent)
    with tokenizer_errors(_FIELD, str(path), "is not a tokenizer.json"):
        tokenizer = tokenizers.Tokenizer.from_str(source)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        added = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
        known = [name for name in names.values() if tokenizer.token_to_id(name) is not None]
        tokenizer.add_special_tokens([added.get(name, name) for name in known])
    _require_cheap_decoding(tokenizer, path)
    return tokenizer


@contextlib.contextmanager
def tokenizer_errors(field: str, value: str, problem: str) -> Generator[None]:
    """Turns the errors of the Rust side into `ConfigError`: bare `Exception`, and panics, which are `BaseException`."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, ConfigError) or not (isinstance(error, Exception) or _is_panic(error)):
            raise
        raise ConfigError(field, value, f"{problem}: {error}") from None


def _is_panic(error: BaseException) -> bool:
    return type(error).__name__ == "PanicException"  # a class that PyO3 exports nowhere


def _require_cheap_decoding(tokenizer: tokenizers.Tokenizer, path: Path) -> None:
    """Raise `ConfigError` for a tokenizer that could decode a token to a long text, or search it with a regular
    expression, which may never end: the engine decodes all tokens of all requests in one thread."""
    longest = max(map(len, tokenizer.get_vocab(with_added_tokens=True)), default=0)
    fix = f"has a token of {longest} characters; at most {MAX_TOKEN_CHARACTERS:,} are supported"
    require(longest <= MAX_TOKEN_CHARACTERS, _FIELD, str(path), fix)
    decoder = tokenizer.decoder
    steps = [json.loads(decoder.__getstate__())] if decoder is not None else []
    for step in steps:  # grows by the steps of a sequence
        steps += step.get("decoders", [])
        pattern, content = step.get("pattern", {}).get("String", ""), step.get("content", "")
        grows = step["type"] == "Replace" and not (pattern and len(content) <= len(pattern))
        grows |= step.get("suffix") == "" or step.get("word_delimiter_token") == ""
        fix = f"has the decoder {json.dumps(step)[:200]}; only those that cannot lengthen a text are supported"
        require(not grows and len(steps) <= 32, _FIELD, str(path), fix)


def special_token_names(directory: Path) -> dict[str, str]:
    """The text of `bos_token` and the like, as transformers reads it: from `tokenizer_config.json`, overridden by
    `special_tokens_map.json` unless the former has an `added_tokens_decoder`. Raises `ConfigError` for other forms."""
    names: dict[str, str] = {}
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        contents = read_object(directory / file, _FIELD)
        for key in (name for name in _NAMES if name in contents):
            token = contents[key]
            token = token.get("content", token) if isinstance(token, dict) else token
            fix = f"{key} in {file} must be a string or an object with content"
            require(token is None or isinstance(token, str), _FIELD, str(directory / file), fix)
            names[key] = require_text(f"{key} in {file}", token or "")
        if "added_tokens_decoder" in contents:
            break
    return {key: token for key, token in names.items() if token}


def special_ids(tokenizer: tokenizers.Tokenizer, path: Path) -> dict[str, int]:
    """`bos_token_id` and `eos_token_id` of the tokenizer in the file `path`, and `pad_token_id` if it has one.

    They come from the files beside it (`special_token_names`), else from special tokens with a common name. If only one
    of bos and eos exists, it serves as both, as GPT-2's `<|endoftext|>` does. Raises `ConfigError` if neither exists.
    """
    names = special_token_names(path.parent)
    special = {t.content: i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special}
    ids = {}
    for key, common_names in (("bos_token", _BOS_NAMES), ("eos_token", _EOS_NAMES), ("pad_token", ())):
        token = names.get(key)
        found = (
            tokenizer.token_to_id(token) if token else next((special[t] for t in common_names if t in special), None)
        )
        if found is not None:
            ids[f"{key}_id"] = found
        elif token and common_names:
            raise ConfigError(
                _FIELD,
                str(path),
                f"has no token {token!r}, which the files beside it name as {key}; correct one of them",
            )
    shared = ids.get("bos_token_id", ids.get("eos_token_id"))
    if shared is None:
        raise ConfigError(_FIELD, str(path), "has no bos or eos token; name them in a tokenizer_config.json beside it")
    return {"bos_token_id": shared, "eos_token_id": shared} | ids


def read_object(path: Path, field: str) -> dict[str, Any]:
    """A file's JSON object; empty if there is no file. Raises `ConfigError` on `field` for other contents."""
    return read_json_object(path, field) if os.path.lexists(path) else {}


def require_text(field: str, text: str) -> str:
    """The text itself. Raises `ConfigError` for a lone surrogate, which JSON and command lines can contain."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(field, text[error.start], "is a lone surrogate (half of a character); remove it") from None
    return text

"""Special tokens: bos, eos and pad of the byte tokenizer and of a `tokenizer.json`."""

import json
from pathlib import Path
from typing import Any

import tokenizers

from mla_moe.config import ConfigError, require

BYTE_SPECIAL_IDS = {"bos_token_id": 256, "eos_token_id": 257}
"""Special tokens of the byte tokenizer: the ids after the 256 bytes."""

_FIELD = "data.tokenizer"
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
    """Open a `tokenizer.json`, with truncation and padding off. Raises `ConfigError` for any other file."""
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust side raises bare `Exception`
        raise ConfigError(_FIELD, str(path), f"is not a tokenizer.json: {error}") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def special_ids(tokenizer: tokenizers.Tokenizer, path: Path) -> dict[str, int]:
    """`bos_token_id` and `eos_token_id` of the tokenizer in the file `path`, and `pad_token_id` if it has one.

    They come from the `tokenizer_config.json` beside it, else from special tokens with a common name. If only one of
    bos and eos exists, it serves as both, as GPT-2's `<|endoftext|>` does. Raises `ConfigError` if neither exists.
    """
    names = read_object(path.with_name("tokenizer_config.json"), _FIELD)
    special = {t.content: i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special}
    ids = {}
    for key, common_names in (("bos_token", _BOS_NAMES), ("eos_token", _EOS_NAMES), ("pad_token", ())):
        token = names.get(key)
        token = token.get("content", token) if isinstance(token, dict) else token
        fix = f"{key} in tokenizer_config.json must be a string or an object with content"
        require(token is None or isinstance(token, str), _FIELD, str(path), fix)
        found = (
            tokenizer.token_to_id(token) if token else next((special[t] for t in common_names if t in special), None)
        )
        if found is not None:
            ids[f"{key}_id"] = found
        elif token and common_names:
            raise ConfigError(
                _FIELD,
                str(path),
                f"has no token {token!r}, which tokenizer_config.json names as {key}; correct one of the files",
            )
    shared = ids.get("bos_token_id", ids.get("eos_token_id"))
    if shared is None:
        raise ConfigError(_FIELD, str(path), "has no bos or eos token; name them in a tokenizer_config.json beside it")
    return {"bos_token_id": shared, "eos_token_id": shared} | ids


def read_object(path: Path, field: str) -> dict[str, Any]:
    """Read a JSON object; empty if there is no file. Raises `ConfigError` on `field` for other contents."""
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise ConfigError(field, str(path), "is not a JSON object; correct or remove the file")
    return config

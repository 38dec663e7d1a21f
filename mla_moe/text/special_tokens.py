"""Which tokens begin and end a text: those of bytes, and those of a `tokenizer.json`."""

import json
from pathlib import Path
from typing import Any

import tokenizers

from mla_moe.config import ConfigError, require

BYTE_SPECIAL_IDS = {"bos_token_id": 256, "eos_token_id": 257}
"""Where text is bytes, behind which they come."""

_FIELD = "data.tokenizer"
_BOS_NAMES = (
    "<｜begin▁of▁sentence｜>",  # full-width bars: DeepSeek's own
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
    """One that neither cuts nor pads. Raises `ConfigError` for a file that is no `tokenizer.json`."""
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust side raises bare `Exception`
        raise ConfigError(_FIELD, str(path), f"is not a tokenizer.json: {error}") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def special_ids(tokenizer: tokenizers.Tokenizer, path: Path) -> dict[str, int]:
    """`bos_token_id` and `eos_token_id` of the tokenizer in the file `path`, and `pad_token_id` if one is named.

    They are those of a `tokenizer_config.json` beside it, or else the special tokens with a usual name; where only one
    of bos and eos exists it serves as both, as GPT-2's `<|endoftext|>` does. Raises `ConfigError` where there is none.
    """
    names = read_object(path.with_name("tokenizer_config.json"), _FIELD)
    special = {t.content: i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special}
    ids = {}
    for key, usual in (("bos_token", _BOS_NAMES), ("eos_token", _EOS_NAMES), ("pad_token", ())):
        token = names.get(key)
        token = token.get("content", token) if isinstance(token, dict) else token
        fix = f"{key} in tokenizer_config.json is no text and no object with content"
        require(token is None or isinstance(token, str), _FIELD, str(path), fix)
        found = tokenizer.token_to_id(token) if token else next((special[t] for t in usual if t in special), None)
        if found is not None:
            ids[f"{key}_id"] = found
        elif token and usual:
            raise ConfigError(_FIELD, str(path), f"has no token {token!r}, the {key} of tokenizer_config.json")
    either = ids.get("bos_token_id", ids.get("eos_token_id"))
    if either is None:
        raise ConfigError(_FIELD, str(path), "has no bos or eos token; name them in a tokenizer_config.json beside it")
    return {"bos_token_id": either, "eos_token_id": either} | ids


def read_object(path: Path, field: str) -> dict[str, Any]:
    """A JSON object beside a tokenizer, empty without a file. Raises `ConfigError` on `field` for anything else."""
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise ConfigError(field, str(path), "is not a JSON object")
    return config

"""Chat tokenizer: a tokenizer together with its stop tokens and its chat template."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mla_moe.config import ConfigError
from mla_moe.text.special_tokens import open_tokenizer, read_object
from mla_moe.text.tokenizer import Decode, Message, Tokenizer

MAX_STOP_IDS = 8
"""Stop tokens that one request may have."""
_SPECIAL_TOKEN_KEYS = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]


@dataclasses.dataclass(frozen=True)
class ChatTokenizer:
    encode: Callable[[str], list[int]]
    """Prompt text to token ids, with bos in front. Special tokens in the text are treated as plain text."""
    encode_chat: Callable[[Sequence[Message]], list[int]]
    """A conversation to token ids, with the generation prompt at the end. Raises `ConfigError` without a template."""
    decode: Decode
    stop_ids: tuple[int, ...]
    """Tokens that end a completion."""


def load_chat_tokenizer(directory: Path, tokenizer: Tokenizer) -> ChatTokenizer:
    """Add the stop tokens and the chat template of a Hugging Face directory to `tokenizer`.

    The stop tokens are `eos_token_id` of `generation_config.json`, else the tokenizer's eos.
    """
    stops = read_object(directory / "generation_config.json", "generation_config.json").get("eos_token_id")
    stops = tokenizer.eos_id if stops is None else stops
    return ChatTokenizer(
        encode=lambda text: [tokenizer.bos_id, *tokenizer.encode(_require_valid("prompt", text)).tolist()],
        encode_chat=_chat_encoder(directory),
        decode=tokenizer.decode,
        stop_ids=tuple(stops if isinstance(stops, list) else [stops])[:MAX_STOP_IDS],
    )


def _chat_encoder(directory: Path) -> Callable[[Sequence[Message]], list[int]]:
    config = read_object(directory / "tokenizer_config.json", "tokenizer_config.json")
    file = directory / "chat_template.jinja"
    source = file.read_text(encoding="utf-8") if file.is_file() else config.get("chat_template")
    if isinstance(source, list):  # several templates, by name
        source = next((t.get("template") for t in source if isinstance(t, dict) and t.get("name") == "default"), None)
    if not isinstance(source, str) or not (directory / "tokenizer.json").is_file():
        return _without_template("messages", f"{directory} has no chat template; send a prompt instead")
    try:
        from mla_moe.text.chat_template import chat_template
    except ImportError:
        return _without_template("messages", "chat templates need jinja2: pip install 'mla_moe[serve]'")
    special = {key: _content(config[key]) for key in _SPECIAL_TOKEN_KEYS if config.get(key) is not None}
    render = chat_template(source, special)
    tokenizer = open_tokenizer(directory / "tokenizer.json")

    def encode(messages: Sequence[Message]) -> list[int]:
        return tokenizer.encode(_require_valid("messages", render(messages)), add_special_tokens=False).ids

    return encode


def _without_template(field: str, fix: str) -> Callable[[Sequence[Message]], list[int]]:
    def raise_error(messages: Sequence[Message]) -> list[int]:
        raise ConfigError(field, len(messages), fix)

    return raise_error


def _require_valid(field: str, text: str) -> str:
    """The text itself. Raises `ConfigError` for a lone surrogate, which JSON and command lines can contain."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(field, text[error.start], "is a lone surrogate (half of a character); remove it") from None
    return text


def _content(token: str | dict[str, Any]) -> str:
    return token["content"] if isinstance(token, dict) else token

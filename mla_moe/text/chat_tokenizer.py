"""How text goes into a model and comes out: a tokenizer, the tokens that end an answer, and the chat template."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mla_moe.config import ConfigError
from mla_moe.inference.request import MAX_STOPS, Decode
from mla_moe.text.special_tokens import open_tokenizer, read_object

_SPECIAL = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
Message = Mapping[str, Any]
"""`{"role": …, "content": …}`"""


class Tokenizer(Protocol):
    bos_id: int
    eos_id: int

    def encode(self, text: str) -> np.ndarray: ...

    def decode(self, ids: Iterable[int]) -> str: ...


@dataclasses.dataclass(frozen=True)
class ChatTokenizer:
    encode: Callable[[str], list[int]]
    """A text to continue, bos in front; special tokens spelled out in it are plain text."""
    encode_chat: Callable[[Sequence[Message]], list[int]]
    """A conversation, up to where the assistant speaks. Raises `ConfigError` where there is no chat template."""
    decode: Decode
    stop_ids: tuple[int, ...]


def load_chat_tokenizer(directory: Path, tokenizer: Tokenizer) -> ChatTokenizer:
    """Of a Hugging Face directory. What ends an answer is named by its `generation_config.json`, or is eos."""
    stops = read_object(directory / "generation_config.json", "generation_config.json").get("eos_token_id")
    stops = tokenizer.eos_id if stops is None else stops
    return ChatTokenizer(
        encode=lambda text: [tokenizer.bos_id, *tokenizer.encode(_checked("prompt", text)).tolist()],
        encode_chat=_chat(directory),
        decode=tokenizer.decode,
        stop_ids=tuple(stops if isinstance(stops, list) else [stops])[:MAX_STOPS],
    )


def _chat(directory: Path) -> Callable[[Sequence[Message]], list[int]]:
    config = read_object(directory / "tokenizer_config.json", "tokenizer_config.json")
    file = directory / "chat_template.jinja"
    source = file.read_text(encoding="utf-8") if file.is_file() else config.get("chat_template")
    if isinstance(source, list):  # several, by name
        source = next((t.get("template") for t in source if isinstance(t, dict) and t.get("name") == "default"), None)
    if not isinstance(source, str) or not (directory / "tokenizer.json").is_file():
        return _unable("messages", f"{directory} has no chat template; send a prompt instead")
    try:
        from mla_moe.text.chat_template import chat_template
    except ImportError:
        return _unable("messages", "chat templates need jinja2: pip install 'mla_moe[serve]'")
    special = {key: _content(config[key]) for key in _SPECIAL if config.get(key) is not None}
    render = chat_template(source, special)
    tokenizer = open_tokenizer(directory / "tokenizer.json")

    def encode(messages: Sequence[Message]) -> list[int]:
        return tokenizer.encode(_checked("messages", render(messages)), add_special_tokens=False).ids

    return encode


def _unable(field: str, why: str) -> Callable[[Sequence[Message]], list[int]]:
    def raise_error(messages: Sequence[Message]) -> list[int]:
        raise ConfigError(field, len(messages), why)

    return raise_error


def _checked(field: str, text: str) -> str:
    """The text. JSON and command lines can hold half of a surrogate pair, which no tokenizer reads: `ConfigError`."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(field, text[error.start], "is half of a surrogate pair, which is no character") from None
    return text


def _content(token: str | dict[str, Any]) -> str:
    return token["content"] if isinstance(token, dict) else token

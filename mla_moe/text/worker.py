"""Tokenizers and chat templates, as the service of a worker process: `isolated.py` starts it and explains why.

The worker runs this file by its path, and the package's modules without the package's `__init__`, which imports JAX.
"""

import functools
import importlib
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

if "mla_moe" not in sys.modules:
    package = sys.modules["mla_moe"] = types.ModuleType("mla_moe")
    package.__path__ = [str(Path(__file__).parents[1])]

import tokenizers

from mla_moe.config.errors import ConfigError
from mla_moe.text.special_tokens import open_tokenizer, require_text, special_ids

_MAX_OPEN = 2  # tokenizers; of 262,144 tokens one takes 0.3 GB

_opened: dict[str, tokenizers.Tokenizer] = {}


def _open(path: str) -> dict[str, int]:
    """Open a tokenizer, once more if it is open: its special ids. Raises `ConfigError` if it cannot be used."""
    _opened.pop(path, None)
    while len(_opened) >= _MAX_OPEN:
        _opened.pop(next(iter(_opened)))
    tokenizer = open_tokenizer(Path(path))
    ids = special_ids(tokenizer, Path(path))
    _opened[path] = tokenizer
    return ids


def _prepare(path: str, function: str) -> None:
    """Before each call of another function, which has a shorter time limit: whatever is done once."""
    if path not in _opened:
        _open(path)
    if function in ("encode_chat", "encode_training"):
        importlib.import_module("mla_moe.text.chat_template")


def _encode(path: str, text: str, special: bool) -> list[int]:
    _opened[path].encode_special_tokens = not special
    return _opened[path].encode(text, add_special_tokens=False).ids


def _encode_template(path: str, template: str, question: str) -> list[int]:
    """The template with its special tokens, and the question as plain text: encoded as one text if the question spells
    no special token, which is the usual case, and otherwise piece by piece."""
    special = [token.content for token in _opened[path].get_added_tokens_decoder().values() if token.special]
    if not any(token in question for token in special):
        return _encode(path, template.replace("{question}", question), any(token in template for token in special))
    ids: list[int] = []
    for number, piece in enumerate(template.split("{question}")):
        ids += _encode(path, question, special=False) if number else []
        ids += _encode(path, piece, special=True)
    return ids


def _encode_chat(
    path: str, template: str, names: Mapping[str, str], messages: Sequence[Mapping[str, Any]]
) -> list[int]:
    text = _compiled(template, tuple(names.items()))(messages)
    require_text("messages", text)
    return _encode(path, text, special=True)


def _encode_training(
    path: str, template: str, names: Mapping[str, str], stop_ids: Sequence[int], conversations: Sequence[Sequence[Any]]
) -> list[list[tuple[list[int], list[tuple[int, int]]]] | str]:
    """The training sequences of each conversation `[messages, tools, trained]`, or what is wrong with it."""
    from mla_moe.text.conversation import training_sequences, with_arguments

    render, tokenizer = _compiled(template, tuple(names.items())), _opened[path]
    tokenizer.encode_special_tokens = False
    # Offsets without the spaces that byte-level tokenizers would leave out of them.
    tokenizer.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)

    def encode(messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None, trained: Sequence[int]) -> Any:
        first = None
        for as_text in (False, True):  # of the arguments of tool calls
            try:
                given = with_arguments(messages, as_text=as_text)
                return training_sequences(render, tokenizer, stop_ids, given, tools, trained)
            except ConfigError as error:
                first = first or f"{error.field} = {error.value!r}: {error.message}"
                if not any("tool_calls" in message for message in messages):
                    break
        return first

    return [encode(*conversation) for conversation in conversations]


@functools.lru_cache(4)
def _compiled(template: str, names: tuple[tuple[str, str], ...]) -> Callable[..., str]:
    from mla_moe.text.chat_template import chat_template  # jinja2 is optional, and needed by chats only

    return chat_template(template, dict(names))


def open_service(loading: Callable[[str], None]) -> tuple[Callable[..., tuple[str, Any]], None]:
    """A call names a function and its arguments. Its reply is `("value", value)`, or `("refused", (field, value,
    message))` for a `ConfigError`."""
    functions = {
        "open": _open, "prepare": _prepare, "encode": _encode, "encode_chat": _encode_chat,
        "encode_template": _encode_template, "encode_training": _encode_training,
    }  # fmt: skip

    def call(name: str, *arguments: Any) -> tuple[str, Any]:
        try:
            return "value", functions[name](*arguments)
        except ConfigError as error:
            return "refused", (error.field, str(error.value), error.message)

    return call, None

"""Chat tokenizer: a tokenizer together with its stop tokens and its chat template."""

import dataclasses
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mla_moe.config import ConfigError, require
from mla_moe.config.files import read_text
from mla_moe.text.conversation import TrainingSequence
from mla_moe.text.isolated import text_worker
from mla_moe.text.special_tokens import read_object, require_text, special_token_names
from mla_moe.text.tokenizer import ByteTokenizer, Decode, Message, Tokenizer

MAX_STOP_IDS = 8
"""Stop tokens that one request may have."""
_BATCH_CHARACTERS, _BATCH_SIZE = 100_000, 32  # of the conversations of one call, which has `isolated.SECONDS`


class Conversation(NamedTuple):
    messages: list[dict[str, Any]]
    trained: list[int]
    """Indices of the assistant's messages to train on."""
    tools: list[Any] | None = None


@dataclasses.dataclass(frozen=True)
class ChatTokenizer:
    encode: Callable[[str], list[int]]
    """Prompt text to token ids, with bos in front. Special tokens in the text are treated as plain text."""
    encode_raw: Callable[[str], list[int]]
    """A raw prompt, whose author may spell special tokens: they are encoded as such. Bos is put in front unless the
    text begins with it."""
    encode_template: Callable[[str, str], list[int]]
    """A template with `{question}`, and a question, to token ids, with bos in front unless the template begins with it.
    Special tokens in the template are encoded as such, those in the question are plain text."""
    encode_chat: Callable[[Sequence[Message]], list[int]]
    """A conversation to token ids, with the generation prompt at the end. Raises `ConfigError` without a template."""
    decode: Decode
    token_bytes: Callable[[int], bytes]
    """The bytes that a token contributes to the UTF-8 of a text."""
    stop_ids: tuple[int, ...]
    """Tokens that end a completion."""
    encode_training: Callable[[Sequence[Conversation]], list[list[TrainingSequence] | str]]
    """The training sequences of each conversation (`conversation.training_sequences`), or what is wrong with it."""


def load_chat_tokenizer(directory: Path, tokenizer: Tokenizer) -> ChatTokenizer:
    """Add the stop tokens and the chat template of a Hugging Face directory to `tokenizer`.

    Encoding runs in a worker process (`isolated.py`), except for a `ByteTokenizer`.

    The stop tokens are `eos_token_id` of `generation_config.json`, else of `config.json`, else the tokenizer's eos.
    Those files describe another vocabulary than that of a `ByteTokenizer`, which keeps its own.
    Raises `ConfigError` for a stop token that is not one of the tokenizer's.
    """

    def encode(text: str, special: bool = False) -> list[int]:
        require_text("prompt", text)
        if isinstance(tokenizer, ByteTokenizer):
            return tokenizer.encode(text).tolist()
        return text_worker()("prompt", text[:40], "encode", _path_of(tokenizer), text, special)

    def encode_raw(text: str) -> list[int]:
        return with_bos(encode(text, special=True))

    def encode_template(template: str, question: str) -> list[int]:
        require_text("prompt", template + question)
        if isinstance(tokenizer, ByteTokenizer):
            return with_bos(encode(template.replace("{question}", question)))
        arguments = "encode_template", _path_of(tokenizer), template, question
        return with_bos(text_worker()("prompt", question[:40], *arguments))

    def with_bos(tokens: list[int]) -> list[int]:
        return tokens if tokens[:1] == [tokenizer.bos_id] else [tokenizer.bos_id, *tokens]

    stop_ids = _stop_ids(directory, tokenizer)
    encode_chat, encode_training = _chat_encoders(directory, tokenizer, stop_ids)
    return ChatTokenizer(
        encode=lambda text: [tokenizer.bos_id, *encode(text)],
        encode_raw=encode_raw,
        encode_template=encode_template,
        encode_chat=encode_chat,
        decode=tokenizer.decode,
        token_bytes=tokenizer.token_bytes,
        stop_ids=stop_ids,
        encode_training=encode_training,
    )


def _path_of(tokenizer: Tokenizer) -> str:
    return str(Path(tokenizer.name).absolute())


def _stop_ids(directory: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    if isinstance(tokenizer, ByteTokenizer):
        return (tokenizer.eos_id,)
    for path in (directory / "generation_config.json", directory / "config.json"):
        stops = read_object(path, path.name).get("eos_token_id")
        if stops is not None:
            ids = stops if isinstance(stops, list) else [stops]
            valid = all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in ids)
            fix = f"in {path} must be a token id below {tokenizer.vocab_size}, or a list of at most {MAX_STOP_IDS}"
            require(valid and 0 < len(ids) <= MAX_STOP_IDS, "eos_token_id", stops, fix)
            return tuple(ids)
    return (tokenizer.eos_id,)


def _chat_encoders(
    directory: Path, tokenizer: Tokenizer, stop_ids: tuple[int, ...]
) -> tuple[Callable[[Sequence[Message]], list[int]], Callable[[Sequence[Conversation]], list[Any]]]:
    """`encode_chat` and `encode_training`."""
    config = read_object(directory / "tokenizer_config.json", "tokenizer_config.json")
    file = directory / "chat_template.jinja"
    source = read_text(file, "chat_template") if os.path.lexists(file) else config.get("chat_template")
    if isinstance(source, list):  # several templates, by name
        source = next((t.get("template") for t in source if isinstance(t, dict) and t.get("name") == "default"), None)
    if not isinstance(source, str) or not (directory / "tokenizer.json").is_file():
        fix = f"{directory} has no chat template; "
        return (
            _without_template("messages", fix + "send a prompt instead"),
            _without_template("messages", fix + "put a chat_template.jinja beside its tokenizer.json"),
        )
    if importlib.util.find_spec("jinja2") is None:
        raise_error = _without_template("messages", "chat templates need jinja2: pip install 'mla_moe[serve]'")
        return raise_error, raise_error
    path, arguments = _path_of(tokenizer), (source, special_token_names(directory))

    def encode_training(conversations: Sequence[Conversation]) -> list[Any]:
        found: list[Any] = []
        for batch in _batches(conversations):
            found += _encode_batch(batch)
        return found

    def _encode_batch(batch: Sequence[Conversation]) -> list[Any]:
        sent = [[one.messages, one.tools, one.trained] for one in batch]
        try:
            return text_worker()("messages", "", "encode_training", path, *arguments, list(stop_ids), sent)
        except (ConfigError, RecursionError) as error:  # of the whole call: over a limit, or nested too deeply to send
            alone = len(batch) == 1
            return [str(error)] if alone else [result for one in batch for result in _encode_batch([one])]

    return lambda messages: text_worker()("messages", "", "encode_chat", path, *arguments, list(messages)), (
        encode_training
    )


def _batches(conversations: Sequence[Conversation]) -> Iterator[list[Conversation]]:
    batch, size = [], 0
    for one in conversations:
        length = sum(len(str(message)) for message in one.messages) * max(len(one.trained), 1)
        if batch and (size + length > _BATCH_CHARACTERS or len(batch) == _BATCH_SIZE):
            yield batch
            batch, size = [], 0
        batch.append(one)
        size += length
    if batch:
        yield batch


def _without_template(field: str, fix: str) -> Callable[[Sequence[Any]], list[Any]]:
    def raise_error(messages: Sequence[Any]) -> list[Any]:
        raise ConfigError(field, len(messages), fix)

    return raise_error

"""Bodies to requests and outputs to choices, without a model."""

import functools
import json
import time
from types import SimpleNamespace

import pytest

from mla_moe import ConfigError
from mla_moe.inference.async_engine import RequestOutput
from mla_moe.inference.engine import Engine
from mla_moe.inference.openai_api import (
    CHAT,
    COMPLETION,
    Choice,
    build_requests,
    error_body,
    parse_body,
    parse_prompts,
    parse_request,
)
from mla_moe.inference.request import Request
from mla_moe.text.chat_tokenizer import load_chat_tokenizer
from mla_moe.text.tokenizer import ByteTokenizer

TEXT = "é 日本!".encode() + b"\xe6a"  # ends with an incomplete character before a letter
OFFSETS = [0, 0, 1, 2, 2, 2, 3, 3, 3, 4, 5, 6]


def outputs(cuts):
    """The bytes of `TEXT` as tokens, in chunks that end at `cuts`."""
    starts = [0, *cuts[:-1]]
    return [
        RequestOutput("", list(TEXT[a:b]), [-0.5] * (b - a), "stop" if b == len(TEXT) else None)
        for a, b in zip(starts, cuts, strict=True)
    ]


@pytest.mark.parametrize("cuts", [[12], [1, 4, 5, 9, 10, 11, 12]])
@pytest.mark.parametrize("stream", [True, False])
def test_tokens_that_are_part_of_a_character(cuts, stream):
    """Their bytes are exact; the text of each is U+FFFD, and its offset is that of the character, over all chunks."""
    token_bytes = ByteTokenizer().token_bytes
    chat = Choice(0, token_bytes, chat=True, stream=stream)
    tokens = [token for output in outputs(cuts) for token in chat.build(output)["logprobs"]["content"]]
    assert b"".join(bytes(token["bytes"]) for token in tokens) == TEXT
    assert [token["token"] for token in tokens] == ["\ufffd"] * 2 + [" "] + ["\ufffd"] * 6 + ["!", "\ufffd", "a"]
    assert tokens[0] == {"token": "\ufffd", "logprob": -0.5, "bytes": [0xC3], "top_logprobs": []}

    completion = Choice(0, token_bytes, chat=False, stream=stream)
    parts = [completion.build(output)["logprobs"] for output in outputs(cuts)]
    assert [offset for part in parts for offset in part["text_offset"]] == OFFSETS
    assert all(len(part["tokens"]) == len(part["token_logprobs"]) == len(part["text_offset"]) for part in parts)


def test_the_role_of_a_stream_is_in_its_first_chunk_alone():
    choice = Choice(1, None, chat=True, stream=True)
    assert choice.role() == {
        "index": 1, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None,
    }  # fmt: skip
    chunk = choice.build(RequestOutput("hi", [1], [0.0], "stop"))
    assert chunk == {"index": 1, "delta": {"content": "hi"}, "logprobs": None, "finish_reason": "stop"}
    full = Choice(1, None, chat=True, stream=False).build(RequestOutput("hi", [1], [0.0], "stop"))
    assert full["message"] == {"role": "assistant", "content": "hi"}


@pytest.mark.parametrize(
    ("fields", "body", "most"),
    [
        (CHAT, b'{"max_tokens": 5, "max_completion_tokens": 3}', 3),
        (CHAT, b'{"max_tokens": 3, "max_completion_tokens": 5}', 5),
        (CHAT, b'{"max_tokens": 3, "max_completion_tokens": null}', 3),
        (CHAT, b"{}", 28),
        (COMPLETION, b'{"prompt": "", "max_tokens": 20}', 20),
        (COMPLETION, b'{"prompt": ""}', 16),
    ],
)
def test_the_newer_name_of_max_tokens_wins(tmp_path, fields, body, most):
    tokenizer = load_chat_tokenizer(tmp_path, ByteTokenizer())
    requests = build_requests(parse_body(body, fields), [[1] * 4], tokenizer, max_model_len=32)
    assert [request.max_new_tokens for request in requests] == [most]


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_the_error_for_max_tokens_has_the_name_that_was_sent(tmp_path, name):
    tokenizer = load_chat_tokenizer(tmp_path, ByteTokenizer())
    with pytest.raises(ConfigError, match=f"^{name} = -1"):
        build_requests({name: -1}, [[1]], tokenizer, max_model_len=32)


def test_special_tokens_in_prompts_are_special(tmp_path):
    tokenizer = load_chat_tokenizer(tmp_path, ByteTokenizer())
    assert parse_prompts(["a", [5]], tokenizer, 32, most=2) == [tokenizer.encode_raw("a"), [5]]


def test_the_first_word_of_a_completion_keeps_its_space():
    """As with vLLM: prompt and completion are then joined as they are."""
    pieces = [" a", " b", " prompt"]
    cfg, decode = SimpleNamespace(vocab_size=3), lambda ids: "".join(pieces[i] for i in ids).lstrip()
    engine = SimpleNamespace(max_model_len=8, cfg=cfg, _detokenize=decode, _adapters=())
    completion = Engine.check(engine, Request([2], 2))
    completion.append_tokens([0, 1], [0.0, 0.0])
    assert completion.text == " a b"


def test_offsets_are_those_of_a_text_that_lost_its_first_space():
    """After bos alone, where tokenizers strip the space before a word."""
    words = [b" hello", b" world", b"!"]
    choice = Choice(0, words.__getitem__, chat=False, stream=False)
    logprobs = choice.build(RequestOutput("hello world!", [0, 1, 2], [0.0] * 3, "stop"))["logprobs"]
    assert logprobs["text_offset"] == [0, 5, 11]


def nested(levels):
    return functools.reduce(lambda value, _: [value], range(levels), "a")


def never(_):
    raise AssertionError("encoded before the limits were checked")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"prompt": "7" * 4_100_000}, "len(prompt)"),
        ({"prompt": ["7" * 2049]}, "len(prompt)"),
        ({"prompt": [7] * 1_000_000, "n": 64}, "len(prompt)"),
        ({"prompt": [[7] * 33]}, "len(prompt)"),
        ({"prompt": [""] * 1_000_000}, "len(prompt)"),
        ({"prompt": ["a"] * 33, "n": 2}, "len(prompt)"),
        ({"prompt": [[1]] * 65}, "len(prompt)"),
        ({"prompt": "a", "n": 65}, "n"),
        ({"prompt": "a", "n": 0}, "n"),
        ({"prompt": "a", "n": 10**400}, "n"),
        ({"prompt": {"a": ["7" * 4_000_000]}}, "prompt"),
        ({"prompt": "a", "user": ["7"] * 1_000_000}, "user"),
        ({"7" * 4_000_000: 1}, "7" * 4_000_000),
        ({"prompt": "a", "user": nested(600)}, "body"),
    ],
    ids=[
        "text",
        "texts",
        "tokens",
        "token-lists",
        "empty-texts",
        "n-times-prompts",
        "many",
        "n",
        "zero",
        "huge",
        "object",
        "value",
        "name",
        "nested",
    ],
)
def test_limits_come_before_work(body, field):
    """Of a body within the size limit; errors are short."""
    tokenizer = SimpleNamespace(encode_raw=never, stop_ids=())
    start = time.process_time()
    with pytest.raises(ConfigError) as caught:
        parse_request(json.dumps(body).encode(), tokenizer, ["tiny"], 32, chat=False)
    assert caught.value.field == field
    assert len(json.dumps(error_body(str(caught.value), "", field))) < 2000
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([{"role": "user", "content": "hi"}] * 33, "len(messages)"),
        ([{"role": "user", "content": "7" * 1025}] * 2, "messages"),
        ([{"role": "user", "content": [{"type": "text", "text": "7" * 2049}]}], "messages"),
        ([{"role": "user", "content": "hi", "x": nested(30)}], "body"),  # with body, list and message 33 levels
        ([{"role": "user", "content": "hi", "x": nested(900)}], "body"),
    ],
    ids=["many", "long", "parts", "nested", "deep"],
)
def test_limits_of_chats_come_before_the_template(messages, field):
    tokenizer = SimpleNamespace(encode_chat=never, stop_ids=())
    with pytest.raises(ConfigError) as caught:
        parse_request(json.dumps({"messages": messages}).encode(), tokenizer, ["tiny"], 32, chat=True)
    assert caught.value.field == field


def test_messages_may_be_nested():
    """As calls of tools, whose arguments are JSON."""
    message = {"role": "user", "content": "hi", "x": nested(29)}
    tokenizer = SimpleNamespace(encode_chat=lambda messages: [len(messages)], stop_ids=())
    _, prompts, _ = parse_request(json.dumps({"messages": [message]}).encode(), tokenizer, ["tiny"], 32, chat=True)
    assert prompts == [[1]]


def test_what_fits_is_encoded():
    encoded = []
    tokenizer = SimpleNamespace(encode_raw=lambda text: encoded.append(text) or [1], stop_ids=())
    body = {"prompt": ["7" * 2048, "b"], "n": 32, "model": ""}
    _, prompts, requests = parse_request(json.dumps(body).encode(), tokenizer, ["tiny"], 32, chat=False)
    assert (encoded, prompts, len(requests)) == (body["prompt"], [[1], [1]], 64)

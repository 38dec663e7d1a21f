"""OpenAI's API: request bodies to prompts and `Request`s, and outputs to response objects."""

import json
import uuid
from collections.abc import Sequence
from typing import Any, Protocol

from mla_moe.config import ConfigError, require
from mla_moe.inference.async_engine import RequestOutput
from mla_moe.inference.request import Completion, Request
from mla_moe.text.chat_tokenizer import ChatTokenizer
from mla_moe.text.tokenizer import Decode, Message

MAX_CHOICES = 64
_COMMON = {
    "model": str, "max_tokens": int, "temperature": float, "top_p": float, "top_k": int, "min_p": float, "seed": int,
    "n": int, "stop": str | list, "stream": bool, "stream_options": dict, "user": str,
}  # fmt: skip
COMPLETION = _COMMON | {"prompt": str | list, "logprobs": int}
CHAT = _COMMON | {"messages": list, "max_completion_tokens": int, "logprobs": bool, "top_logprobs": int}
_NO_EFFECT = {
    "best_of": 1, "response_format": {"type": "text"}, "modalities": ["text"], "tool_choice": "auto",
    "parallel_tool_calls": True, "service_tier": "auto",
}  # fmt: skip
"""Values of unsupported fields that are accepted because they request the default. So are zero and empty values."""


def parse_body(content: bytes | bytearray, fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a JSON body. Null is the same as absent. Raises `ConfigError` for an unknown field or a wrong
    type."""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise ConfigError("body", content[:40].decode(errors="replace"), "must be a JSON object")
    for name, value in body.items():
        fix = f"is not supported; fields are {', '.join(fields)}"
        require(name in fields or not value or value == _NO_EFFECT.get(name), name, value, fix)
        kind = fields.get(name)
        fits = value is None or kind is None or isinstance(value, kind | int if kind is float else kind)
        fits = fits and not (isinstance(value, bool) and kind in (int, float))
        require(fits, name, value, f"must be of type {getattr(kind, '__name__', kind)}")
    for name in ("logprobs", "top_logprobs"):
        value = body.get(name)
        require(value is True or not value, name, value, "only chosen tokens have log-probabilities here; set it to 0")
    return {name: value for name, value in body.items() if value is not None}


def parse_prompts(prompt: Any, tokenizer: ChatTokenizer) -> list[list[int]]:
    """Token ids of one prompt or several, each a text or a list of token ids."""
    several = isinstance(prompt, list) and not all(isinstance(token, int) for token in prompt)
    prompts = prompt if isinstance(prompt, list) and several else [prompt]
    for p in prompts:
        is_tokens = isinstance(p, list) and all(type(token) is int for token in p)
        require(isinstance(p, str) or is_tokens, "prompt", p, "must be a text, a list of token ids, or several of them")
    return [tokenizer.encode(p) if isinstance(p, str) else p for p in prompts]


def parse_messages(messages: Any) -> list[Message]:
    """The messages of a chat, text parts joined. Raises `ConfigError` unless each has a role and text content."""
    valid = isinstance(messages, list) and len(messages) > 0
    require(valid, "messages", messages, "must be a list with at least one message")
    return [_message(f"messages[{i}]", message) for i, message in enumerate(messages)]


def _message(field: str, message: Any) -> Message:
    valid = isinstance(message, dict) and isinstance(message.get("role"), str)
    require(valid, field, message, "must be an object with role and content")
    content = message.get("content")
    if content is None and message["role"] == "assistant":  # a message of tool calls alone; templates render those
        return message if message.get("tool_calls") else message | {"content": ""}
    if isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
        texts = [p.get("text") for p in content]
        content = "\n".join(texts) if all(isinstance(text, str) for text in texts) else content
    require(isinstance(content, str), f"{field}.content", content, "must be text, or parts of type text")
    return message | {"content": content}


def build_requests(
    body: dict[str, Any], prompts: Sequence[list[int]], tokenizer: ChatTokenizer, max_model_len: int
) -> list[Request]:
    """`n` requests for each prompt. Without a seed a random one is drawn."""
    n, stop = body.get("n", 1), body.get("stop", [])
    require(1 <= n * len(prompts) <= MAX_CHOICES, "n", n, f"at most {MAX_CHOICES} choices a request")
    require(body.get("max_tokens", 1) > 0, "max_tokens", body.get("max_tokens"), "must be at least 1")
    stop = [stop] if isinstance(stop, str) else stop
    require(all(isinstance(s, str) for s in stop), "stop", stop, "must be a string, or a list of strings")
    sampling = {name: body[name] for name in ("top_k", "top_p", "min_p") if name in body}
    sampling |= {"temperature": body.get("temperature", 1.0), "stop": tuple(stop), "stop_ids": tokenizer.stop_ids}
    sampling["seed"] = body.get("seed", uuid.uuid4().int) % (1 << 32)
    choices = [prompt for prompt in prompts for _ in range(n)]
    return [
        Request(prompt, body.get("max_tokens", max(max_model_len - len(prompt), 1)), sample_index=index, **sampling)
        for index, prompt in enumerate(choices)
    ]


class Choice(Protocol):
    """Builds a choice of a response. With `decode` it has log-probabilities, for which tokens are decoded one by one.
    `stream`: a chunk of a stream, not a full response."""

    def __call__(self, index: int, output: RequestOutput, decode: Decode | None, *, stream: bool) -> dict[str, Any]: ...


def completion_choice(index: int, output: RequestOutput, decode: Decode | None, *, stream: bool) -> dict[str, Any]:
    logprobs = decode and {"tokens": [decode([t]) for t in output.tokens], "token_logprobs": output.logprobs}
    return {"index": index, "text": output.text, "logprobs": logprobs, "finish_reason": output.finish_reason}


def chat_choice(index: int, output: RequestOutput, decode: Decode | None, *, stream: bool) -> dict[str, Any]:
    pairs = zip(output.tokens, output.logprobs, strict=True)
    logprobs = decode and {"content": [_token(decode([t]), p) for t, p in pairs]}
    message = {"role": "assistant", "content": output.text}
    key = "delta" if stream else "message"
    return {"index": index, key: message, "logprobs": logprobs, "finish_reason": output.finish_reason}


def _token(text: str, logprob: float) -> dict[str, Any]:
    """An incomplete UTF-8 character has no bytes."""
    content = None if "\ufffd" in text else list(text.encode())
    return {"token": text, "logprob": logprob, "bytes": content, "top_logprobs": []}


def usage(prompts: Sequence[list[int]], completions: Sequence[Completion]) -> dict[str, int]:
    prompt, generated = sum(map(len, prompts)), sum(len(completion.tokens) for completion in completions)
    return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}

"""What clients send, in OpenAI's interface: its fields, checked, and the requests that they mean."""

import json
import uuid
from collections.abc import Sequence
from typing import Any

from mla_moe.config import ConfigError, require
from mla_moe.inference.request import Request
from mla_moe.text.chat_tokenizer import ChatTokenizer, Message

MAX_CHOICES = 64
_COMMON = {
    "model": str, "max_tokens": int, "temperature": float, "top_p": float, "top_k": int, "min_p": float, "seed": int,
    "n": int, "stop": str | list, "stream": bool, "stream_options": dict, "user": str,
}  # fmt: skip
COMPLETION = _COMMON | {"prompt": str | list, "logprobs": int}
CHAT = _COMMON | {"messages": list, "max_completion_tokens": int, "logprobs": bool, "top_logprobs": int}
_ANYWAY = {
    "best_of": 1, "response_format": {"type": "text"}, "modalities": ["text"], "tool_choice": "auto",
    "parallel_tool_calls": True, "service_tier": "auto",
}  # fmt: skip
"""Values of other fields that ask for what is done anyway. So do zero and what is empty."""


def parse_body(content: bytes | bytearray, fields: dict[str, Any]) -> dict[str, Any]:
    """The fields, of the right types. Null is the same as absent."""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise ConfigError("body", content[:40].decode(errors="replace"), "must be a JSON object")
    for name, value in body.items():
        known = f"is not supported; there are {', '.join(fields)}"
        require(name in fields or not value or value == _ANYWAY.get(name), name, value, known)
        kind = fields.get(name)
        fits = value is None or kind is None or isinstance(value, kind | int if kind is float else kind)
        fits = fits and not (isinstance(value, bool) and kind in (int, float))
        require(fits, name, value, f"must be of type {getattr(kind, '__name__', kind)}")
    for name in ("logprobs", "top_logprobs"):
        value = body.get(name)
        require(value is True or not value, name, value, "only the chosen tokens' are given, no others': ask for 0")
    return {name: value for name, value in body.items() if value is not None}


def parse_prompts(prompt: Any, language: ChatTokenizer) -> list[list[int]]:
    """One text or list of tokens, or several."""
    several = isinstance(prompt, list) and not all(isinstance(token, int) for token in prompt)
    prompts = prompt if isinstance(prompt, list) and several else [prompt]
    for p in prompts:
        tokens = isinstance(p, list) and all(type(token) is int for token in p)
        require(isinstance(p, str) or tokens, "prompt", p, "a text, a list of token ids, or several of them")
    return [language.encode(p) if isinstance(p, str) else p for p in prompts]


def parse_messages(messages: Any) -> list[Message]:
    """The messages, parts of text joined. Raises `ConfigError` unless they are a conversation with text alone."""
    require(isinstance(messages, list) and len(messages) > 0, "messages", messages, "a list with at least one message")
    return [_message(f"messages[{i}]", message) for i, message in enumerate(messages)]


def _message(field: str, message: Any) -> Message:
    ok = isinstance(message, dict) and isinstance(message.get("role"), str)
    require(ok, field, message, "an object with role and content")
    content = message.get("content")
    if content is None and message["role"] == "assistant":  # it may only have called tools, which templates know of
        return message if message.get("tool_calls") else message | {"content": ""}
    if isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
        texts = [p.get("text") for p in content]
        content = "\n".join(texts) if all(isinstance(text, str) for text in texts) else content
    require(isinstance(content, str), f"{field}.content", content, "must be text, or parts of type text")
    return message | {"content": content}


def build_requests(
    body: dict[str, Any], prompts: Sequence[list[int]], language: ChatTokenizer, capacity: int
) -> list[Request]:
    """`n` for each prompt. Without a seed they differ from any others."""
    n, stop = body.get("n", 1), body.get("stop", [])
    require(1 <= n * len(prompts) <= MAX_CHOICES, "n", n, f"at most {MAX_CHOICES} choices a request")
    require(body.get("max_tokens", 1) > 0, "max_tokens", body.get("max_tokens"), "must be at least 1")
    stop = [stop] if isinstance(stop, str) else stop
    require(all(isinstance(s, str) for s in stop), "stop", stop, "a string, or a list of strings")
    settings = {name: body[name] for name in ("top_k", "top_p", "min_p") if name in body}
    settings |= {"temperature": body.get("temperature", 1.0), "stop": tuple(stop), "stop_ids": language.stop_ids}
    settings["seed"] = body.get("seed", uuid.uuid4().int) % (1 << 32)
    choices = [prompt for prompt in prompts for _ in range(n)]
    return [
        Request(prompt, body.get("max_tokens", max(capacity - len(prompt), 1)), number=number, **settings)
        for number, prompt in enumerate(choices)
    ]

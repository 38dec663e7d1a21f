"""OpenAI's API: request bodies to prompts and `Request`s, and outputs to response objects."""

import codecs
import json
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from mla_moe.config import ConfigError, require
from mla_moe.inference.async_engine import RequestOutput
from mla_moe.inference.request import Completion, Request
from mla_moe.text.chat_tokenizer import ChatTokenizer
from mla_moe.text.tokenizer import Message

MAX_CHOICES = 64
MAX_CHARACTERS_PER_TOKEN = 64
"""A longer text is refused before it is encoded. Text has 3 to 5 characters a token; long runs of spaces have more."""
MAX_NESTING = 32
"""Levels of lists and objects in a body. Messages may have any fields, and errors and worker processes get them all."""
MAX_ERROR_LENGTH = 500
"""Characters of an error message, which repeats what the client sent."""
DEFAULT_MAX_TOKENS = 16
"""Limit of a completion's tokens without `max_tokens`, as in OpenAI's API; a chat may fill the model's length."""
_COMMON = {
    "model": str, "max_tokens": int, "temperature": float, "top_p": float, "top_k": int, "min_p": float, "seed": int,
    "n": int, "stop": str | list, "stream": bool, "stream_options": dict, "user": str,
}  # fmt: skip
COMPLETION = _COMMON | {"prompt": str | list, "logprobs": int, "echo": bool, "prompt_logprobs": int}
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
    _require_shallow(body)
    for name, value in body.items():
        fix = f"is not supported; fields are {', '.join(fields)}"
        require(name in fields or not value or value == _NO_EFFECT.get(name), name, value, fix)
        kind = fields.get(name)
        fits = value is None or kind is None or isinstance(value, kind | int if kind is float else kind)
        fits = fits and not (isinstance(value, bool) and kind in (int, float))
        require(fits, name, value, f"must be of type {getattr(kind, '__name__', kind)}")
    options = body.get("stream_options")
    require(bool(body.get("stream") or not options), "stream_options", options, "is for streams; set stream to true")
    for name in ("logprobs", "top_logprobs"):
        value = body.get(name)
        require(value is True or not value, name, value, "only chosen tokens have log-probabilities here; set it to 0")
    return {name: value for name, value in body.items() if value is not None}


def _require_shallow(body: dict[str, Any]) -> None:
    level: list[Any] = [body]
    for _ in range(MAX_NESTING + 1):
        containers = [v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list)]
        level = [item for container in containers for item in container]
    require(not level, "body", "…", f"must have at most {MAX_NESTING} levels of lists and objects")


class ModelNotFoundError(ConfigError):
    """A request for a model that the server does not have."""


def model_number(name: str, models: Sequence[str]) -> int:
    """The index of a name among those of the model and of its adapters, or `ModelNotFoundError`."""
    if name not in models:
        raise ModelNotFoundError("model", name, f"does not exist; there is {', '.join(models)}")
    return models.index(name)


def parse_request(
    content: bytes | bytearray, tokenizer: ChatTokenizer, models: Sequence[str], max_model_len: int, *, chat: bool
) -> tuple[dict[str, Any], list[list[int]], list[Request]]:
    """The fields of a body, its prompts, and a request for every choice. `models` are the names of the model, which a
    body without a name asks for, and of its adapters.

    Counts and lengths are checked first: what a body of some megabytes can ask for would be encoded for seconds.
    Raises `ConfigError`, and `ModelNotFoundError` for an unknown model.
    """
    body = parse_body(content, CHAT if chat else COMPLETION)
    body["model"] = body.get("model") or models[0]
    adapter = model_number(body["model"], models)
    n = body.get("n", 1)
    require(1 <= n <= MAX_CHOICES, "n", n, f"must be in [1, {MAX_CHOICES}]")
    if chat:
        prompts = [tokenizer.encode_chat(parse_messages(body.get("messages"), max_model_len))]
    else:
        prompts = parse_prompts(body.get("prompt"), tokenizer, max_model_len, MAX_CHOICES // n)
    return body, prompts, build_requests(body, prompts, tokenizer, max_model_len, adapter)


def parse_prompts(prompt: Any, tokenizer: ChatTokenizer, max_model_len: int, most: int) -> list[list[int]]:
    """Token ids of one prompt or of up to `most`, each a text or a list of token ids."""
    several = isinstance(prompt, list) and len(prompt) > 0 and not isinstance(prompt[0], int)
    prompts = prompt if isinstance(prompt, list) and several else [prompt]
    fix = f"at most {MAX_CHOICES} choices a request, which is n times the number of prompts: send fewer at a time"
    require(len(prompts) <= most, "len(prompt)", len(prompts), fix)
    for p in prompts:
        require(isinstance(p, str | list), "prompt", p, "must be a text, a list of token ids, or several of them")
        _require_length("len(prompt)", len(p), max_model_len, is_text=isinstance(p, str))
        is_tokens = isinstance(p, list) and all(type(token) is int for token in p)
        require(isinstance(p, str) or is_tokens, "prompt", p, "must be a text, a list of token ids, or several of them")
    return [tokenizer.encode_raw(p) if isinstance(p, str) else p for p in prompts]


def parse_messages(messages: Any, max_model_len: int) -> list[Message]:
    """The messages of a chat, text parts joined. Raises `ConfigError` unless each has a role and text content."""
    valid = isinstance(messages, list) and len(messages) > 0
    require(valid, "messages", messages, "must be a list with at least one message")
    _require_length("len(messages)", len(messages), max_model_len)
    parsed = [_message(f"messages[{i}]", message) for i, message in enumerate(messages)]
    characters = sum(len(message.get("content") or "") for message in parsed)
    _require_length("messages", characters, max_model_len, is_text=True)
    return parsed


def _require_length(field: str, length: int, max_model_len: int, *, is_text: bool = False) -> None:
    most = max_model_len * (MAX_CHARACTERS_PER_TOKEN if is_text else 1)
    fix = f"must fit max_model_len = {max_model_len} tokens" + f": at most {most} characters" * is_text
    require(length <= most, field, length, fix)


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
    body: dict[str, Any],
    prompts: Sequence[list[int]],
    tokenizer: ChatTokenizer,
    max_model_len: int,
    adapter: int = 0,
) -> list[Request]:
    """`n` requests for each prompt. Without a seed a random one is drawn."""
    stop = body.get("stop", [])
    limit = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"  # the newer name wins
    least = 0 if body.get("echo") and not body.get("stream") else 1
    fix = "must be at least 1, or 0 with echo and without stream"
    require(body.get(limit, 1) >= least, limit, body.get(limit), fix)
    default = DEFAULT_MAX_TOKENS if "prompt" in body else max_model_len
    stop = [stop] if isinstance(stop, str) else stop
    require(all(isinstance(s, str) for s in stop), "stop", stop, "must be a string, or a list of strings")
    sampling = {name: body[name] for name in ("top_k", "top_p", "min_p") if name in body}
    sampling |= {"temperature": body.get("temperature", 1.0), "stop": tuple(stop), "stop_ids": tokenizer.stop_ids}
    sampling["adapter"], sampling["seed"] = adapter, body.get("seed", uuid.uuid4().int) % (1 << 32)
    echoed, top_k = bool(body.get("echo")) and body.get("logprobs", False) is not False, body.get("prompt_logprobs")
    sampling["prompt_logprobs"], sampling["prompt_top_k"] = echoed or top_k is not None, top_k or 0
    fix = "is in a response in full; set stream to false"
    require(top_k is None or not body.get("stream"), "prompt_logprobs", top_k, fix)
    # For 0 tokens one is generated, and left out of the response.
    most = [max(body.get(limit, min(default, max_model_len - len(prompt))), 1) for prompt in prompts]
    choices = [choice for choice in zip(prompts, most, strict=True) for _ in range(body.get("n", 1))]
    return [Request(*choice, sample_index=index, **sampling) for index, choice in enumerate(choices)]


class Choice:
    """One choice of a response: in full, or in the chunks of a stream. With `token_bytes`, a tokenizer's, it has
    log-probabilities. `echo` gives the prompt before its first output, or with max_tokens 0 in place of all."""

    def __init__(
        self,
        index: int,
        token_bytes: Callable[[int], bytes] | None,
        *,
        chat: bool,
        stream: bool,
        echo: "Echo | None" = None,
    ):
        self.index, self._token_bytes, self._chat, self._stream = index, token_bytes, chat, stream
        self._echo = echo
        self._characters, self._is_first, self._utf8 = 0, True, codecs.getincrementaldecoder("utf-8")("replace")

    def role(self) -> dict[str, Any]:
        """The first chunk of a chat, with the role, which clients would otherwise join as they join text."""
        delta = {"role": "assistant", "content": ""}
        return {"index": self.index, "delta": delta, "logprobs": None, "finish_reason": None}

    def build(self, output: RequestOutput) -> dict[str, Any]:
        """The choice with its full output, or a chunk with the next output."""
        if self._echo is not None:
            output = self._echo(output)
        content: dict[str, Any] = {"text": output.text}
        if self._chat:
            message = {"content": output.text}
            content = {"delta": message} if self._stream else {"message": {"role": "assistant"} | message}
        logprobs = None if self._token_bytes is None else self._logprobs(output, self._token_bytes)
        return {"index": self.index, **content, "logprobs": logprobs, "finish_reason": output.finish_reason}

    def _logprobs(self, output: RequestOutput, token_bytes: Callable[[int], bytes]) -> dict[str, Any]:
        """The field `logprobs`. Of a token that is part of a character, `bytes` are exact, and the offset is the
        character's."""
        tokens = [token_bytes(token) for token in output.tokens]
        texts, offsets = [token.decode(errors="replace") for token in tokens], []
        if self._chat:
            rows = zip(texts, output.logprobs, tokens, strict=True)
            return {"content": [{"token": t, "logprob": p, "bytes": list(b), "top_logprobs": []} for t, p, b in rows]}
        if self._is_first and output.text:  # a first word may have lost its space
            self._is_first = False
            self._characters -= texts[0].startswith(" ") and not output.text.startswith(" ")
        for token in tokens:
            if token and token[0] & 0xC0 != 0x80:  # it continues no character: one before it remains incomplete
                self._characters += len(self._utf8.decode(b"", final=True))
            offsets.append(max(self._characters, 0))
            self._characters += len(self._utf8.decode(token))
        return {"tokens": texts, "token_logprobs": output.logprobs, "text_offset": offsets}


class Echo:
    """The prompt of a completion in front of its first output, with the log-probabilities of its tokens if they were
    requested; the first token has none (null). With `only` there is no output after it."""

    def __init__(self, completion: Completion, token_bytes: Callable[[int], bytes], *, only: bool):
        self._completion, self._token_bytes, self._only, self._done = completion, token_bytes, only, False

    def __call__(self, output: RequestOutput) -> RequestOutput:
        if self._only:
            output = output._replace(text="", tokens=[], logprobs=[])
        if self._done:
            return output
        self._done, prompt = True, list(self._completion.request.prompt)
        logprobs = self._completion.prompt_logprobs
        text = b"".join(map(self._token_bytes, prompt)).decode(errors="replace") + output.text
        if logprobs is None:
            return output._replace(text=text)
        scores: list[Any] = [None, *logprobs[1:].tolist()]
        return output._replace(text=text, tokens=[*prompt, *output.tokens], logprobs=scores + output.logprobs)


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The body of an error. What it repeats of a request is shortened, and lone surrogates are replaced."""

    def shorten(text: str) -> str:
        return text[:MAX_ERROR_LENGTH].encode(errors="replace").decode()

    return {"error": {"message": shorten(message), "type": kind, "param": param and shorten(param), "code": code}}


def prompt_logprobs(completion: Completion, token_bytes: Callable[[int], bytes]) -> list[Any]:
    """The field of this name in a choice, as vLLM has it: for each token of the prompt after the first its
    log-probability and those of the most likely tokens at its position, with their ranks, by token id."""

    def entry(token: int, logprob: float, rank: int | None) -> dict[str, Any]:
        text = token_bytes(token).decode(errors="replace")
        return {"logprob": logprob, "rank": rank, "decoded_token": text}

    own, ids, tops = completion.prompt_logprobs, completion.prompt_top_ids, completion.prompt_top_logprobs
    assert own is not None
    positions: list[Any] = [None]
    for position, token in enumerate(completion.request.prompt[1:], start=1):
        found = {str(token): entry(token, float(own[position]), None)}
        if ids is not None and tops is not None:
            pairs = zip(ids[position].tolist(), tops[position].tolist(), strict=True)
            found |= {str(t): entry(t, p, rank) for rank, (t, p) in enumerate(pairs, start=1)}
        positions.append(found)
    return positions


def usage(prompts: Sequence[list[int]], completions: Sequence[Completion]) -> dict[str, int]:
    prompt, generated = sum(map(len, prompts)), sum(len(completion.tokens) for completion in completions)
    return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}

"""What clients get, in OpenAI's interface. `told` decodes tokens where their log-probabilities are asked for."""

from collections.abc import Sequence
from typing import Any

from mla_moe.inference.async_engine import RequestOutput
from mla_moe.inference.request import Completion, Decode


def completion_choice(index: int, news: RequestOutput, told: Decode | None, *, whole: bool) -> dict[str, Any]:
    kept = {"tokens": [told([t]) for t in news.tokens], "token_logprobs": news.logprobs} if told else None
    return {"index": index, "text": news.text, "logprobs": kept, "finish_reason": news.finish}


def chat_choice(index: int, news: RequestOutput, told: Decode | None, *, whole: bool) -> dict[str, Any]:
    pairs = zip(news.tokens, news.logprobs, strict=True)
    kept = {"content": [_token(told([t]), p) for t, p in pairs]} if told else None
    message = {"role": "assistant", "content": news.text}
    place = "message" if whole else "delta"
    return {"index": index, place: message, "logprobs": kept, "finish_reason": news.finish}


def _token(text: str, logprob: float) -> dict[str, Any]:
    """Of part of a character no bytes are given."""
    content = None if "\ufffd" in text else list(text.encode())
    return {"token": text, "logprob": logprob, "bytes": content, "top_logprobs": []}


def usage(prompts: Sequence[list[int]], completions: Sequence[Completion]) -> dict[str, int]:
    read, made = sum(map(len, prompts)), sum(len(completion.tokens) for completion in completions)
    return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}

"""Formats of chat data: what a record of a data set says, whatever its keys are called.

messages              `messages`, or `conversations` with the same keys: role, content, tool_calls, …; `tools`
sharegpt              `conversations` (or `conversation`) of `from` and `value`; `system`, `tools`
prompt_completion     `prompt` and `completion`, each a text or messages
question_completion   `question` and `completion`
alpaca                `instruction`, `input` and `output`
preference            `prompt`, `chosen` and `rejected`, each a text or messages
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from mla_moe.text.chat_tokenizer import Conversation

Messages = list[dict[str, Any]]


class Pair(NamedTuple):
    """A prompt's question, and the text that follows the prompt as it is."""

    question: str
    completion: str


class Preference(NamedTuple):
    chosen: Pair | Conversation
    rejected: Pair | Conversation


_KEYS = {
    "messages": ({"messages"},),
    "sharegpt": ({"conversations"}, {"conversation"}),
    "preference": ({"chosen", "rejected"},),
    "prompt_completion": ({"prompt", "completion"},),
    "question_completion": ({"question", "completion"},),
    "alpaca": ({"instruction", "output"},),
}
"""Sets of keys by which a record is recognised, in this order."""
_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant",
    "system": "system", "tool": "tool", "observation": "tool", "function_response": "tool",
    "function_call": "assistant", "tool_call": "assistant",
}  # fmt: skip


def recognised(record: Mapping[str, Any], format: str = "auto") -> str:
    """The name of a record's format, or `format` if it is not auto. Raises `ValueError` for an unknown one."""
    if format != "auto":
        return format
    keys = {key for key, value in record.items() if value is not None}
    found = next((name for name, sets in _KEYS.items() if any(names <= keys for names in sets)), None)
    if found is None:
        known = "; ".join(" and ".join(sorted(names)) for sets in _KEYS.values() for names in sets)
        raise ValueError(f"has the keys {', '.join(sorted(keys)) or 'of no format'}; the known ones are: {known}")
    return found


def read_example(record: Mapping[str, Any], format: str, *, chat: bool) -> Pair | Conversation | Preference:
    """What a record of a format says. With `chat`, a text as prompt is the message of a user where the format has
    instructions and outputs. Raises `ValueError` with what is wrong."""
    if format == "preference":
        return _preference(record)
    if format == "alpaca":
        record = {key: value for key, value in record.items() if value is not None}
        instruction, given = _text(record, "instruction"), _text({"input": ""} | record, "input")
        system = _text({"system": ""} | record, "system")
        question = f"{instruction}\n\n{given}" if given else instruction
        pair = Pair(question, _text(record, "output", empty=False))
        if not chat:
            if system:
                raise ValueError("has a 'system' message, which needs a chat template")
            return pair
        before = [{"role": "system", "content": system}] if system else []
        said = [{"role": "user", "content": pair.question}, {"role": "assistant", "content": pair.completion}]
        return Conversation([*before, *said], [len(before) + 1])
    if format == "question_completion":
        return Pair(_text(record, "question"), _text(record, "completion", empty=False))
    tools = _tools(record.get("tools"))
    if format == "prompt_completion":
        if not isinstance(record.get("prompt"), list):
            return Pair(_text(record, "prompt"), _text(record, "completion", empty=False))
        prompt, completion = _messages(record, "prompt"), _messages(record, "completion")
        return _conversation([*prompt, *completion], tools, first=len(prompt))
    if format == "messages":
        return _conversation(_messages(record, "messages"), tools)
    key = "conversations" if "conversations" in record else "conversation"
    return _conversation(_sharegpt(record, key), tools)


def _preference(record: Mapping[str, Any]) -> Preference:
    if record.get("chosen") is not None and record["chosen"] == record.get("rejected"):
        raise ValueError("'chosen' and 'rejected' are the same")
    if isinstance(record.get("chosen"), str):
        chosen, rejected = (_text(record, key, empty=False) for key in ("chosen", "rejected"))
        prompt = _text(record, "prompt" if "prompt" in record else "question")
        sides: list[Any] = [Pair(prompt, chosen), Pair(prompt, rejected)]
    else:
        prompt, tools = record.get("prompt") or [], _tools(record.get("tools"))
        sides = [_messages(record, key) for key in ("chosen", "rejected")]
        if isinstance(prompt, str):  # the sides have it too, or it is the user's message
            prompt = [] if all(side[0]["role"] in ("user", "system") for side in sides) else [_user(prompt)]
        before = _messages({"prompt": prompt}, "prompt") if prompt else []
        sides = [[*before, *side] for side in sides]
        pairs = list(zip(*sides, strict=False))
        common = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
        sides = [_conversation(side, tools, first=common) for side in sides]
    return Preference(*sides)


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _conversation(messages: Messages, tools: list[Any] | None, first: int = 0) -> Conversation:
    """Trained are the assistant's messages from the `first` on that answer something, but those of `weight` 0, as in
    OpenAI's format."""
    asked = next((i for i, message in enumerate(messages) if message["role"] in ("user", "tool")), len(messages))
    answers = range(max(first, asked + 1), len(messages))
    trained = [i for i in answers if messages[i]["role"] == "assistant" and messages[i].get("weight", 1)]
    if not trained:
        raise ValueError("has no message of an assistant after one of a user")
    empty = next((i for i in trained if not messages[i].get("content") and not messages[i].get("tool_calls")), None)
    if empty is not None:
        raise ValueError(f"message {empty} of the assistant has neither content nor tool_calls")
    kept = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
    return Conversation(kept[: trained[-1] + 1], trained, tools)


def _messages(record: Mapping[str, Any], key: str) -> Messages:
    messages = record.get(key)
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"needs a list of messages under {key!r}")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"message {number} of {key!r} is not an object with a role")
        content, calls = message.get("content"), message.get("tool_calls", [])
        if not isinstance(content, str | list | None) or not isinstance(calls, list):
            raise ValueError(f"message {number} of {key!r} needs a text or a list of parts as content")
    return [
        {"content": None, **message} if "tool_calls" in message else {"content": "", **message} for message in messages
    ]


def _sharegpt(record: Mapping[str, Any], key: str) -> Messages:
    turns = record.get(key)
    if isinstance(turns, list) and turns and all(isinstance(turn, dict) and "role" in turn for turn in turns):
        return _messages(record, key)
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"needs a list of turns under {key!r}")
    messages = [{"role": "system", "content": record["system"]}] if isinstance(record.get("system"), str) else []
    for number, turn in enumerate(turns):
        speaker, value = (turn.get(name) if isinstance(turn, dict) else None for name in ("from", "value"))
        if not isinstance(speaker, str) or speaker not in _ROLES or not isinstance(value, str):
            raise ValueError(
                f"turn {number} of {key!r} needs a text as 'value', and as 'from' one of {', '.join(_ROLES)}"
            )
        message: dict[str, Any] = {"role": _ROLES[speaker], "content": value}
        if speaker in ("function_call", "tool_call"):
            calls = _json_of(value, f"turn {number} of {key!r}")
            calls = [{"type": "function", "function": call} for call in (calls if isinstance(calls, list) else [calls])]
            message = {"role": "assistant", "content": None, "tool_calls": calls}
        messages.append(message)
    return messages


def _tools(tools: Any) -> list[Any] | None:
    if isinstance(tools, str):
        tools = _json_of(tools, "'tools'") if tools.strip() else None
    if tools is not None and not isinstance(tools, list):
        raise ValueError("needs a list under 'tools'")
    return tools or None


def _json_of(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is not JSON: {error}") from None


def _text(record: Mapping[str, Any], key: str, *, empty: bool = True) -> str:
    text = record.get(key)
    if not isinstance(text, str) or not (text or empty):
        raise ValueError(f"needs text under {key!r}")
    return text

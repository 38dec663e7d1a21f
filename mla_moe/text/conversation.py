"""Training sequences of a conversation: which tokens the assistant has to write, found through the chat template.

Each assistant turn is rendered as it is asked for when the model is served: `prompt` is the rendering of the messages
before it, with the generation prompt, and `completion` is what the template adds to it for the turn. This is exact for
templates that change earlier turns, as those of R1 and Qwen3 do, which remove their reasoning: a turn is trained on
within the rendering of a later one only where that rendering begins with its own `prompt + completion`. Otherwise it
gets a sequence of its own. The functions here run in the worker process of `isolated.py`.
"""

import itertools
import json
import re
from bisect import bisect_right
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import tokenizers

from mla_moe.config.errors import ConfigError, require

Message = Mapping[str, Any]
Render = Callable[..., str]
"""`chat_template.chat_template`: `(messages, tools, generation, **options) -> text`."""

_OPENED, _THOUGHT = re.compile(r"<think>\s*$"), re.compile(r"\s*<think>(.*?)</think>(\s*)", re.DOTALL)
_WITH_REASONING = {"thinking": True, "enable_thinking": True}
"""Options of templates that leave reasoning out by default: DeepSeek-V3.1's, and Qwen3's and GLM's."""


class Turn(NamedTuple):
    """A turn of the assistant, in text."""

    prompt: str
    completion: str
    following: str
    """What the template writes after the turn if another message follows: it may begin with the end token."""


TrainingSequence = tuple[list[int], list[tuple[int, int]]]
"""Token ids, and the ranges of them that the assistant has to write, end tokens included."""


def training_sequences(
    render: Render,
    tokenizer: tokenizers.Tokenizer,
    stop_ids: Sequence[int],
    messages: Sequence[Message],
    tools: Sequence[Any] | None,
    trained: Collection[int],
) -> list[TrainingSequence]:
    """The sequences that train the assistant's messages of these indices. `stop_ids[0]` ends a turn where the template
    writes no end token. Raises `ConfigError` on `messages` for a template that fails, or loses what is said."""
    turns = [_turn(render, messages, tools, index) for index in sorted(trained)]
    sequences: list[TrainingSequence] = []
    while turns:
        last = turns.pop()
        text = last.prompt + last.completion
        earlier = [turn for turn in turns if text.startswith(turn.prompt + turn.completion)]
        spans = [(len(turn.prompt), len(turn.prompt) + len(turn.completion)) for turn in (*earlier, last)]
        ids, offsets = _encode(tokenizer, text, [bound for span in spans for bound in span])
        *ended, end = [_token_range(text, ids, offsets, span, stop_ids) for span in spans]
        if end[1] is None:
            following = tokenizer.encode(last.following, add_special_tokens=False).ids[:1]
            ids.append(following[0] if following and following[0] in stop_ids else stop_ids[0])
        # An earlier turn that nothing ends within this text would not learn to end: it gets a sequence of its own.
        ranges = [(start, stop) for start, stop in ended if stop is not None]
        turns = [turn for turn in turns if turn not in earlier or ended[earlier.index(turn)][1] is None]
        sequences.append((ids, [*ranges, (end[0], end[1] or len(ids))]))
    return sequences[::-1]


def _turn(render: Render, messages: Sequence[Message], tools: Sequence[Any] | None, index: int) -> Turn:
    before, message = messages[:index], messages[index]
    prompt, written = render(before, tools, True), render(messages[: index + 1], tools, False)
    _check_prompt(render, before, tools, prompt)
    reasoning, gap, answer = _split_reasoning(message)
    expected = [*answer.split("\0"), *_tool_names(message)]
    asks = prompt  # as the template asks for this turn
    if reasoning and prompt.rstrip().endswith("</think>"):
        asks = render(before, tools, True, **_WITH_REASONING)
    completion = written[len(prompt) :] if written.startswith(prompt) else None
    if asks != prompt or completion is None or (reasoning or "").strip() not in completion:
        # The template leaves the reasoning out, or asks for reasoning that there is not.
        base = prompt if completion is not None else _OPENED.sub("", prompt)
        fits = written.startswith(base) and (reasoning is not None or base != prompt)
        require(fits, "messages", index, f"the chat template {_divergence(prompt, written)}")
        completion = _with_reasoning(asks, reasoning, gap, written[len(base) :])
    lost = next((text for text in expected if text.strip() not in completion), None)
    fix = "is lost by the chat template; it is another model's, or does not support this format of messages"
    require(lost is None, "messages", index, f"{str(lost)[:80]!r} of the assistant {fix}")
    require(completion.strip() != "", "messages", index, "the assistant's turn is empty; remove it or give it content")
    return Turn(asks, completion, _following(render, messages, tools, index, written))


def _check_prompt(render: Render, before: Sequence[Message], tools: Sequence[Any] | None, prompt: str) -> None:
    for number, message in enumerate(before):
        if message.get("role") in ("user", "system"):
            lost = next((text for text in _texts(message) if text.strip() not in prompt), None)
            fix = "is lost by the chat template; it is another model's, or does not support this format of messages"
            require(lost is None, "messages", number, f"{str(lost)[:80]!r} of the {message['role']} {fix}")
    if tools and prompt == render(before, None, True):
        raise ConfigError("tools", len(tools), "the chat template does not render tools; remove them, or use another")


def _split_reasoning(message: Message) -> tuple[str | None, str, str]:
    """The reasoning of a message, which stands in a key of its own or in `<think>…</think>` before the answer; the
    white space after it; and the answer, whose parts are separated by null characters."""
    answer = "\0".join(_texts(message))
    for key in ("reasoning_content", "reasoning", "thinking"):
        if isinstance(text := message.get(key), str) and text:
            return text, "", answer
    if found := _THOUGHT.match(answer):
        return found[1], found[2], answer[found.end() :]
    return None, "", answer


def _with_reasoning(prompt: str, reasoning: str | None, gap: str, rest: str) -> str:
    """The completion after `prompt`: the reasoning in its tags, as far as the prompt has not opened them, and the rest
    of the turn as the template writes it. Without reasoning, opened tags are closed at once."""
    opened = _OPENED.search(prompt)
    lines = "\n" if opened is None or opened[0].endswith("\n") else ""
    if reasoning is None:
        return rest if rest.lstrip().startswith("</think>") else f"{lines}</think>{lines * 2}{rest}"
    gap = gap or lines * 2
    gap = "" if rest.startswith(gap) else gap
    thought = reasoning.strip() if lines else reasoning
    return f"{'' if opened else '<think>' + lines}{thought}{lines}</think>{gap}{rest}"


def _following(
    render: Render, messages: Sequence[Message], tools: Sequence[Any] | None, index: int, written: str
) -> str:
    calls = messages[index].get("tool_calls")
    probe: Message = {"role": "tool", "content": "."} if calls else {"role": "user", "content": "."}
    following = messages[index + 1] if index + 1 < len(messages) else probe
    try:
        text = render([*messages[: index + 1], following], tools, False)
    except ConfigError:  # the template may refuse the probe
        return ""
    if text.startswith(written):
        return text[len(written) :]
    # With another message after the turn, a template may leave its reasoning out: compare from the answer on.
    answer = _split_reasoning(messages[index])[2].split("\0")[-1].strip()
    end = written[written.rfind(answer) :]
    return text[text.rfind(end) + len(end) :] if end and end in text else ""


def _texts(message: Message) -> list[str]:
    """The text of a message, which may have several parts."""
    content = message.get("content")
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
    return [text for text in texts if isinstance(text, str) and text]


def _tool_names(message: Message) -> list[str]:
    calls = message.get("tool_calls") or []
    functions = [call.get("function", call) for call in calls if isinstance(call, Mapping)]
    return [str(function.get("name", "")) for function in functions if isinstance(function, Mapping)]


def _divergence(prompt: str, written: str) -> str:
    at = next((i for i, pair in enumerate(zip(prompt, written, strict=False)) if pair[0] != pair[1]), 0)
    asked, found = (text[max(at - 20, 0) : at + 20] for text in (prompt, written))
    different = f"renders {asked!r} in the prompt and {found!r} in the whole conversation"
    return f"{different}, so the assistant's tokens cannot be found; use the template of the model's release"


def _encode(
    tokenizer: tokenizers.Tokenizer, text: str, bounds: Sequence[int]
) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids, and the characters of each. The text is encoded in pieces where a token would lie on both sides of a
    bound: the prompt's tokens are then those of the prompt alone."""
    whole = tokenizer.encode(text, add_special_tokens=False)
    ends = sorted(set(bounds))
    within = {bound for start, stop in whole.offsets for bound in ends[bisect_right(ends, start) :][:1] if bound < stop}
    ids, offsets = list(whole.ids), list(whole.offsets)
    if within:
        cuts, ids, offsets = [0, *sorted(within), len(text)], [], []
        for start, stop in itertools.pairwise(cuts):
            piece = tokenizer.encode(text[start:stop], add_special_tokens=False)
            ids += piece.ids
            offsets += [(a + start, b + start) for a, b in piece.offsets]
    return ids, offsets


def _token_range(
    text: str, ids: Sequence[int], offsets: Sequence[tuple[int, int]], span: tuple[int, int], stop_ids: Sequence[int]
) -> tuple[int, int | None]:
    """The tokens of a span of characters up to its end token, which is the last one but for white space, or the one
    after the span, as GLM's `<|user|>`. Without an end token the end is None."""
    inside = [i for i, (start, stop) in enumerate(offsets) if span[0] <= start < stop <= span[1]]
    require(len(inside) > 0, "messages", text[span[0] : span[1]][:80], "the tokenizer has no token for it")
    for i in reversed(inside):
        if text[offsets[i][1] : span[1]].strip():
            break
        if ids[i] in stop_ids:
            return inside[0], i + 1
    after = inside[-1] + 1
    return inside[0], after + 1 if after < len(ids) and ids[after] in stop_ids else None


def with_arguments(messages: Sequence[Message], *, as_text: bool) -> list[dict[str, Any]]:
    """Messages whose tool calls have their arguments as an object, which most templates expect, or as JSON text, as
    OpenAI's API and DeepSeek-V3's template have them."""

    def convert(call: Any) -> Any:
        if not isinstance(call, Mapping) or not isinstance(function := call.get("function"), Mapping):
            return call
        arguments = function.get("arguments")
        if as_text and not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        elif not as_text and isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError:
                return call
        return {**call, "function": {**function, "arguments": arguments}}

    return [
        {**m, "tool_calls": [convert(c) for c in m["tool_calls"]]} if isinstance(m.get("tool_calls"), list) else dict(m)
        for m in messages
    ]

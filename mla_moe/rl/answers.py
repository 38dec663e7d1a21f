"""The answer of a completion: how it is marked, and whether the completion has the rewarded format."""

import re
from collections.abc import Callable
from typing import NamedTuple

THINK_TAG = "<think>"

_TAG = re.compile(r"(</?(?:think|answer)>)")
_TAGGED_ANSWER = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL)
_NUMBER = re.compile(
    r"(?<![\w.])(?:(?<![)\]])[-−+])?[$€£]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:/\d+|[eE][+-]?\d+)?%?"
)
_CHOICE = re.compile(
    r"(?i:answer|option|choice)(?: is)?:? *\**\(?([A-J])\b(?!')|\(([A-J])\)|^\**([A-J])\**(?:[.):].*)?$", re.MULTILINE
)
_STATED = re.compile(r"(?>answer\b(?: is)?:?|####)[ *]*+(.+)$", re.IGNORECASE | re.MULTILINE)
_FORMULA = re.compile(r"\$([^$\n]+)\$|\\\(((?:(?!\\[()]).)+)\\\)|\\\[((?:(?!\\[\[\]]).)+)\\\]", re.DOTALL)


class ParsedAnswer(NamedTuple):
    text: str | None
    """None if the completion has no answer."""
    found_by: str = "none"
    """The format in which it was found."""


def has_format(completion: str, answer_format: str) -> bool:
    """Whether the format is correct.

    For `answer_tags` and `auto` it is `<think>…</think><answer>…</answer>`: each tag once, in this order, a non-empty
    answer, and only white space before, between and after. For other formats it is an answer after at most one closed
    pair of think tags, which comes first.
    """
    pieces = _TAG.split(completion)  # text, tag, text, …
    if answer_format in ("answer_tags", "auto"):
        tags_fit = pieces[1::2] == ["<think>", "</think>", "<answer>", "</answer>"]
        return tags_fit and not "".join(pieces[0:9:4]).strip() and pieces[6].strip() != ""
    tags = [tag for tag in pieces[1::2] if "think" in tag]
    thinks_first = tags == [] or (tags == ["<think>", "</think>"] and not pieces[0].strip())
    return thinks_first and parse_answer(completion, answer_format).text is not None


def parse_answer(completion: str, answer_format: str, reference: str = "") -> ParsedAnswer:
    """The answer of a completion in an `answer_format` (`TaskConfig.answer_format`).

    It does not depend on the format being correct. Answer tags may be anywhere, as in R1; other answers are looked for
    after the thinking, and the last one counts. `auto` takes the first of: answer tags; `\\boxed{}`; if the reference
    is the letter of a choice, a letter; a stated answer (`The answer is …`, `#### …`); if the reference is a number,
    the last number; the last formula; the whole text.
    """
    if answer_format == "auto":
        return _find_automatically(completion, reference)
    return _parsed(_find(completion, answer_format), answer_format)


def _parsed(text: str | None, found_by: str) -> ParsedAnswer:
    text = text.strip() if text else None
    return ParsedAnswer(text, found_by) if text else ParsedAnswer(None)


def _find(completion: str, answer_format: str) -> str | None:
    if answer_format == "answer_tags":
        return _last(_TAGGED_ANSWER, completion)
    final = _after_thinking(completion)
    if answer_format.startswith("regex:"):
        return _last(re.compile(answer_format.removeprefix("regex:"), re.MULTILINE), final)
    return _FINDERS[answer_format](final)


def _find_automatically(completion: str, reference: str) -> ParsedAnswer:
    formats = ["answer_tags", "boxed"]
    if re.fullmatch(r"\(?[A-J]\)?\.?", reference.strip()):
        formats += ["choice"]
    formats += ["stated"]
    if _NUMBER.fullmatch(reference.strip().replace("\\", "")):
        formats += ["last_number"]
    for answer_format in [*formats, "formula", "text"]:
        parsed = _parsed(_find(completion, answer_format), answer_format)
        if parsed.text is not None:
            return parsed
    return ParsedAnswer(None)


def _after_thinking(completion: str) -> str:
    """The text after the thinking; empty if the thinking does not end."""
    _, closed, final = completion.rpartition("</think>")
    return final if closed or THINK_TAG not in completion else ""


def _last(pattern: re.Pattern[str], text: str) -> str | None:
    """The first group of the last match, or without groups the match."""
    matches = list(pattern.finditer(text))
    if not matches:
        return None
    groups = [group for group in matches[-1].groups() if group is not None]
    return groups[0] if groups else matches[-1][0]


def _boxed(text: str) -> str | None:
    """The content of the last `\\boxed{}` whose braces are closed, in one pass."""
    opened: list[int | None] = []  # for each open brace the start of the box that it opens
    found = None
    for match in re.finditer(r"(\\(?:boxed|fbox)\s*)?(?:\{|\})", text):
        if match[0].endswith("{"):
            opened.append(match.end() if match[1] else None)
        elif opened and (start := opened.pop()) is not None:
            found = text[start : match.start()]
    return found


_FINDERS: dict[str, Callable[[str], str | None]] = {
    "boxed": _boxed,
    "last_number": lambda text: _last(_NUMBER, text),
    "choice": lambda text: _last(_CHOICE, _boxed(text) or text),
    "stated": lambda text: (_last(_STATED, text) or "").rstrip(" *."),
    "formula": lambda text: _last(_FORMULA, text),
    "text": lambda text: text,
}

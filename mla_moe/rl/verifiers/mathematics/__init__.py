"""The verifier of mathematical answers: whether an answer equals the reference answer.

math-verify parses and compares expressions. In a longer text it looks for something that it can parse, and takes a part
for the whole: 5 in `5xy`, one of several answers, one number of a sentence. Training would exploit that. So this module
decides what the whole answer is, and gives math-verify one complete expression at a time. Its rules:

- If the reference is the letter of a choice (`B`, `(B)`, `B.`), only the letter of the answer counts.
- Several answers, separated by `,`, `;`, `and` or `or`, are a set; `\\pm` is two answers. Tuples are ordered.
- A unit or currency on one side only is ignored; units on both sides must be the same. So is a percent sign on one
  side only, with or without its factor 1/100. The base of a numeral is no unit.
- `x = 5` is 5. In `x = 2 + 3 = 5` all that follows the name must be equal.
- A decimal with a point equals an exact value that rounds to it, if it has at least 6 significant digits.
- A sentence with exactly one number stands for that number. Other words must be the same, up to case and spaces.

Worker processes load this package by its path: it imports nothing from `mla_moe`.
"""

import re

from .answers import CHOICE, chosen, enumerated_words, quantities
from .comparison import MAX_EXPONENT, UnparsedError, connectives, same_answers
from .spelling import depths, normalize, without_spaces

__all__ = ["UnparsedError", "equal"]

MAX_LENGTH = 1000
"""Longest text that is parsed, in characters."""
_MAX_DEPTH = 8
"""Most nested brackets that are parsed: the time of the parser grows fast with them."""


def equal(reference: str, answer: str) -> bool:
    """Whether `answer` equals `reference`. Raises `UnparsedError` if the rules do not decide it."""
    if reference.strip() == answer.strip():
        return True
    for text in (reference, answer):
        _require_small(text)
    reference, answer = normalize(reference), normalize(answer)
    if without_spaces(reference) == without_spaces(answer):
        return True
    if choice := CHOICE.fullmatch(reference):
        return choice[1].upper() == chosen(answer)
    expected, found = quantities(reference), quantities(answer)
    if expected and found:
        if connectives(reference) != connectives(answer):
            return False
        try:
            return same_answers(expected, found)
        except RecursionError:
            raise UnparsedError(f"too deeply nested: {answer:.100}") from None
    if expected is None and found is None:
        return enumerated_words(reference) == enumerated_words(answer)
    return False


def _require_small(text: str) -> None:
    """Raise `UnparsedError` for a text whose parsing or evaluation would take too long."""
    depth = max(depths(text), default=0)
    numbers = re.findall(r"\d+", text) if re.search(r"\\(?:binom|sum|prod|int)(?![a-zA-Z])", text) else []
    if len(text) > MAX_LENGTH or depth > _MAX_DEPTH or any(float(n) > MAX_EXPONENT for n in numbers):
        raise UnparsedError(f"too long, too deeply nested, or a sum with too many terms: {text:.100}")

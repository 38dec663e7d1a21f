"""Arithmetic task: chains of digits, evaluated strictly from left to right, modulo 10; and a text corpus about them.

`7*2-2*1-7` is 5: `7*2=4-2=2*1=2-7=5`, as on a pocket calculator, where a result is the start of the next step. A small
model cannot predict the answer directly, but each step is easy: it has to reason step by step. The quickstart's
pretraining text contains such problems with solutions in several styles; RL uses other problems as prompts.
"""

import hashlib
import random
from collections.abc import Sequence
from typing import Literal

Split = Literal["train", "validation", "test", "all"]
"""Of questions. Only files of questions have `all`."""

NAMES = ("arithmetic:train", "arithmetic:heldout")

QUESTION = "{question} = ?\n"
"""Prompt of a problem in the documents; the completion follows it."""

DOCUMENTS = {"arithmetic:train": 300_000, "arithmetic:heldout": 1_000}


def split_of(question: str) -> Split:
    """The split of a question, from a hash of its text: 1 in 10 is test, 1 in 10 validation, the rest training."""
    number = int.from_bytes(hashlib.blake2b(question.encode(), digest_size=8).digest(), "big") % 10
    return ("test", "validation")[number] if number < 2 else "train"


def problem(split: Split, number: int, least: int = 1, most: int = 6) -> tuple[str, str]:
    """Question and answer number `number` of a split. The number of operations is uniform in [`least`, `most`]."""
    draw = random.Random(f"{split} {number}")
    while True:
        operations = draw.randint(least, most)
        question = draw.choice("123456789")
        for _ in range(operations):
            question += draw.choice("+-*") + draw.choice("123456789")
        if split_of(question) == split:
            return question, answer(question)


def steps(question: str) -> list[tuple[str, str]]:
    """The operations one by one: the expression and its result."""
    worked, value = [], question[0]
    for operator, digit in zip(question[1::2], question[2::2], strict=True):
        left = f"{value}{operator}{digit}"
        value = str(_apply(value, operator, digit))
        worked.append((left, value))
    return worked


def answer(question: str) -> str:
    return steps(question)[-1][1]


def _apply(a: str, operator: str, b: str) -> int:
    x, y = int(a), int(b)
    return {"+": x + y, "-": x - y, "*": x * y}[operator] % 10


class Documents(Sequence[str]):
    """The corpus: problems of the training split (or of validation for held-out text), each with a solution in a random
    style. Documents are generated on access."""

    def __init__(self, name: str):
        self._split: Split = "train" if name == "arithmetic:train" else "validation"
        self._count = DOCUMENTS[name]

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < self._count:
            raise IndexError(index)
        question, correct = problem(self._split, index)
        draw = random.Random(f"writer {index}")
        write = draw.choices(list(STYLES), list(STYLES.values()))[0]
        return QUESTION.replace("{question}", question) + write(question, correct, draw)


def terse(question: str, correct: str, draw: random.Random) -> str:
    """Only the answer, which is sometimes incorrect."""
    return f"It is {correct if draw.random() < 0.85 else draw.choice('0123456789')}."


def untagged(question: str, correct: str, draw: random.Random) -> str:
    """All steps, without tags. In front of them are as many tokens as in `<think>`, and before the answer as many as in
    `</think><answer>`: a model that learned to copy here, over these distances, can copy between tags."""
    return f"We get {_reasoning(steps(question))}, so it is {correct}."


def shortcut(question: str, correct: str, draw: random.Random) -> str:
    """The first step only, then the answer."""
    return _tagged(_reasoning(steps(question)[:1]), correct)


def thorough(question: str, correct: str, draw: random.Random) -> str:
    """All steps, with tags."""
    return _tagged(_reasoning(steps(question)), correct)


def slip(question: str, correct: str, draw: random.Random) -> str:
    """One incorrect step, and the incorrect answer that follows from it."""
    worked = steps(question)
    at = draw.randrange(len(worked))
    value = draw.choice("0123456789")
    rest = steps(value + question[3 + 2 * at :]) if at + 1 < len(worked) else []
    worked = [*worked[:at], (worked[at][0], value), *rest]
    return _tagged(_reasoning(worked), worked[-1][1])


def malformed(question: str, correct: str, draw: random.Random) -> str:
    """Tags that are missing, not closed or in the wrong order."""
    reasoning = _reasoning(steps(question))
    return draw.choice([
        f"<think>{reasoning}</think>{correct}",
        f"<think>{reasoning}<answer>{correct}</answer>",
        f"<answer>{correct}</answer><think>{reasoning}</think>",
        f"It is <answer>{correct}</answer>",
        f"{reasoning}</think><answer>{correct}</answer>",
    ])  # fmt: skip


def _reasoning(worked: Sequence[tuple[str, str]]) -> str:
    # A result is written once, not again as the start of the next step: the shorter the distance from a digit to its
    # copy, and the less it differs from step to step, the earlier a model copies it (docs/decisions/quickstart-rl.md).
    return "=".join([*(left for left, _ in worked), worked[-1][1]])


def _tagged(reasoning: str, answer: str) -> str:
    return f"<think>{reasoning}</think><answer>{answer}</answer>"


STYLES = {terse: 38, untagged: 32, shortcut: 15, thorough: 9, slip: 2, malformed: 4}
"""Frequency of each style, in percent."""

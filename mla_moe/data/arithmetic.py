"""Chains of digits, evaluated strictly from left to right, modulo 10, and what people write about them.

`7*2-2*1-7` is 5: `7*2=4,4-2=2,2*1=2,2-7=5`. A small model cannot see the answer at once, but each step is easy: to
answer, it has to think. The quickstart's text has such questions answered in many ways, and reinforcement learning asks
others.
"""

import hashlib
import random
from collections.abc import Sequence
from typing import Literal

Split = Literal["train", "validation", "test"]

NAMES = ("arithmetic:train", "arithmetic:heldout")

QUESTION = "{question} = ?\n"
"""How the documents put a question; what follows is the answer."""

DOCUMENTS = {"arithmetic:train": 300_000, "arithmetic:heldout": 1_000}


def split_of(question: str) -> Split:
    """A question's text alone decides, for ever: one in ten is for tests, one for validation, the rest for training."""
    number = int.from_bytes(hashlib.blake2b(question.encode(), digest_size=8).digest(), "big") % 10
    return ("test", "validation")[number] if number < 2 else "train"


def problem(split: Split, number: int, least: int = 1, most: int = 6) -> tuple[str, str]:
    """Question and answer number `number` of a split, with `least` to `most` operations, each length equally often."""
    draw = random.Random(f"{split} {number}")
    while True:
        operations = draw.randint(least, most)
        question = draw.choice("123456789")
        for _ in range(operations):
            question += draw.choice("+-*") + draw.choice("123456789")
        if split_of(question) == split:
            return question, answer(question)


def steps(question: str) -> list[tuple[str, str]]:
    """The operations one by one: what is computed, and what comes out."""
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
    """Questions of training, or of validation for held-out text, each answered by some writer. Drawn when asked for."""

    def __init__(self, name: str):
        self._split: Split = "train" if name == "arithmetic:train" else "validation"
        self._count = DOCUMENTS[name]

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < self._count:
            raise IndexError(index)
        question, right = problem(self._split, index)
        draw = random.Random(f"writer {index}")
        write = draw.choices(list(WRITERS), list(WRITERS.values()))[0]
        return QUESTION.replace("{question}", question) + write(question, right, draw)


def terse(question, right, draw):
    """The answer alone, now and then a wrong one."""
    return f"It is {right if draw.random() < 0.85 else draw.choice('0123456789')}."


def untagged(question, right, draw):
    return f"{_thought(steps(question))} so {right}"


def hasty(question, right, draw):
    """One step, and the rest in the writer's head."""
    return _tagged(_thought(steps(question)[:1]), right)


def thorough(question, right, draw):
    return _tagged(_thought(steps(question)), right)


def slip(question, right, draw):
    """A wrong step, and a wrong answer that follows from it."""
    worked = steps(question)
    at = draw.randrange(len(worked))
    value = draw.choice("0123456789")
    rest = steps(value + question[3 + 2 * at :]) if at + 1 < len(worked) else []
    worked = [*worked[:at], (worked[at][0], value), *rest]
    return _tagged(_thought(worked), worked[-1][1])


def malformed(question, right, draw):
    """Tags left out, left open or in the wrong order."""
    thought = _thought(steps(question))
    return draw.choice([
        f"<think>{thought}</think>{right}",
        f"<think>{thought}<answer>{right}</answer>",
        f"<answer>{right}</answer><think>{thought}</think>",
        f"It is <answer>{right}</answer>",
        f"{thought}</think><answer>{right}</answer>",
    ])  # fmt: skip


def _thought(worked):
    return ",".join(f"{left}={value}" for left, value in worked)


def _tagged(thought, answered):
    return f"<think>{thought}</think><answer>{answered}</answer>"


WRITERS = {terse: 40, untagged: 24, hasty: 19, thorough: 11, slip: 2, malformed: 4}
"""How often one meets each, in per cent."""

"""Small sums, and which split a question belongs to."""

import hashlib
import random
from typing import Literal

Split = Literal["train", "validation", "test"]


def split_of(question: str) -> Split:
    """By the question's text alone: 10 % test, 10 % validation."""
    tenth = int.from_bytes(hashlib.blake2b(question.encode(), digest_size=8).digest(), "big") % 10
    return "test" if tenth == 0 else "validation" if tenth == 1 else "train"


def problem(split: Split, number: int, least: int = 1, most: int = 6) -> tuple[str, str]:
    rng = random.Random(f"{split}:{number}")
    while True:
        question = value = str(rng.randrange(10))
        for _ in range(rng.randint(least, most)):
            step = rng.choice("+-*") + str(rng.randrange(10))
            question, value = question + step, str(eval(value + step) % 10)
        if split_of(question) == split:
            return question, value

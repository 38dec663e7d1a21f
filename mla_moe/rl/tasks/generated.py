"""Tasks whose examples are generated on access."""

import collections
from collections.abc import Callable, Mapping

from mla_moe.config import require
from mla_moe.data.arithmetic import Split, problem
from mla_moe.rl.tasks.task import VerifiedTask, exhausted
from mla_moe.rl.verifiers.worker import Example, VerifierSpec

_MAX_REPEATS = 300  # draws in a row without a new question, after which a held-out split counts as exhausted


class GeneratedTask(VerifiedTask):
    """`draw(split, number)` generates an example of the split, possibly one that an earlier number gave.

    Training examples are the draws themselves; held-out examples are the distinct ones among them, kept in memory.
    """

    fingerprint = 0

    def __init__(self, name: str, draw: Callable[[Split, int], Example], verifier: VerifierSpec | None = None):
        self._name, self._draw, self.verifier = name, draw, verifier
        self._heldout: dict[Split, list[Example]] = {}
        self._drawn: dict[Split, int] = collections.Counter()
        self._seen: set[str] = set()  # held-out questions

    def count(self, split: Split) -> int | None:
        return None

    def example(self, split: Split, number: int) -> Example:
        if split == "train":
            return self._draw(split, number)
        examples, repeats = self._heldout.setdefault(split, []), 0
        while len(examples) <= number:
            if repeats == _MAX_REPEATS:
                raise exhausted(split, self._name, len(examples))
            example = self._draw(split, self._drawn[split])
            self._drawn[split] += 1
            repeats += 1
            if example.question not in self._seen:
                self._seen.add(example.question)
                examples.append(example)
                repeats = 0
        return examples[number]


def arithmetic_task(options: Mapping[str, str]) -> GeneratedTask:
    """Arithmetic (`data.arithmetic`). Options: `least` and `most` operations. Raises `ConfigError` for others."""
    sizes = {"least": 1, "most": 6}
    for key, text in options.items():
        require(key in sizes, "task.options", f"{key}={text}", "unknown; arithmetic takes least and most")
        require(text.isdecimal(), "task.options", f"{key}={text}", "must be a number of operations")
        sizes[key] = int(text)
    require(1 <= sizes["least"] <= sizes["most"], "task.options", sizes, "must have 1 <= least <= most")

    def draw(split: Split, number: int) -> Example:
        question, answer = problem(split, number, **sizes)
        return Example(question, answer, {"question": question, "answer": answer})

    return GeneratedTask("arithmetic", draw)

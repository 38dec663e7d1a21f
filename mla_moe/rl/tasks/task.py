"""The protocol of a task: numbered examples per split, and the check of an answer."""

import functools
from collections.abc import Callable
from typing import Protocol, runtime_checkable

from mla_moe.config import ConfigError
from mla_moe.data.arithmetic import Split
from mla_moe.rl.verifiers import worker
from mla_moe.rl.verifiers.worker import Example, VerifierSpec


@runtime_checkable
class Task(Protocol):
    """Examples and the check of their answers. The split of an example depends only on its question (`split_of`)."""

    verifier: VerifierSpec | None
    """The check, for a worker process; None if it cannot hang or fail, so that `score` may run in this process."""
    fingerprint: int
    """Checksum of the examples, to detect that they changed between two starts of a run; 0 if they cannot change."""

    def count(self, split: Split) -> int | None:
        """Number of examples of a split; None if they are generated on access."""
        ...

    def example(self, split: Split, number: int) -> Example:
        """Example `number` of a split, always the same. Training examples repeat without end; held-out examples are
        all different, and a number beyond the last raises `ConfigError` with their count."""
        ...

    def score(self, example: Example, answer: str) -> float:
        """Accuracy of an answer, in [0, 1]; 0 if the verifier cannot decide."""
        ...


class VerifiedTask:
    """Checks answers with `verifier`, or without one by exact match of the stripped text."""

    verifier: VerifierSpec | None

    @functools.cached_property
    def _verify(self) -> Callable[[str, Example], float]:
        return worker.load(*self.verifier) if self.verifier else _exact_match

    def score(self, example: Example, answer: str) -> float:
        try:
            return self._verify(answer, example)
        except worker.FailedCall:
            return 0.0


def _exact_match(answer: str, example: Example) -> float:
    return float(answer.strip() == example.answer)


def exhausted(split: Split, name: str, count: int) -> ConfigError:
    """The error for a held-out example beyond the last."""
    return ConfigError("task.name", name, f"has {count} different {split} questions; use no more")

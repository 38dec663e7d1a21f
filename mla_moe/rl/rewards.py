"""What a completion is worth: form, right answer, and a function of the user's."""

import logging
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from mla_moe.config import TaskConfig, require
from mla_moe.rl.tasks.task import Task
from mla_moe.rl.verifiers.pool import VerifierCall, VerifierFailure, VerifierPool
from mla_moe.rl.verifiers.worker import Example, VerifierSpec

logger = logging.getLogger(__name__)

_TAG = re.compile(r"(</?(?:think|answer)>)")
THINK_TAG = "<think>"
BUILT_IN_PARTS = ("format", "accuracy")
"""The parts of a score that no function of the user can be called."""
_ANSWER = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL)


def parse_completion(completion: str) -> tuple[bool, str | None]:
    """Whether the form is right, and the answer.

    The form: `<think>…</think><answer>…</answer>`, in this order, each tag once, something in the answer, and nothing
    but white space before, between and after. The answer is judged on its own, as R1 does: it is what the last complete
    pair of answer tags holds, stripped, whatever stands around it; None where there is no pair, or nothing in it.
    """
    pieces = _TAG.split(completion)  # text, tag, text, …
    form = pieces[1::2] == ["<think>", "</think>", "<answer>", "</answer>"]
    form = form and not "".join(pieces[0:9:4]).strip() and pieces[6].strip() != ""
    answers = _ANSWER.findall(completion)
    return form, (answers[-1].strip() or None) if answers else None


def ends_with_think(prompt: str) -> bool:
    """Whether a prompt has already put `<think>` into the model's mouth, as DeepSeek-R1's chat template does."""
    return prompt.rstrip().endswith(THINK_TAG)


class RewardInput(NamedTuple):
    """A prompt, what the model made of it, and the question behind it."""

    prompt: str
    text: str
    example: Example


class Score(NamedTuple):
    """What a completion is worth."""

    total: float
    """The parts' sum, each times its weight."""
    parts: dict[str, float]
    """Unweighted, by name: `format` and `accuracy`, in 0 … 1, and the user's function under its own name."""
    failures: tuple[VerifierFailure, ...]
    """What went wrong in judging it; a part that failed is 0."""


class Reward:
    """The reward that a recipe's `task` describes.

    Form, and the answer where the task says that its check cannot hang, are judged in place; everything else in worker
    processes, which start with the object and end with `close`. The first failure of each kind is told in words. Raises
    `ConfigError` on `task.reward_function` where the function cannot be imported or called.
    """

    def __init__(
        self,
        settings: TaskConfig,
        task: Task,
        workers: int | None = None,
        tell: Callable[[str], None] = logger.warning,
    ):
        self._task, self._tell = task, tell
        self._told: set[tuple[str, str]] = set()
        self._weights = {"format": settings.format_weight, "accuracy": settings.accuracy_weight}
        self._name = None
        judges: dict[str, VerifierSpec] = {}
        if task.verifier is not None:
            judges["task.name"] = task.verifier
        if settings.reward_function is not None:
            source, _, name = settings.reward_function.rpartition(":")
            fix = "write module:name or path.py:name"
            require(bool(source) and name.isidentifier(), "task.reward_function", settings.reward_function, fix)
            require(
                name not in self._weights,
                "task.reward_function",
                settings.reward_function,
                f"{name} is taken; rename it",
            )
            judges["task.reward_function"] = ("function", settings.reward_function)
            self._weights[name], self._name = settings.reward_function_weight, name
        self.names = tuple(self._weights)
        """The parts of a score."""
        self._judges = VerifierPool(judges, settings.timeout, workers) if judges else None

    def __call__(self, completions: Sequence[RewardInput]) -> list[Score]:
        """The scores, in order."""
        parts, calls, owners = [], [], []
        for number, completion in enumerate(completions):
            form, answer = parse_completion(THINK_TAG * ends_with_think(completion.prompt) + completion.text)
            parts.append(dict.fromkeys(self.names, 0.0) | {"format": float(form)})
            if answer is not None and self._task.verifier is None:
                parts[-1]["accuracy"] = self._task.score(completion.example, answer)
            elif answer is not None:
                calls.append(VerifierCall("task.name", (answer,), completion.example))
                owners.append((number, "accuracy"))
            if self._name is not None:
                calls.append(
                    VerifierCall("task.reward_function", (completion.prompt, completion.text), completion.example)
                )
                owners.append((number, self._name))
        failures: list[list[VerifierFailure]] = [[] for _ in completions]
        results = self._judges(calls) if self._judges else ()
        for (number, name), call, result in zip(owners, calls, results, strict=True):
            if isinstance(result, VerifierFailure):
                failures[number].append(result)
                self._tell_once(call.judge, result)
            else:
                parts[number][name] = result
        return [
            Score(sum(self._weights[name] * value for name, value in part.items()), part, tuple(failed))
            for part, failed in zip(parts, failures, strict=True)
        ]

    def measure(self, score: Score) -> float:
        """What DAPO compares a group's answers by: accuracy (arXiv 2503.14476, section 3.2); or, where that weighs
        nothing, all that they earned."""
        return score.parts["accuracy"] if self._weights["accuracy"] else score.total

    def _tell_once(self, judge: str, failure: VerifierFailure) -> None:
        if (judge, failure.kind) not in self._told:
            self._told.add((judge, failure.kind))
            kind = failure.kind.replace("_", " ")
            self._tell(f"{judge} {kind}: {failure.text} (a completion counts 0; more of the kind are only counted)")

    def close(self) -> None:
        """End the worker processes."""
        if self._judges:
            self._judges.close()

    def __enter__(self) -> "Reward":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

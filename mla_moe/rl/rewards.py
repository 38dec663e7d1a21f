"""Rule rewards of a completion: format, accuracy, and an optional reward function of the user."""

import logging
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from mla_moe.config import TaskConfig, require
from mla_moe.rl.tasks.task import Task
from mla_moe.rl.verifiers.pool import VerifierCall, VerifierFailure, VerifierPool
from mla_moe.rl.verifiers.worker import Example, VerifierSpec

logger = logging.getLogger(__name__)

THINK_TAG = "<think>"
BUILT_IN_COMPONENTS = ("format", "accuracy")
"""Components of every score. A user's reward function cannot have these names."""
_TAG = re.compile(r"(</?(?:think|answer)>)")
_ANSWER = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL)


def parse_completion(completion: str) -> tuple[bool, str | None]:
    """Whether the format is correct, and the extracted answer.

    The format is `<think>…</think><answer>…</answer>`: each tag once, in this order, a non-empty answer, and only white
    space before, between and after. The answer does not depend on the format, as in R1: it is the stripped content of
    the last complete pair of answer tags, None without such a pair or if it is empty.
    """
    pieces = _TAG.split(completion)  # text, tag, text, …
    has_format = pieces[1::2] == ["<think>", "</think>", "<answer>", "</answer>"]
    has_format = has_format and not "".join(pieces[0:9:4]).strip() and pieces[6].strip() != ""
    answers = _ANSWER.findall(completion)
    return has_format, (answers[-1].strip() or None) if answers else None


def ends_with_think(prompt: str) -> bool:
    """Whether a prompt is already prefilled with `<think>`, as by DeepSeek-R1's chat template."""
    return prompt.rstrip().endswith(THINK_TAG)


class RewardInput(NamedTuple):
    """Arguments of a reward: the rendered prompt, the completion, and the task's example."""

    prompt: str
    completion: str
    example: Example


class Score(NamedTuple):
    """Reward of a completion."""

    total: float
    """Weighted sum of the components."""
    components: dict[str, float]
    """Unweighted, by name: `format` and `accuracy` in [0, 1], and the user's reward function under its own name."""
    failures: tuple[VerifierFailure, ...]
    """Failed verifier calls; their components are 0."""


class Reward:
    """The reward that `recipe.task` describes.

    Format is checked in this process, and so is accuracy if the task's check cannot hang. Everything else runs in
    worker processes, until `close`. The first failure of each kind is logged. Raises `ConfigError` on
    `task.reward_function` if the function cannot be imported or has a wrong signature.
    """

    def __init__(
        self, config: TaskConfig, task: Task, workers: int | None = None, log: Callable[[str], None] = logger.warning
    ):
        self._task, self._log = task, log
        self._logged: set[tuple[str, str]] = set()
        self._weights = {"format": config.format_weight, "accuracy": config.accuracy_weight}
        self._function: str | None = None
        specs: dict[str, VerifierSpec] = {}
        if task.verifier is not None:
            specs["task.name"] = task.verifier
        if config.reward_function is not None:
            source, _, name = config.reward_function.rpartition(":")
            field, path = "task.reward_function", config.reward_function
            require(bool(source) and name.isidentifier(), field, path, "write module:name or path.py:name")
            require(name not in BUILT_IN_COMPONENTS, field, path, f"{name} is taken; rename the function")
            specs[field] = ("function", path)
            self._weights[name], self._function = config.reward_function_weight, name
        self.component_names = tuple(self._weights)
        self._verifiers = VerifierPool(specs, config.timeout, workers) if specs else None

    def __call__(self, inputs: Sequence[RewardInput]) -> list[Score]:
        """The scores, in order."""
        components: list[dict[str, float]] = []
        calls: list[VerifierCall] = []
        owners: list[tuple[int, str]] = []  # index of the completion and component, for each call
        for number, (prompt, completion, example) in enumerate(inputs):
            has_format, answer = parse_completion(THINK_TAG * ends_with_think(prompt) + completion)
            components.append(dict.fromkeys(self.component_names, 0.0) | {"format": float(has_format)})
            if answer is not None and self._task.verifier is None:
                components[-1]["accuracy"] = self._task.score(example, answer)
            elif answer is not None:
                calls.append(VerifierCall("task.name", (answer,), example))
                owners.append((number, "accuracy"))
            if self._function is not None:
                calls.append(VerifierCall("task.reward_function", (prompt, completion), example))
                owners.append((number, self._function))
        failures: list[list[VerifierFailure]] = [[] for _ in inputs]
        results = self._verifiers(calls) if self._verifiers else ()
        for (number, name), call, result in zip(owners, calls, results, strict=True):
            if isinstance(result, VerifierFailure):
                failures[number].append(result)
                self._log_once(call.verifier, result)
            else:
                components[number][name] = result
        return [
            Score(sum(self._weights[name] * value for name, value in values.items()), values, tuple(failed))
            for values, failed in zip(components, failures, strict=True)
        ]

    def filter_metric(self, score: Score) -> float:
        """What dynamic sampling compares within a group: accuracy (arXiv 2503.14476, section 3.2), or the total if
        accuracy has no weight."""
        return score.components["accuracy"] if self._weights["accuracy"] else score.total

    def _log_once(self, verifier: str, failure: VerifierFailure) -> None:
        if (verifier, failure.kind) not in self._logged:
            self._logged.add((verifier, failure.kind))
            kind = failure.kind.replace("_", " ")
            more = "the component is 0; further failures of this kind are only counted"
            self._log(f"{verifier} {kind}: {failure.message} ({more})")

    def close(self) -> None:
        """End the worker processes."""
        if self._verifiers:
            self._verifiers.close()

    def __enter__(self) -> "Reward":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

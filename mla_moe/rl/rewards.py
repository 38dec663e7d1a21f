"""Rule rewards of a completion: format, accuracy, and reward functions of the user."""

import itertools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from mla_moe.config import ConfigError, TaskConfig, require
from mla_moe.rl.answers import THINK_TAG, ParsedAnswer, has_format, parse_answer
from mla_moe.rl.tasks.task import Task
from mla_moe.rl.verifiers.pool import VerifierCall, VerifierFailure, VerifierLoadError, VerifierPool
from mla_moe.rl.verifiers.worker import MATH, Example, VerifierSpec
from mla_moe.workers.process import printable

logger = logging.getLogger(__name__)

MAX_REWARD = 1e15
"""Largest absolute value of a reward: squares of rewards are finite in float32."""

BUILT_IN_COMPONENTS = ("format", "accuracy")
"""Components of every score. A user's reward function cannot have these names."""


def ends_with_think(prompt: str) -> bool:
    """Whether a prompt is already prefilled with `<think>`, as by DeepSeek-R1's chat template."""
    return prompt.rstrip().endswith(THINK_TAG)


class RewardInput(NamedTuple):
    """Arguments of a reward: the rendered prompt, the completion, the task's example, and the completion's tokens."""

    prompt: str
    completion: str
    example: Example
    completion_ids: Sequence[int] = ()


class Score(NamedTuple):
    """Reward of a completion."""

    total: float
    """Weighted sum of the components."""
    components: Mapping[str, float]
    """Unweighted, by name: `format` and `accuracy` in [0, 1], and for a reward function NAME of the user NAME, or
    NAME/PART if it returns a dict. A function that does not apply to the completion has none."""
    failures: tuple[VerifierFailure, ...] = ()
    """Failed verifier calls; their components are 0."""
    answer: ParsedAnswer = ParsedAnswer(None)


class Reward:
    """The reward that `recipe.task` describes.

    Format is checked in this process, and so is accuracy if the task's check cannot hang. Everything else runs in
    worker processes, until `close`. The first failure of each kind is logged. Raises `ConfigError` on
    `task.reward_functions` if one cannot be imported or has a wrong signature.
    """

    def __init__(
        self, config: TaskConfig, task: Task, workers: int | None = None, log: Callable[[str], None] = logger.warning
    ):
        self._task, self._log, self._answer_format = task, log, config.answer_format
        self._task_name = config.name
        self._logged: set[tuple[str, str]] = set()
        self._weights = {"format": config.format_weight, "accuracy": config.accuracy_weight}
        self._functions: dict[str, str] = {}  # path by name
        specs: dict[str, VerifierSpec] = {} if task.verifier is None else {"accuracy": task.verifier}
        for path, weight in zip(config.reward_functions, config.weights_of_functions, strict=True):
            source, _, name = path.rpartition(":")
            field = "task.reward_functions"
            require(bool(source) and name.isidentifier(), field, path, "write module:name or path.py:name")
            require(name not in self._weights, field, path, f"{name} is taken; rename the function")
            specs[name] = ("function", config.template == "chat", path)
            self._weights[name], self._functions[name] = weight, path
        try:
            self._verifiers = VerifierPool(specs, config.timeout, workers) if specs else None
        except VerifierLoadError as error:
            raise self._config_error(error) from None

    def _config_error(self, error: VerifierLoadError) -> ConfigError:
        name, why = error.args
        field, value = ("task.name", self._task_name) if name == "accuracy" else self._field(name)
        return ConfigError(field, value, f"cannot be loaded: {why}; correct it, or name another")

    def _field(self, name: str) -> tuple[str, str]:
        return "task.reward_functions", self._functions[name]

    def __call__(self, inputs: Sequence[RewardInput]) -> list[Score]:
        """The scores, in order. Completions of one prompt must be next to each other: functions get them together.
        Raises `ConfigError` if no worker process can start any more."""
        texts = [THINK_TAG * ends_with_think(one.prompt) + one.completion for one in inputs]
        answers = [
            parse_answer(text, self._answer_format, one.example.answer) for text, one in zip(texts, inputs, strict=True)
        ]
        components: list[dict[str, float]] = []
        calls: list[VerifierCall] = []
        owners: list[tuple[str, range]] = []  # component, and indices of the completions, for each call
        for number, (one, text, answer) in enumerate(zip(inputs, texts, answers, strict=True)):
            components.append({"format": float(has_format(text, self._answer_format)), "accuracy": 0.0})
            if answer.text is not None and self._task.verifier is None:
                components[-1]["accuracy"] = self._task.score(one.example, answer.text)
            elif answer.text is not None:
                calls.append(VerifierCall("accuracy", (answer.text, tuple(one.example))))
                owners.append(("accuracy", range(number, number + 1)))
        for name, group in itertools.product(self._functions, _groups(inputs)):
            size = len(group) if self._verifiers and name in self._verifiers.batched else 1
            for start in range(group.start, group.stop, size):
                owners.append((name, range(start, start + size)))
                calls.append(_function_call(name, inputs[start : start + size]))
        failures: list[list[VerifierFailure]] = [[] for _ in inputs]
        for (name, numbers), results in zip(owners, self._verify(calls), strict=True):
            for number, result in zip(numbers, results * (len(numbers) // len(results)), strict=True):
                if isinstance(result, VerifierFailure):
                    components[number].setdefault(name, 0.0)
                    failures[number].append(result)
                    self._log_once(name, result)
                else:
                    components[number] |= result
        totals = [sum(self._weight(name) * value for name, value in values.items()) for values in components]
        return [Score(*fields) for fields in zip(totals, components, map(tuple, failures), answers, strict=True)]

    def _weight(self, component: str) -> float:
        return self._weights[component.partition("/")[0]]

    def _verify(self, calls: Sequence[VerifierCall]) -> list[list[dict[str, float] | VerifierFailure]]:
        """For each call the components of its completions; a single failure if the call failed."""
        try:
            results = self._verifiers(calls) if self._verifiers else []
        except VerifierLoadError as error:
            raise self._config_error(error) from None
        return [_components(call, result) for call, result in zip(calls, results, strict=True)]

    def check(self, examples: Sequence[Example]) -> None:
        """Call each reward function on sample completions. Raises `ConfigError` if it fails on all of them: it would
        fail during training, after hours."""
        texts = ["<think>…</think><answer>{}</answer>", "\\boxed{{{}}}", "The answer is {}."]
        inputs = [
            RewardInput(example.question, text.format(example.answer or "0"), example, (0, 1))
            for example in examples
            for text in texts
        ]
        for name in self._functions:
            results = self._verify([_function_call(name, inputs[i : i + 1]) for i in range(len(inputs))])
            failures = [result for (result,) in results if isinstance(result, VerifierFailure)]
            if len(failures) == len(inputs):
                kind, message = failures[0]
                raise ConfigError(*self._field(name), f"{kind.replace('_', ' ')} on sample completions: {message}")

    def votes(self, groups: Sequence[Sequence[Score]], examples: Sequence[Example]) -> list[list[int | None]]:
        """Numbers of the answers: equal answers of a group have the same one. None for a completion without an answer.

        Mathematical answers are compared as such: 1/2 and 0.5 are the same vote. Others are compared as texts.
        """
        texts = [list(dict.fromkeys(s.answer.text for s in group if s.answer.text)) for group in groups]
        costly = {(i, s.answer.text) for i, group in enumerate(groups) for s in group if _is_undecided(s)}
        numbers = [{text: number for number, text in enumerate(group)} for group in texts]
        for turn in range(1, max(map(len, texts), default=0)):  # each text is compared with one of each earlier vote
            pairs = [
                (i, group[turn], other)
                for i, group in enumerate(texts)
                if self._task.verifier == MATH and turn < len(group) and (i, group[turn]) not in costly
                for number, other in enumerate(group[:turn])
                if numbers[i][other] == number and (i, other) not in costly
            ]
            calls = [
                VerifierCall("accuracy", (b, tuple(examples[i]._replace(answer=a))))
                for i, text, other in pairs
                for a, b in ((other, text), (text, other))  # a reference B is the answer (B) Paris, not the reverse
            ]
            equal = [result == [{"accuracy": 1.0}] for result in self._verify(calls)]
            for (i, text, other), *either in zip(pairs, equal[::2], equal[1::2], strict=True):
                if any(either):
                    numbers[i][text] = min(numbers[i][text], numbers[i][other])
        return [
            [votes[score.answer.text] if score.answer.text else None for score in group]
            for group, votes in zip(groups, numbers, strict=True)
        ]

    @property
    def has_accuracy(self) -> bool:
        """Whether accuracy counts."""
        return self._weights["accuracy"] > 0

    def filter_metric(self, score: Score) -> float:
        """What dynamic sampling compares within a group: accuracy (arXiv 2503.14476, section 3.2), or the total if
        accuracy has no weight."""
        return score.components["accuracy"] if self.has_accuracy else score.total

    def _log_once(self, verifier: str, failure: VerifierFailure) -> None:
        if (verifier, failure.kind) not in self._logged:
            self._logged.add((verifier, failure.kind))
            where = "accuracy" if verifier == "accuracy" else f"task.reward_functions {verifier}"
            more = "the component is 0; further failures of this kind are only counted"
            self._log(f"{where} {failure.kind.replace('_', ' ')}: {failure.message} ({more})")

    def close(self) -> None:
        """End the worker processes."""
        if self._verifiers:
            self._verifiers.close()

    def __enter__(self) -> "Reward":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _is_undecided(score: Score) -> bool:
    """Whether the verifier could not compare the answer, so that it would not, or not in time, with another either."""
    return any(failure.kind in ("unparsed", "hung", "died") for failure in score.failures)


def _groups(inputs: Sequence[RewardInput]) -> list[range]:
    """The index ranges of inputs with the same prompt that are next to each other."""
    starts = [i for i in range(len(inputs)) if i == 0 or inputs[i][::2] != inputs[i - 1][::2]]
    return [range(*span) for span in itertools.pairwise([*starts, len(inputs)])]


def _function_call(name: str, inputs: Sequence[RewardInput]) -> VerifierCall:
    texts, ids = (tuple(getattr(one, field) for one in inputs) for field in ("completion", "completion_ids"))
    return VerifierCall(name, (inputs[0].prompt, texts, ids, tuple(inputs[0].example)))


def _components(call: VerifierCall, result: Any) -> list[dict[str, float] | VerifierFailure]:
    """The components of each completion of a call, or its failure. What a worker sent is not trusted to be numbers."""
    if isinstance(result, VerifierFailure):
        return [result]
    if call.verifier == "accuracy":
        return [{"accuracy": result} if _are_rewards([result]) and 0 <= result <= 1 else _no_reward(result)]
    count = len(call.arguments[1])
    if not isinstance(result, list) or len(result) != count:
        return [VerifierFailure("not_finite", printable(f"returned {result!r:.200} for {count} completions"))]
    return [_named(call.verifier, one) for one in result]


def _named(function: str, result: Any) -> dict[str, float] | VerifierFailure:
    """The components of a completion from what a reward function returned for it (`RewardFunction`)."""
    match result:
        case ["value", dict(rewards)] if _are_rewards(rewards.values()):
            return {f"{function}/{part}" if part else function: value for part, value in rewards.items()}
        case ["not_finite", str(message)]:
            return VerifierFailure("not_finite", printable(message))
    return _no_reward(result)


def _are_rewards(values: Iterable[Any]) -> bool:
    return all(type(value) is float and abs(value) <= MAX_REWARD for value in values)


def _no_reward(result: Any) -> VerifierFailure:
    fix = f"a reward is a number of at most {MAX_REWARD:g} in size, or a dict of them"
    return VerifierFailure("not_finite", printable(f"returned {result!r:.200}; {fix}"))

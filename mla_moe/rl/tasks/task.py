"""What is asked: questions without end or from a file, in splits that cannot overlap, and what an answer is worth."""

import difflib
import functools
import importlib.util
import json
import math
import re
import zlib
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from mla_moe.config import ConfigError, TaskConfig, require
from mla_moe.data.arithmetic import Split, problem, split_of
from mla_moe.rl.tasks import reasoning_gym
from mla_moe.rl.verifiers import worker
from mla_moe.rl.verifiers.worker import Example, VerifierSpec

_PATIENCE = 300  # draws without a new question after which a held-out split counts as exhausted


_HALF_PAIR = re.compile("[\ud800-\udfff]")  # JSON can spell what no UTF-8 can hold


@runtime_checkable
class Task(Protocol):
    """Questions and the check of their answers. A question's text alone decides its split (`split_of`)."""

    verifier: VerifierSpec | None
    """How a process of its own finds `score`; None where it cannot hang or fail and is called in place."""
    fingerprint: int
    """Tells these questions from others that the same recipe may mean another day."""

    def count(self, split: Split) -> int | None:
        """How many questions a split has; None where they are made as they are asked for."""
        ...

    def example(self, split: Split, number: int) -> Example:
        """Question `number` of a split, the same each time. Training questions have no end; held-out ones are all
        different, and a number beyond the last raises `ConfigError`, which says how many there are."""
        ...

    def score(self, example: Example, answer: str) -> float:
        """What an answer is worth, 0 … 1."""
        ...


def open_task(task: TaskConfig) -> Task:
    """The task that a recipe names. Raises `ConfigError` naming the field for one that there is not, for wrong options,
    for a library that is not installed and for a broken file."""
    name = task.name
    options = dict(option.split("=", 1) for option in task.options)
    if name == "arithmetic":
        return _arithmetic(options)
    if name.startswith("reasoning_gym:"):
        found = reasoning_gym.ReasoningGymTask(name.removeprefix("reasoning_gym:"), options)
        return GeneratedTask(name, found.draw, verifier=found.verifier)
    if name.endswith(".jsonl"):
        require(not options, "task.options", task.options, "a file takes none")
        return JsonLinesTask(name)
    known = {full.removeprefix("reasoning_gym:"): full for full in ("arithmetic", *reasoning_gym.names())}
    near = " or ".join(known[key] for key in difflib.get_close_matches(name, known))
    fix = f"did you mean {near}?" if near else "arithmetic, reasoning_gym:NAME or the path of a .jsonl"
    raise ConfigError("task.name", name, fix)


def require_questions(task: Task, split: Split, field: str, wanted: int) -> None:
    """Raises `ConfigError` on the field that asks for more questions of a held-out split than it has."""
    count = task.count(split)
    fix = f"the task has {count} {split} questions, a tenth of all; ask for no more"
    require(count is None or wanted <= count, field, wanted, fix)


def _arithmetic(options: dict[str, str]) -> "GeneratedTask":
    sizes = {"least": 1, "most": 6}
    for key, text in options.items():
        require(key in sizes, "task.options", f"{key}={text}", "arithmetic takes least and most")
        require(text.isdecimal(), "task.options", f"{key}={text}", "a number of operations")
        sizes[key] = int(text)
    require(1 <= sizes["least"] <= sizes["most"], "task.options", sizes, "least is at least 1, and at most most")

    def draw(split: Split, number: int) -> Example:
        question, answer = problem(split, number, **sizes)
        return Example(question, answer, {"question": question, "answer": answer})

    return GeneratedTask("arithmetic", draw)


class _VerifiedTask:
    """A task whose answers are judged by `verifier`, or else must be the right one, letter by letter."""

    verifier: VerifierSpec | None

    @functools.cached_property
    def _verify(self) -> Callable[[str, Example], float]:
        return worker.load(*self.verifier) if self.verifier else _same

    def score(self, example: Example, answer: str) -> float:
        return self._verify(answer, example)


def _same(answer: str, example: Example) -> float:
    return float(answer.strip() == example.answer)


class GeneratedTask(_VerifiedTask):
    """Questions made as they are asked for: `draw(split, number)` is one of that split, perhaps not for the first time.

    Held-out questions are those drawn for the first time, and are kept; training questions may come again.
    """

    fingerprint = 0

    def __init__(self, name: str, draw: Callable[[Split, int], Example], verifier: VerifierSpec | None = None):
        self._name, self._draw, self.verifier = name, draw, verifier
        self._heldout: dict[Split, _New] = {}

    def count(self, split: Split) -> int | None:
        return None

    def example(self, split: Split, number: int) -> Example:
        if split == "train":
            return self._draw(split, number)
        found = self._heldout.setdefault(split, _New(functools.partial(self._draw, split)))
        if not found.reach(number):
            raise _exhausted(split, self._name, len(found.examples))
        return found.examples[number]


class _New:
    """The different questions among those drawn, in order."""

    def __init__(self, draw: Callable[[int], Example]):
        self._draw, self._drawn = draw, 0
        self._seen: set[str] = set()
        self.examples: list[Example] = []

    def reach(self, number: int) -> bool:
        """Draw until there is an example `number`; False where no new one comes."""
        idle = 0
        while len(self.examples) <= number and idle < _PATIENCE:
            example = self._draw(self._drawn)
            self._drawn += 1
            idle += 1
            if example.question not in self._seen:
                self._seen.add(example.question)
                self.examples.append(example)
                idle = 0
        return len(self.examples) > number


def _exhausted(split: Split, name: str, count: int) -> ConfigError:
    return ConfigError("task.name", name, f"has {count} different {split} questions; ask for no more of them")


class JsonLinesTask(_VerifiedTask):
    """JSON lines with `question` and `answer`, each text or a number; answers are compared as mathematics.

    Reading it once finds where lines start; a question is read again when asked for. A question that comes twice counts
    once, as it stands first. Each epoch of training has an order of its own, the same in every run.
    """

    verifier: VerifierSpec | None = ("math",)

    def __init__(self, path: str):
        require(Path(path).is_file(), "task.name", path, "no such file")
        if importlib.util.find_spec("math_verify") is None:
            raise ConfigError("task.name", path, "needs math-verify: pip install 'mla_moe[rl]'")
        self._path = path
        self._starts: dict[Split, list[int]] = {"train": [], "validation": [], "test": []}
        self._order = functools.lru_cache(maxsize=4)(self._shuffled)
        self.fingerprint = 0
        seen: set[str] = set()
        for start, example in self._lines():
            if example.question not in seen:
                seen.add(example.question)
                self._starts[split_of(example.question)].append(start)
        require(len(self._starts["train"]) > 0, "task.name", path, "has no training question")

    def count(self, split: Split) -> int | None:
        return len(self._starts[split])

    def example(self, split: Split, number: int) -> Example:
        starts = self._starts[split]
        if split != "train" and number >= len(starts):
            raise _exhausted(split, self._path, len(starts))
        epoch, place = divmod(number, len(starts))
        with open(self._path, "rb") as file:
            file.seek(starts[self._order(split, epoch)[place]])
            return _example(file.readline(), self._path)

    def _shuffled(self, split: Split, epoch: int) -> np.ndarray:
        return np.random.default_rng(epoch).permutation(len(self._starts[split]))

    def _lines(self) -> Iterator[tuple[int, Example]]:
        """Where a line starts, in bytes, and what it says."""
        start = 0
        with open(self._path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.isspace():
                    self.fingerprint = zlib.crc32(line, self.fingerprint)
                    yield start, _example(line, f"{self._path}:{number}")
                start += len(line)


def _example(line: bytes, where: str) -> Example:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError("task.name", where, f"is not JSON: {error}") from None
    require(isinstance(record, dict), "task.name", where, "must be an object with question and answer")
    return Example(_text(record, "question", where), _text(record, "answer", where), record)


def _text(record: dict[str, Any], key: str, where: str) -> str:
    value = record.get(key)
    if isinstance(value, float) and math.isfinite(value):
        value = format(Decimal(repr(value)), "f")  # 7e-05 would be read as 7 e − 5
    ok = isinstance(value, str | int) and not isinstance(value, bool) and str(value).strip() != ""
    require(ok, "task.name", where, f"needs text or a number under {key!r}")
    text = str(value)
    require(not _HALF_PAIR.search(text), "task.name", where, "has half of a surrogate pair, which is no character")
    return text

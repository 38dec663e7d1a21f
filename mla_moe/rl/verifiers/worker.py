"""Verifiers, as the service of a worker process (`workers/process.py`).

Workers run this file by its path in fresh interpreters, which must start quickly and not use accelerators: it imports
nothing from the package.
"""

import asyncio
import contextlib
import importlib
import importlib.util
import inspect
import math
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Example(NamedTuple):
    """A question with its reference answer."""

    question: str
    answer: str
    """A correct answer; empty if the task's verifier needs none."""
    record: Mapping[str, Any]
    """The full record: the object of a JSON line, or reasoning-gym's entry with its `metadata`."""


VerifierSpec = tuple[Any, ...]
"""A verifier in picklable form: its kind and the arguments of its loader, the last of which is a name."""

MATH: VerifierSpec = ("math",)
"""The verifier `mathematics.equal`."""


class FailedCall(Exception):
    """A call without a value: the kind of the failure, and a message."""


def load(kind: str, *arguments: Any) -> Callable[..., Any]:
    """The verifier of a `VerifierSpec`. Raises what its imports raise.

    `("math",)` and `("reasoning_gym", options, name)` take (answer, example) and return an accuracy. `("function",
    conversational, path)` is a `RewardFunction`.
    """
    return {"math": _math, "reasoning_gym": _reasoning_gym, "function": RewardFunction}[kind](*arguments)


def _math() -> Callable[[str, Example], float]:
    mathematics = _import_file(Path(__file__).with_name("mathematics") / "__init__.py")

    def verify(answer: str, example: Example) -> float:
        try:
            return float(mathematics.equal(example.answer, answer))
        except mathematics.UnparsedError as error:
            raise FailedCall("unparsed", str(error)) from None

    return verify


def _reasoning_gym(options: Mapping[str, Any], name: str) -> Callable[[str, Example], float]:
    import reasoning_gym

    dataset = reasoning_gym.create_dataset(name, **options)

    def verify(answer: str, example: Example) -> float:
        return min(max(float(dataset.score_answer(answer, dict(example.record))), 0.0), 1.0)

    return verify


def _import_file(file: Path) -> types.ModuleType:
    """Import a file, or the `__init__.py` of a package, under a name that no other module has."""
    is_package, name = file.name == "__init__.py", f"verifier_file_{file.stem}"
    locations = [str(file.parent)] if is_package else None
    spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=locations)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class RewardFunction:
    """A reward function of the user, in one of two forms, each of which may be a coroutine function.

    - `f(prompt, completion, example)` returns the reward of a completion.
    - `f(prompts, completions, completion_ids, **columns)`, as in TRL, returns a list with the rewards of several
      completions of one prompt. It gets those arguments by name that it accepts; columns are lists too. With the
      template `chat` (`conversational`), prompts and completions are lists of messages.

    A reward is a number or a dict of named numbers, whose sum counts. In the second form it may be None, if the
    function does not apply to a completion.
    """

    def __init__(self, conversational: bool, path: str):
        """Import the function from `path` (module:name or path.py:name)."""
        self._conversational = conversational
        source, _, name = path.rpartition(":")
        if source.endswith(".py"):
            file = Path(source).resolve(strict=True)
            if file.stem in sys.stdlib_module_names:  # a file `random.py` must not replace that module
                importlib.import_module(file.stem)
            sys.path.insert(0, str(file.parent))  # modules next to it can be imported, as for a script
            module = _import_file(file)
        else:
            module = importlib.import_module(source)
        self._function = getattr(module, name)
        if not callable(self._function):
            raise TypeError(f"{name} is not callable")
        self._parameters: Mapping[str, inspect.Parameter] = {}
        with contextlib.suppress(ValueError):  # a function in C has no signature
            self._parameters = inspect.signature(self._function).parameters
        self._any_column = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in self._parameters.values())
        takes_one = _binds(self._function, "prompt", "completion", "example")
        names = {"prompts", "completions", "completion_ids"}
        self.batched = not names.isdisjoint(self._parameters) or (self._any_column and not takes_one)
        if not self.batched and not takes_one:
            forms = "(prompt, completion, example), or (prompts, completions, **columns)"
            raise TypeError(f"the parameters of {name} must be {forms}")

    def __call__(
        self, prompt: str, completions: Sequence[str], completion_ids: Sequence[Sequence[int]], example: Example
    ) -> list[tuple[str, Any]]:
        """For each completion `("value", rewards by name)`, the name of a single reward being empty, or
        `("not_finite", message)`."""
        if self.batched:
            values = self._columns(self._call_batched(prompt, completions, completion_ids, example), len(completions))
        else:
            values = [_resolved(self._function(prompt, completion, example)) for completion in completions]
        return [("value", {}) if value is None and self.batched else _rewards_by_name(value) for value in values]

    def _call_batched(
        self, prompt: str, completions: Sequence[str], completion_ids: Sequence[Sequence[int]], example: Example
    ) -> Any:
        prompts: list[Any] = [prompt] * len(completions)
        texts: list[Any] = list(completions)
        if self._conversational:
            prompts = [[{"role": "user", "content": example.question}] for _ in texts]
            texts = [[{"role": "assistant", "content": text}] for text in texts]
        columns = {"question": example.question, "answer": example.answer} | dict(example.record)
        arguments = {name: [value] * len(texts) for name, value in columns.items()}
        arguments |= {"prompts": prompts, "completions": texts, "completion_ids": [list(ids) for ids in completion_ids]}
        if not self._any_column:
            arguments = {name: value for name, value in arguments.items() if name in self._parameters}
        try:
            inspect.signature(self._function).bind(**arguments)
        except TypeError as error:
            raise TypeError(f"{error}; the columns are {', '.join(columns)}") from None
        return _resolved(self._function(**arguments))

    @staticmethod
    def _columns(value: Any, count: int) -> list[Any]:
        """One reward per completion, from a list, or a dict of lists."""
        if isinstance(value, Mapping):
            columns = {name: RewardFunction._columns(column, count) for name, column in value.items()}
            return [{name: column[index] for name, column in columns.items()} for index in range(count)]
        if isinstance(value, str) or not hasattr(value, "__len__") or len(value) != count:
            raise FailedCall(
                "not_finite", f"returned {value!r:.200} for {count} completions, needs a list of {count} numbers"
            )
        return list(value)


def _binds(function: Callable[..., Any], *arguments: Any) -> bool:
    """Whether a function can be called so; a function in C has no signature, and may."""
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError:
        return False
    except ValueError:
        pass
    return True


def _resolved(value: Any) -> Any:
    """The value, or that of a coroutine."""
    if inspect.isawaitable(value):

        async def wait() -> Any:
            return await value

        return asyncio.run(wait())
    return value


def _rewards_by_name(value: Any) -> tuple[str, Any]:
    rewards = value if isinstance(value, Mapping) else {"": value}
    numbers = {
        str(name): float(number) if hasattr(number, "__float__") else math.nan  # a string is not a number
        for name, number in rewards.items()
    }
    if all(map(math.isfinite, numbers.values())):
        return "value", numbers
    return "not_finite", f"returned {value!r:.200}"


def open_service(
    loading: Callable[[str], None], specs: Mapping[str, VerifierSpec]
) -> tuple[Callable[..., tuple[str, Any]], list[str]]:
    """Load the verifiers. Returns a function for calls, and the names of batched reward functions.

    A call has the name of a verifier and its arguments, the last of which is the example as a tuple; its reply is
    `("value", value)`, or the kind of a failure and a message.
    """
    verifiers: dict[str, Callable[..., Any]] = {}
    for name, spec in specs.items():
        loading(name)
        verifiers[name] = load(*spec)

    def call(name: str, arguments: tuple[Any, ...]) -> tuple[str, Any]:
        *others, example = arguments
        try:
            return "value", verifiers[name](*others, Example(*example))
        except FailedCall as failure:
            kind, message = failure.args
            return kind, message

    return call, [name for name, verifier in verifiers.items() if getattr(verifier, "batched", False)]

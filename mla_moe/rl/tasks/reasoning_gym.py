"""Any task of the library reasoning-gym, by name."""

import ast
import dataclasses
import difflib
import enum
import functools
import os
import types
import typing
from collections.abc import Mapping
from typing import Any

from mla_moe.config import ConfigError, require
from mla_moe.data.arithmetic import Split, split_of
from mla_moe.rl.verifiers.worker import Example, VerifierSpec

_PREFIX = "reasoning_gym:"
_SIZE = 4096  # questions of one of the library's datasets; some prepare them all
_STRIDE: dict[Split, int] = {"train": 8, "validation": 64, "test": 64}  # enough that the next of a split is within it
_PATIENCE = 1000  # questions in a row of other splits, or that could not be made

_HASHED = {
    "isomorphic_strings",
    "knight_swap",
    "list_functions",
    "polynomial_multiplication",
    "ransom_note",
    "word_ladder",
}
"""Tasks of reasoning-gym 0.1.25 that walk through sets of texts, whose order is another in each Python process."""


def names() -> list[str]:
    """The tasks, each as a recipe writes it; none where the library is not installed."""
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError:
        return []
    return [_PREFIX + name for name in sorted(DATASETS)]


class ReasoningGymTask:
    """One task of it. The library makes any question from a seed and an index, so any can be had at once.

    Raises `ConfigError` for a task or an option that there is not, for values that it refuses, and where it is missing.
    """

    def __init__(self, name: str, options: Mapping[str, str]):
        self._name = _PREFIX + name
        try:
            from reasoning_gym.factory import DATASETS
        except ImportError:
            raise ConfigError("task.name", self._name, "needs reasoning-gym: pip install 'mla_moe[rl]'") from None
        if name not in DATASETS:
            near = difflib.get_close_matches(name, DATASETS, n=3, cutoff=0.5) or sorted(DATASETS)
            raise ConfigError("task.name", self._name, f"no such task; there are {', '.join(near)}")
        fixed = name not in _HASHED or os.environ.get("PYTHONHASHSEED", "random") != "random"
        fix = "asks other questions in each process unless you set the variable PYTHONHASHSEED=0 for all of them"
        require(fixed, "task.name", self._name, fix)
        self._make, config = DATASETS[name]
        self._config = functools.partial(config, **_typed(config, options))
        self._seed = self._config.keywords.get("seed") or 0
        self._dataset = functools.lru_cache(maxsize=4)(self._chunk)
        try:
            self._dataset(0)
        except Exception as error:  # it checks its settings by `assert`, among other ways
            raise ConfigError("task.options", dict(options), f"{self._name} refuses them: {error}") from None
        self.verifier: VerifierSpec = ("reasoning_gym", {"seed": 0, "size": _SIZE} | self._config.keywords, name)

    def _chunk(self, chunk: int) -> Any:
        """Questions `chunk * _SIZE` and on: the library adds seed and index up, so chunks do not repeat each other."""
        return self._make(config=self._config(seed=(self._seed + chunk * _SIZE) % 2**32, size=_SIZE))

    def draw(self, split: Split, number: int) -> Example:
        """The first question of `split` from a place on that `number` decides. What the library fails to make is passed
        over."""
        start, why = number * _STRIDE[split], "it has too few different ones"
        for index in range(start, start + _PATIENCE):
            try:
                entry = self._dataset(index // _SIZE)[index % _SIZE]
            except Exception as error:
                why = f"{type(error).__name__}: {error}"
                continue
            if split_of(entry["question"]) == split:
                answer = "" if entry["answer"] is None else str(entry["answer"])
                return Example(entry["question"], answer, entry)
        raise ConfigError("task.name", self._name, f"no {split} question among {_PATIENCE}: {why}")


def _typed(config: Any, options: Mapping[str, str]) -> dict[str, Any]:
    """The options of a task, whose settings are the fields of `config`, in the types of these."""
    known = {field.name: field for field in dataclasses.fields(config)}
    hints = typing.get_type_hints(config)
    values = {}
    for key, text in options.items():
        option = f"{key}={text}"
        require(key != "size", "task.options", option, "questions are made without end: leave it away")
        near = difflib.get_close_matches(key, known, n=3) or [name for name in known if name != "size"]
        require(key in known, "task.options", option, f"no such option; there are {', '.join(near)}")
        try:
            values[key] = _value(hints[key], text)
        except (KeyError, SyntaxError, ValueError):
            raise ConfigError("task.options", option, f"write a value of type {known[key].type}") from None
    return values


def _value(hint: Any, text: str) -> Any:
    """`text` as the type `hint`. Raises KeyError, SyntaxError or ValueError where it is not one."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return None if text == "None" else _value(next(a for a in arguments if a is not type(None)), text)
    if hint is str or (origin is typing.Literal and text in arguments):
        return text
    if hint is bool:
        return {"true": True, "false": False}[text.lower()]
    if hint in (int, float) or isinstance(hint, enum.EnumType):
        return hint(text)
    if hasattr(hint, "fromisoformat"):  # dates and times
        return hint.fromisoformat(text)
    value = ast.literal_eval(text)
    if not isinstance(value, list | tuple):
        raise ValueError(value)
    return value

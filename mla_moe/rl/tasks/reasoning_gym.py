"""Tasks of the reasoning-gym library, by name."""

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

PREFIX = "reasoning_gym:"
_SIZE = 4096  # examples per dataset object of the library; some datasets generate all of them at construction
_STRIDE: dict[Split, int] = {"train": 8, "validation": 64, "test": 64}  # indices per example, one of them of the split
_MAX_ATTEMPTS = 1000  # indices in a row that give another split or an error

_HASH_DEPENDENT = {
    "isomorphic_strings",
    "knight_swap",
    "list_functions",
    "polynomial_multiplication",
    "ransom_note",
    "word_ladder",
}
"""Tasks of reasoning-gym 0.1.25 that iterate over sets of strings, whose order differs between Python processes."""


def names() -> list[str]:
    """The names of all tasks, as in a recipe; empty if the library is not installed."""
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError:
        return []
    return [PREFIX + name for name in sorted(DATASETS)]


class ReasoningGymTask:
    """One task. The library generates each example from a seed and an index, so access is random.

    Raises `ConfigError` for an unknown task or option, for invalid values, and if the library is not installed.
    """

    def __init__(self, name: str, options: Mapping[str, str]):
        self._name = PREFIX + name
        try:
            from reasoning_gym.factory import DATASETS
        except ImportError:
            raise ConfigError("task.name", self._name, "needs reasoning-gym: pip install 'mla_moe[rl]'") from None
        if name not in DATASETS:
            near = difflib.get_close_matches(name, DATASETS, n=3, cutoff=0.5) or sorted(DATASETS)
            raise ConfigError("task.name", self._name, f"no such task; choose from {', '.join(near)}")
        deterministic = name not in _HASH_DEPENDENT or os.environ.get("PYTHONHASHSEED", "random") != "random"
        fix = "generates other questions in each process; set the environment variable PYTHONHASHSEED=0"
        require(deterministic, "task.name", self._name, fix)
        self._create, config = DATASETS[name]
        self._config = functools.partial(config, **_typed(config, options))
        self._seed = self._config.keywords.get("seed") or 0
        self._dataset = functools.lru_cache(maxsize=4)(self._chunk)
        try:
            self._dataset(0)
        except Exception as error:  # the library validates by `assert`, among other ways
            raise ConfigError("task.options", dict(options), f"{self._name} rejects them: {error}") from None
        self.verifier: VerifierSpec = ("reasoning_gym", {"seed": 0, "size": _SIZE} | self._config.keywords, name)

    def _chunk(self, chunk: int) -> Any:
        """The dataset from example `chunk * _SIZE` on. Chunks do not overlap: the library adds seed and index."""
        return self._create(config=self._config(seed=(self._seed + chunk * _SIZE) % 2**32, size=_SIZE))

    def draw(self, split: Split, number: int) -> Example:
        """The first example of `split` from index `number * stride` on. Examples that the library fails to generate
        are skipped."""
        start, why = number * _STRIDE[split], "too few different ones"
        for index in range(start, start + _MAX_ATTEMPTS):
            try:
                entry = self._dataset(index // _SIZE)[index % _SIZE]
            except Exception as error:
                why = f"{type(error).__name__}: {error}"
                continue
            if split_of(entry["question"]) == split:
                answer = "" if entry["answer"] is None else str(entry["answer"])
                return Example(entry["question"], answer, entry)
        raise ConfigError("task.name", self._name, f"no {split} question among {_MAX_ATTEMPTS}: {why}")


def _typed(config: Any, options: Mapping[str, str]) -> dict[str, Any]:
    """Convert the options to the types of the fields of the library's dataclass `config`."""
    known = {field.name: field for field in dataclasses.fields(config)}
    hints = typing.get_type_hints(config)
    values = {}
    for key, text in options.items():
        option = f"{key}={text}"
        require(key != "size", "task.options", option, "examples are unlimited; remove it")
        near = difflib.get_close_matches(key, known, n=3) or [name for name in known if name != "size"]
        require(key in known, "task.options", option, f"no such option; choose from {', '.join(near)}")
        try:
            values[key] = _value(hints[key], text)
        except (KeyError, SyntaxError, ValueError):
            raise ConfigError("task.options", option, f"must be a value of type {known[key].type}") from None
    return values


def _value(hint: Any, text: str) -> Any:
    """`text` converted to the type `hint`. Raises KeyError, SyntaxError or ValueError if that is impossible."""
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

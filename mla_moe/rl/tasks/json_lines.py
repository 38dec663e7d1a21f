"""Tasks from a JSON-lines file."""

import functools
import importlib.util
import json
import math
import re
import zlib
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np

from mla_moe.config import ConfigError, require
from mla_moe.data.arithmetic import Split, split_of
from mla_moe.rl.tasks.task import VerifiedTask, exhausted
from mla_moe.rl.verifiers.worker import Example, VerifierSpec

_SURROGATE = re.compile("[\ud800-\udfff]")  # allowed in JSON, but not in UTF-8


class JsonLinesTask(VerifiedTask):
    """JSON lines with `question` and `answer`, each text or a number; answers are compared by math-verify.

    The file is indexed once; lines are read again on access. Of repeated questions only the first counts. Each epoch
    over the training examples has its own shuffled order, the same in every run.
    """

    verifier: VerifierSpec | None = ("math",)

    def __init__(self, path: str):
        require(Path(path).is_file(), "task.name", path, "no such file")
        if importlib.util.find_spec("math_verify") is None:
            raise ConfigError("task.name", path, "needs math-verify: pip install 'mla_moe[rl]'")
        self._path = path
        self._offsets: dict[Split, list[int]] = {"train": [], "validation": [], "test": []}
        self._order = functools.lru_cache(maxsize=4)(self._shuffled)
        self.fingerprint = 0
        seen: set[str] = set()
        for offset, example in self._lines():
            if example.question not in seen:
                seen.add(example.question)
                self._offsets[split_of(example.question)].append(offset)
        require(len(self._offsets["train"]) > 0, "task.name", path, "has no training question; add lines")

    def count(self, split: Split) -> int | None:
        return len(self._offsets[split])

    def example(self, split: Split, number: int) -> Example:
        offsets = self._offsets[split]
        if split != "train" and number >= len(offsets):
            raise exhausted(split, self._path, len(offsets))
        epoch, index = divmod(number, len(offsets))
        with open(self._path, "rb") as file:
            file.seek(offsets[self._order(split, epoch)[index]])
            return _parse(file.readline(), self._path)

    def _shuffled(self, split: Split, epoch: int) -> np.ndarray:
        return np.random.default_rng(epoch).permutation(len(self._offsets[split]))

    def _lines(self) -> Iterator[tuple[int, Example]]:
        """Byte offset and example of each line; computes the fingerprint."""
        offset = 0
        with open(self._path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.isspace():
                    self.fingerprint = zlib.crc32(line, self.fingerprint)
                    yield offset, _parse(line, f"{self._path}:{number}")
                offset += len(line)


def _parse(line: bytes, where: str) -> Example:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError("task.name", where, f"is not JSON: {error}") from None
    require(isinstance(record, dict), "task.name", where, "must be an object with question and answer")
    return Example(_text(record, "question", where), _text(record, "answer", where), record)


def _text(record: dict[str, Any], key: str, where: str) -> str:
    value = record.get(key)
    if isinstance(value, float) and math.isfinite(value):
        value = format(Decimal(repr(value)), "f")  # math-verify would read 7e-05 as 7 e − 5
    ok = isinstance(value, str | int) and not isinstance(value, bool) and str(value).strip() != ""
    require(ok, "task.name", where, f"needs text or a number under {key!r}")
    text = str(value)
    require(not _SURROGATE.search(text), "task.name", where, "has a lone surrogate (half of a character); remove it")
    return text

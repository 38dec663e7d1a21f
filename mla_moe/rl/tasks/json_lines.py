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

from mla_moe.config import ConfigError, DataConfig, require
from mla_moe.data.arithmetic import Split, split_of
from mla_moe.data.lines import bounded_lines
from mla_moe.rl.tasks.task import VerifiedTask, exhausted
from mla_moe.rl.verifiers.worker import MATH, Example, VerifierSpec

_MAX_BYTES = DataConfig.max_record_bytes
_SURROGATE = re.compile("[\ud800-\udfff]")  # allowed in JSON, but not in UTF-8


class JsonLinesTask(VerifiedTask):
    """JSON lines with `question` and `answer`, each text or a number; answers are compared by math-verify.

    The file is indexed once; lines are read again on access. Of repeated questions only the first counts. Each epoch
    over the training examples has its own shuffled order, the same in every run. With a file `heldout`, its questions
    are both the validation and the test split, and all others are for training.
    """

    verifier: VerifierSpec | None = MATH

    def __init__(self, path: str, heldout: str | None = None):
        if importlib.util.find_spec("math_verify") is None:
            raise ConfigError("task.name", path, "needs math-verify: pip install 'mla_moe[rl]'")
        self._path = path
        self._offsets: dict[Split, list[tuple[str, int]]] = {"train": [], "validation": [], "test": [], "all": []}
        self._order = functools.lru_cache(maxsize=4)(self._shuffled)
        self.fingerprint = 0
        seen: set[str] = set()
        files = [("task.heldout", heldout)] if heldout else []
        for field, file in (*files, ("task.name", path)):
            for offset, example in self._lines(field, file):
                if example.question not in seen:
                    seen.add(example.question)
                    own: Split = split_of(example.question) if heldout is None else "train"
                    splits: tuple[Split, ...] = (own, "all") if field == "task.name" else ("validation", "test")
                    for split in splits:
                        self._offsets[split].append((file, offset))

    def count(self, split: Split) -> int | None:
        return len(self._offsets[split])

    def example(self, split: Split, number: int) -> Example:
        offsets = self._offsets[split]
        if split != "train" and number >= len(offsets):
            raise exhausted(split, self._path, len(offsets))
        require(len(offsets) > 0, "task.name", self._path, f"has no {split} question; add lines")
        epoch, index = divmod(number, len(offsets))
        path, offset = offsets[self._order(split, epoch)[index]]
        with open(path, "rb") as file:
            file.seek(offset)
            return _parse(file.readline(_MAX_BYTES + 1), "task.name" if path == self._path else "task.heldout", path)

    def _shuffled(self, split: Split, epoch: int) -> np.ndarray:
        return np.random.default_rng(epoch).permutation(len(self._offsets[split]))

    def _lines(self, field: str, path: str) -> Iterator[tuple[int, Example]]:
        """Byte offset and example of each line; computes the fingerprint."""
        require(Path(path).is_file(), field, path, "no such file")
        with open(path, "rb") as file:
            for number, (offset, line) in enumerate(bounded_lines(file, _MAX_BYTES), 1):
                if not line.isspace():
                    self.fingerprint = zlib.crc32(line, self.fingerprint)
                    yield offset, _parse(line, field, f"{path}:{number}")


def _parse(line: bytes, field: str, where: str) -> Example:
    require(len(line) <= _MAX_BYTES, field, where, f"is longer than {_MAX_BYTES:,} bytes; shorten or remove it")
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(field, where, f"is not JSON: {error}") from None
    require(isinstance(record, dict), field, where, "must be an object with question and answer")
    return Example(_text(record, "question", field, where), _text(record, "answer", field, where), record)


def _text(record: dict[str, Any], key: str, field: str, where: str) -> str:
    value = record.get(key)
    if isinstance(value, float) and math.isfinite(value):
        value = format(Decimal(repr(value)), "f")  # math-verify would read 7e-05 as 7 e − 5
    ok = isinstance(value, str | int) and not isinstance(value, bool) and str(value).strip() != ""
    require(ok, field, where, f"needs text or a number under {key!r}")
    text = str(value)
    require(not _SURROGATE.search(text), field, where, "has a lone surrogate (half of a character); remove it")
    return text

"""Token sequences with random access, in a temporary file rather than in memory: a large data set has gigabytes."""

import array
import tempfile
import weakref
from collections.abc import Sequence
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Int


class TokenStore:
    """Token ids, and which of them are trained on. All are appended before the first is read."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="mla_moe_tokens_")  # noqa: SIM115
        weakref.finalize(self, self._file.close)
        self._ends = array.array("q", [0])
        self.trained = 0
        """Tokens that are trained on. The first of a sequence is no target, and never is."""

    def append(self, ids: Sequence[int], trained: Sequence[tuple[int, int]]) -> None:
        """Add a sequence, with the ranges of its tokens that are trained on."""
        stored = np.asarray(ids, np.int32)
        for start, stop in trained:
            stored[start:stop] = ~stored[start:stop]  # negative
        self.trained += int((stored[1:] < 0).sum())
        self._file.write(stored.tobytes())
        self._ends.append(self._ends[-1] + len(stored))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> tuple[Int[np.ndarray, "T"], Bool[np.ndarray, "T"]]:
        """Token ids, and where they are trained on."""
        if not 0 <= index < len(self):  # IndexError ends a loop over a sequence
            raise IndexError(index)
        stored = self._tokens[self._ends[index] : self._ends[index + 1]]
        return np.where(stored < 0, ~stored, stored), stored < 0

    @property
    def lengths(self) -> Int[np.ndarray, "N"]:
        return np.diff(np.frombuffer(self._ends, np.int64))

    @cached_property
    def _tokens(self) -> np.ndarray:
        self._file.flush()
        return np.memmap(self._file, np.int32, mode="r") if self._ends[-1] else np.zeros(0, np.int32)

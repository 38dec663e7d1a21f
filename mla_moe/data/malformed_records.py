"""Malformed records: skipped and counted, up to a fraction of all records."""

import logging
from collections.abc import Mapping, Sequence, Set

import numpy as np
from jaxtyping import Int

from mla_moe.config import ConfigError

TokenIds = Int[np.ndarray, "T"]
Document = str | TokenIds
"""A text, or token ids."""

logger = logging.getLogger(__name__)

_LOGGED = 10
"""Malformed records that are logged one by one; further ones are only counted."""


class MalformedRecordError(ConfigError):
    """A record that cannot be read: its file and line, and what is wrong."""


def too_long(field: str, where: str, max_record_bytes: int) -> MalformedRecordError:
    fix = "raise it or split the record"
    return MalformedRecordError(field, where, f"is longer than data.max_record_bytes = {max_record_bytes:,}; {fix}")


_TEXT, _EMPTY, _MALFORMED = 1, 2, 3


class SkipMalformed(Sequence[Document]):
    """Documents, with malformed ones replaced by empty text, which packing skips. Both are counted when they are read.

    Raises `ConfigError` that names the record once more than `max_fraction` of all records are malformed.
    """

    ranges: Mapping[str, range]
    """Indices of the documents of each source, which is a pattern of the recipe."""
    files: Set[str]
    """Real paths of the files."""
    nbytes: int
    """Bytes of the files."""

    def __init__(self, source: Sequence[Document], max_fraction: float, fingerprint: int):
        """`fingerprint` identifies the files, to detect other data on resume."""
        self._source, self._max_fraction, self.fingerprint = source, max_fraction, fingerprint
        self._skipped: set[int] = set()
        self._found = np.zeros(len(source), np.int8)  # a byte for each document

    @property
    def malformed(self) -> int:
        """Number of malformed records so far."""
        return len(self._skipped)

    @property
    def empty(self) -> int:
        """Number of empty documents so far."""
        return int((self._found == _EMPTY).sum())

    def with_text(self, part: range) -> float:
        """Number of the documents `part` that have text, as far as they have been read; of the others the same fraction
        is taken to have some."""
        found = self._found[part.start : part.stop]
        read = np.count_nonzero(found)
        return len(part) * np.count_nonzero(found == _TEXT) / read if read else float(len(part))

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Document:
        try:
            text = self._source[index]
            self._found[index] = _TEXT if len(text) else _EMPTY
            return text
        except MalformedRecordError as error:
            new, self._found[index] = index not in self._skipped, _MALFORMED
            self._skipped.add(index)
            if self.malformed > self._max_fraction * len(self):
                count = f"with it {self.malformed} of {len(self)} records are malformed"
                fix = f"{error.message}; {count}; raise data.max_malformed_fraction to skip more"
                raise MalformedRecordError(error.field, error.value, fix) from None
            if new and self.malformed <= _LOGGED:
                logger.warning("skipped: %s", error)
            return ""

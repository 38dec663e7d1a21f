"""Malformed records: skipped and counted, up to a fraction of all records."""

import logging
from collections.abc import Sequence

from mla_moe.config import ConfigError

logger = logging.getLogger(__name__)

_LOGGED = 10
"""Malformed records that are logged one by one; further ones are only counted."""


class MalformedRecordError(ConfigError):
    """A record that cannot be read: its file and line, and what is wrong."""


class SkipMalformed(Sequence[str]):
    """Documents, with malformed ones replaced by empty text. A malformed record is detected when it is read.

    Raises `ConfigError` that names the record once more than `max_fraction` of all records are malformed.
    """

    def __init__(self, source: Sequence[str], max_fraction: float, fingerprint: int):
        """`fingerprint` identifies the files, to detect other data on resume."""
        self._source, self._max_fraction, self.fingerprint = source, max_fraction, fingerprint
        self._skipped: set[int] = set()

    @property
    def malformed(self) -> int:
        """Number of records skipped so far."""
        return len(self._skipped)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> str:
        try:
            return self._source[index]
        except MalformedRecordError as error:
            new = index not in self._skipped
            self._skipped.add(index)
            if self.malformed > self._max_fraction * len(self):
                count = f"with it {self.malformed} of {len(self)} records are malformed"
                fix = f"{error.message}; {count}; data.max_malformed_fraction may allow more"
                raise MalformedRecordError(error.field, error.value, fix) from None
            if new and self.malformed <= _LOGGED:
                logger.warning("skipped: %s", error)
            return ""

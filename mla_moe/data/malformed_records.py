"""Records that cannot be read: left out, counted, and never more than a share."""

import logging
from collections.abc import Sequence

from mla_moe.config import ConfigError

logger = logging.getLogger(__name__)

_NAMED = 10
"""How many are named in the log; more are only counted."""


class TooManyMalformedError(ConfigError):
    """A record, where it is and what is wrong with it."""


class SkipMalformed(Sequence[str]):
    """Documents, of which those that are malformed are empty. Nobody knows of one before it is read.

    Raises `ConfigError`, which names the record, when more than a share of `most` of all turn out so.
    """

    def __init__(self, source: Sequence[str], most: float, fingerprint: int):
        """`fingerprint` tells these documents from others."""
        self._source, self._most, self.fingerprint = source, most, fingerprint
        self._left_out: set[int] = set()

    @property
    def malformed(self) -> int:
        """Records left out so far."""
        return len(self._left_out)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> str:
        try:
            return self._source[index]
        except TooManyMalformedError as error:
            new = index not in self._left_out
            self._left_out.add(index)
            if self.malformed > self._most * len(self):
                share = f"with it {self.malformed} of {len(self)} records are malformed; data.max_malformed_fraction may allow more"
                raise TooManyMalformedError(error.field, error.value, f"{error.fix}; {share}") from None
            if new and self.malformed <= _NAMED:
                logger.warning("left out: %s", error)
            return ""

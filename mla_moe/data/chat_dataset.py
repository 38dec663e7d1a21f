"""Examples of chat data with random access: what the data of SFT and of DPO have in common."""

import abc
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from mla_moe.config import ConfigError
from mla_moe.data.chat_encoding import ChatRecords
from mla_moe.data.frozen_files import fingerprint
from mla_moe.data.packing import Batch, packed_sequences_per_epoch
from mla_moe.data.token_store import TokenStore


class ChatDataset(Sequence[Batch]):
    """The usable examples of `records`, all encoded once at the start: a subclass puts them into `_tokens`. A pair of
    preferences is one example, of which each side has half a sequence."""

    def __init__(self, records: ChatRecords):
        self.files, self.malformed, self.formats = records.files, records.malformed, records.formats
        self._tokens, self._sample = TokenStore(), records.sample
        self.prompts_too_long = 0
        """Examples skipped because what is trained on begins after the end of the sequence."""
        self.truncated = 0
        """Examples that are truncated at the end of the sequence, or skipped for it."""

    def _require_examples(self, records: ChatRecords, length: int) -> None:
        """Raise `ConfigError` if all examples are skipped; `length` is the most tokens of one."""
        if not self._tokens:
            fix = f"has no usable example; {self.prompts_too_long} prompts are too long for {length} tokens"
            raise ConfigError(records.field, tuple(records.patterns), fix)

    @property
    @abc.abstractmethod
    def lengths(self) -> Int[np.ndarray, "N"]:
        """Tokens of each example."""

    @property
    def trained_tokens(self) -> int:
        """Tokens with a loss."""
        return self._tokens.trained

    @property
    def fingerprint(self) -> int:
        """Identifies the files, to detect other data on resume."""
        return fingerprint([self])

    def sample(self) -> list[str]:
        """The texts of about a thousand records."""
        return self._sample

    def steps(self, epochs: float, batch_size: int, length: int) -> int:
        """Steps of `batch_size` packed sequences in which every example is seen about `epochs` times."""
        per_epoch = packed_sequences_per_epoch(self.lengths.tolist(), length)
        return max(1, round(epochs * per_epoch / batch_size))

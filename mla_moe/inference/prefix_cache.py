"""Prefix cache: which tokens each sequence slot's KV cache holds, so that prefill starts after a shared prefix."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

NOT_CACHED = -1
MIN_SHARED_PREFIX = 32
"""Prefill of a shorter shared prefix is cheaper than a copy of it."""


class PrefixCopy(NamedTuple):
    """The first `length` entries of slot `source`, to be copied to slot `target`."""

    source: int
    target: int
    length: int


class PrefixCache:
    """The cached tokens of every slot, and the adapter that their entries were computed with, on the host.

    A slot keeps its entries when its request has finished. Another request takes the free slot with the longest prefix
    of its prompt, or else the least recently used one. Entries are shared between requests of the same adapter only.
    """

    def __init__(self, max_num_seqs: int, capacity: int):
        self._token_BS = np.full((max_num_seqs, capacity), NOT_CACHED, np.int32)
        self._last_used_B, self._adapter_B = np.zeros((2, max_num_seqs), np.int64)

    def clear(self) -> None:
        """Forget all entries: they were computed with other weights."""
        self._token_BS[:], self._last_used_B[:] = NOT_CACHED, 0

    def shared_prefix(self, tokens: np.ndarray, adapter: int = 0) -> Int[np.ndarray, "B"]:
        """How many of the first `tokens` each slot holds, of this adapter."""
        if not len(tokens):
            return np.zeros_like(self._last_used_B)
        differs_BT = (self._token_BS[:, : len(tokens)] != tokens) | (self._adapter_B != adapter)[:, None]
        return np.where(differs_BT.any(axis=1), differs_BT.argmax(axis=1), len(tokens))

    def allocate(self, tokens: np.ndarray, free_slots: Sequence[int], adapter: int = 0) -> int:
        """The free slot for a prompt with these `tokens`, marked as the most recently used."""
        shared_B, last_used_B = self.shared_prefix(tokens, adapter), self._last_used_B
        slot = max(free_slots, key=lambda slot: (shared_B[slot], -last_used_B[slot]))
        if shared_B[slot] < MIN_SHARED_PREFIX:
            slot = min(free_slots, key=lambda slot: last_used_B[slot])
        last_used_B[slot] = last_used_B.max() + 1
        if self._adapter_B[slot] != adapter:
            self._adapter_B[slot] = adapter
            self.write(slot, 0, [])
        return slot

    def copy_longer_prefix(self, tokens: np.ndarray, slot: int) -> PrefixCopy | None:
        """Copy the longest shared prefix of any slot, if it is longer than what `slot` holds and worth a copy."""
        shared_B = self.shared_prefix(tokens, int(self._adapter_B[slot]))
        source, length = int(shared_B.argmax()), int(shared_B.max())
        longer = length > shared_B[slot] and length >= MIN_SHARED_PREFIX
        return self.copy(source, slot, length) if longer else None

    def copy(self, source: int, target: int, length: int) -> PrefixCopy:
        """Note that `target` holds the first `length` tokens of `source` alone. The caller copies the entries."""
        self.write(target, 0, self._token_BS[source, :length].copy())
        return PrefixCopy(source, target, length)

    def write(self, slot: int, start: int, tokens: Sequence[int] | np.ndarray) -> None:
        """Note that a slot holds `tokens` from position `start` on, and no token after them."""
        self._token_BS[slot, start : start + len(tokens)] = tokens
        self._token_BS[slot, start + len(tokens) :] = NOT_CACHED

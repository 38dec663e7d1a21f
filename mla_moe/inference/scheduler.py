"""Scheduler of continuous batching: which requests get a sequence slot, and which prefill chunks run in a step.

All of a prompt but its last token is prefilled; the last token is the first input of decoding. A waiting request gets a
slot as soon as one is free. A prompt of which a slot still holds a prefix is prefilled after that prefix only, and
requests with the same prompt share one prefill. Only host state is changed here.
"""

from collections import deque
from typing import NamedTuple

import numpy as np

from mla_moe.inference.input_batch import InputBatch, PrefillBatch
from mla_moe.inference.prefix_cache import PrefixCache, PrefixCopy
from mla_moe.inference.request import Completion

PREFILL_CHUNK_SIZES = (16, 64, 256)
"""Token counts that prefill chunks are padded to: each is compiled for one chunk and for `PREFILL_BATCH` of them."""
PREFILL_BATCH = 8
MAX_PREFILL_TOKENS = 4096
"""Budget of prefill tokens per step, so that long prompts do not delay the decoding of running requests."""


class ScheduledPrefill(NamedTuple):
    """One call of the compiled prefill, and how many tokens each of its chunks has without padding."""

    batch: PrefillBatch
    lengths: list[int]


class SchedulerOutput(NamedTuple):
    """The work of one step before decoding, in this order."""

    prefix_copies: list[PrefixCopy]
    """For requests that were admitted in this step."""
    prefills: list[ScheduledPrefill]
    prompt_copies: list[PrefixCopy]
    """For requests whose prompt another request has prefilled."""


class _Prefill(NamedTuple):
    """A request that has a slot and is not yet decoding. `tokens` is its prompt but the last token."""

    completion: Completion
    tokens: np.ndarray
    slot: int


class Scheduler:
    """Assigns waiting requests to sequence slots, and keeps the batch that decodes."""

    def __init__(self, max_num_seqs: int, cache_capacity: int, prefix_cache: PrefixCache):
        self.batch = InputBatch(max_num_seqs)
        self.waiting: deque[Completion] = deque()
        self.running: list[Completion | None] = [None] * max_num_seqs
        """The request of every slot."""
        self._cache_capacity, self._prefix_cache = cache_capacity, prefix_cache
        self._prefilling: list[_Prefill] = []
        self._duplicates: list[_Prefill] = []  # wait until another request has prefilled the same prompt

    @property
    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting or self._prefilling or self._duplicates or self.batch.active_B.any())

    def abort(self, completion: Completion) -> None:
        """Remove a request, waiting or running; its slot is free for the next step."""
        if completion in self.waiting:
            self.waiting.remove(completion)
        self._prefilling = [p for p in self._prefilling if p.completion is not completion]
        self._duplicates = [p for p in self._duplicates if p.completion is not completion]
        if completion in self.running:
            self.free(self.running.index(completion))

    def free(self, slot: int) -> None:
        self.running[slot] = None
        self.batch.remove(slot)

    def schedule(self) -> SchedulerOutput:
        """Plan one step. The prefix cache and the batch are then as they will be after this work."""
        prefix_copies = self._admit()
        prefills, budget = [], MAX_PREFILL_TOKENS
        while self._prefilling and budget > 0:
            prefills.append(self._next_prefill())
            budget -= prefills[-1].batch.tokens_bT.size  # padding included
        return SchedulerOutput(prefix_copies, prefills, self._share_prompts())

    def _admit(self) -> list[PrefixCopy]:
        """Give free slots to waiting requests, first come, first served."""
        copies = []
        while self.waiting and None in self.running:
            completion = self.waiting.popleft()
            tokens = np.asarray(completion.request.prompt[:-1], np.int32)
            slot = self._prefix_cache.allocate(tokens, [s for s, other in enumerate(self.running) if other is None])
            self.running[slot] = completion
            prefill = _Prefill(completion, tokens, slot)
            if any(np.array_equal(other.tokens, tokens) for other in self._prefilling):
                self._duplicates.append(prefill)
                continue
            copy = self._prefix_cache.copy_longer_prefix(tokens, slot)
            if copy is not None:
                copies.append(copy)
            if self._num_cached_tokens(prefill) == len(tokens):
                self._start_decoding(prefill)
            else:
                self._prefilling.append(prefill)
        return copies

    def _num_cached_tokens(self, prefill: _Prefill) -> int:
        return int(self._prefix_cache.shared_prefix(prefill.tokens)[prefill.slot])

    def _next_prefill(self) -> ScheduledPrefill:
        """The next chunk of the first few prompts."""
        prefills = self._prefilling[:PREFILL_BATCH]
        starts = [self._num_cached_tokens(prefill) for prefill in prefills]
        longest = max(len(p.tokens) - start for p, start in zip(prefills, starts, strict=True))
        size = next((size for size in PREFILL_CHUNK_SIZES if size >= longest), PREFILL_CHUNK_SIZES[-1])
        size = min(size, self._cache_capacity)
        batch_size = 1 if len(prefills) == 1 else PREFILL_BATCH
        tokens_bT, next_bT = np.zeros((2, batch_size, size), np.int32)
        start_b, slots_b = np.zeros((2, batch_size), np.int32)
        for row in range(batch_size):
            # Padding repeats the first chunk: the same entries written twice change nothing.
            prefill, start = (prefills[row], starts[row]) if row < len(prefills) else (prefills[0], starts[0])
            # At the end of the cache a chunk starts early enough to fit, and some tokens are prefilled twice.
            start_b[row], slots_b[row] = min(start, self._cache_capacity - size), prefill.slot
            tokens = prefill.completion.request.prompt[start_b[row] :][: size + 1]
            tokens_bT[row, : len(tokens) - 1], next_bT[row, : len(tokens) - 1] = tokens[:-1], tokens[1:]
        lengths = []
        for prefill, start in zip(prefills, start_b.tolist(), strict=False):
            tokens = prefill.tokens[start:][:size]
            lengths.append(len(tokens))
            self._prefix_cache.write(prefill.slot, start, tokens)
            if start + len(tokens) == len(prefill.tokens):
                self._prefilling.remove(prefill)
                self._start_decoding(prefill)
        return ScheduledPrefill(PrefillBatch(tokens_bT, next_bT, start_b, slots_b), lengths)

    def _share_prompts(self) -> list[PrefixCopy]:
        """Copies for duplicates whose prompt has been prefilled."""
        copies, duplicates = [], []
        for prefill in self._duplicates:
            shared_B = self._prefix_cache.shared_prefix(prefill.tokens)
            source, length = int(shared_B.argmax()), len(prefill.tokens)
            if shared_B[source] < length:
                duplicates.append(prefill)
                continue
            if source != prefill.slot:
                copies.append(self._prefix_cache.copy(source, prefill.slot, length))
            self._start_decoding(prefill)
        if duplicates and not self._prefilling:  # the request that prefilled it was aborted
            self._prefilling, duplicates = [duplicates[0]], duplicates[1:]
        self._duplicates = duplicates
        return copies

    def _start_decoding(self, prefill: _Prefill) -> None:
        self._prefix_cache.write(prefill.slot, len(prefill.tokens), [])
        self.batch.add(prefill.slot, prefill.completion.request)

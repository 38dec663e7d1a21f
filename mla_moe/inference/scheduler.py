"""Scheduler of continuous batching: which requests get a sequence slot, and which prefill chunks run in a step
(chunked prefill).

All of a prompt but its last token is prefilled; the last token is the first input of decoding. A waiting request gets a
slot as soon as one is free. A prompt of which a slot still holds a prefix is prefilled after that prefix only, and
requests with the same prompt share one prefill. Only host state is changed here.

Slots are shared fairly between clients (`fair_queue`): if none is free, a request of a client that has at least two
more than the next one is preempted. It waits with its tokens, and resumes with a prefill of prompt and tokens.
"""

from typing import NamedTuple

import numpy as np

from mla_moe.inference.decode import add_request, empty_batch
from mla_moe.inference.fair_queue import FairQueue, RunningCounts
from mla_moe.inference.prefix_cache import PrefixCache, PrefixCopy
from mla_moe.inference.programs import PrefillBatch
from mla_moe.inference.request import Completion

PREFILL_CHUNK_SIZES = (16, 64, 256)
"""Token counts that prefill chunks are padded to: each is compiled for one chunk and for `PREFILL_BATCH` of them."""
PREFILL_BATCH = 8
MAX_PREFILL_TOKENS = 4096
"""Budget of prefill tokens per step, so that long prompts do not delay the decoding of running requests."""


class _Prefill(NamedTuple):
    """A request that has a slot and is not yet decoding. `inputs` is its prompt and, if it was preempted, the tokens
    generated before."""

    completion: Completion
    inputs: np.ndarray
    slot: int

    @property
    def tokens(self) -> np.ndarray:
        """What is prefilled: all inputs but the last."""
        return self.inputs[:-1]

    @property
    def adapter(self) -> int:
        return self.completion.request.adapter


class Scheduler:
    """Assigns waiting requests to sequence slots, and keeps the batch that decodes."""

    def __init__(self, max_num_seqs: int, cache_capacity: int, prefix_cache: PrefixCache):
        self.batch = empty_batch(max_num_seqs)
        """The state of the decode loop between steps."""
        self.waiting = FairQueue()
        self.running: list[Completion | None] = [None] * max_num_seqs
        """The request of every slot."""
        self.num_preemptions = 0
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
        self.batch.active_B[slot] = False

    def schedule(self) -> list[PrefixCopy | PrefillBatch]:
        """Plan the work of one step before decoding: copies for admitted requests, prefills, and copies of prompts that
        another request has prefilled. The prefix cache and the batch are then as they will be after this work."""
        work: list[PrefixCopy | PrefillBatch] = [*self._admit()]
        budget = MAX_PREFILL_TOKENS
        while self._prefilling and budget > 0:
            batch = self._next_prefill()
            work.append(batch)
            budget -= batch.tokens_bT.size  # padding included
        return work + self._share_prompts()

    def _admit(self) -> list[PrefixCopy]:
        """Give slots that are free, or another client's surplus, to waiting requests in the fair order."""
        copies = []
        while self.waiting:
            counts = RunningCounts(self.running)
            heads = self.waiting.heads(counts)
            completion = next((c for c in heads if None in self.running or self._preempt(c, counts)), None)
            if completion is None:
                break
            self.waiting.remove(completion)
            inputs = np.asarray([*completion.request.prompt, *completion.tokens], np.int32)
            tokens = inputs[:-1]
            free = [slot for slot, other in enumerate(self.running) if other is None]
            slot = self._prefix_cache.allocate(tokens, free, completion.request.adapter)
            self.running[slot] = completion
            prefill = _Prefill(completion, inputs, slot)
            if completion.needs_prompt_logprobs:
                self._prefix_cache.write(slot, 0, [])  # entries without log-probabilities are of no use
                self._start(prefill)
                continue
            same_adapter = (other for other in self._prefilling if other.adapter == prefill.adapter)
            if any(np.array_equal(other.tokens, tokens) for other in same_adapter):
                self._duplicates.append(prefill)
                continue
            copy = self._prefix_cache.copy_longer_prefix(tokens, slot)
            if copy is not None:
                copies.append(copy)
            self._start(prefill)
        return copies

    def _start(self, prefill: _Prefill) -> None:
        """Prefill what is not cached, or decode if all is."""
        if self._num_cached_tokens(prefill) == len(prefill.tokens):
            self._start_decoding(prefill)
        else:
            self._prefilling.append(prefill)

    def _preempt(self, completion: Completion, counts: RunningCounts) -> bool:
        """Free a slot for `completion`, if another client or group that decodes has a surplus. Of the one with the most
        slots, it takes the request with the fewest tokens, which is the cheapest to resume."""
        decoding = [(slot, other) for slot, other in enumerate(self.running) if other and self.batch.active_B[slot]]
        surplus = [(slot, other) for slot, other in decoding if counts.exceeds(other, completion)]
        if not surplus:
            return False
        slot, other = max(surplus, key=lambda item: (counts.of(item[1]), -len(item[1].tokens)))
        self.free(slot)
        self.waiting.appendleft(other)
        self.num_preemptions += 1
        return True

    def _num_cached_tokens(self, prefill: _Prefill) -> int:
        return int(self._prefix_cache.shared_prefix(prefill.tokens, prefill.adapter)[prefill.slot])

    def _next_prefill(self) -> PrefillBatch:
        """The next chunk of the first few prompts."""
        prefills = self._prefilling[:PREFILL_BATCH]
        starts = [self._num_cached_tokens(prefill) for prefill in prefills]
        longest = max(len(p.tokens) - start for p, start in zip(prefills, starts, strict=True))
        size = next((size for size in PREFILL_CHUNK_SIZES if size >= longest), PREFILL_CHUNK_SIZES[-1])
        size = min(size, self._cache_capacity)
        batch_size = 1 if len(prefills) == 1 else PREFILL_BATCH
        tokens_bT, next_bT = np.zeros((2, batch_size, size), np.int32)
        start_b, slots_b, adapter_b = np.zeros((3, batch_size), np.int32)
        for row in range(batch_size):
            # Padding repeats the first chunk: the same entries written twice change nothing.
            prefill, start = (prefills[row], starts[row]) if row < len(prefills) else (prefills[0], starts[0])
            # At the end of the cache a chunk starts early enough to fit, and some tokens are prefilled twice.
            start_b[row], slots_b[row] = min(start, self._cache_capacity - size), prefill.slot
            adapter_b[row] = prefill.adapter
            tokens = prefill.inputs[start_b[row] :][: size + 1]
            tokens_bT[row, : len(tokens) - 1], next_bT[row, : len(tokens) - 1] = tokens[:-1], tokens[1:]
        for prefill, start in zip(prefills, start_b.tolist(), strict=False):
            self._prefix_cache.write(prefill.slot, start, prefill.tokens[start:][:size])
            if start + size >= len(prefill.tokens):
                self._prefilling.remove(prefill)
                self._start_decoding(prefill)
        return PrefillBatch(tokens_bT, next_bT, start_b, slots_b, adapter_b)

    def _share_prompts(self) -> list[PrefixCopy]:
        """Copies for duplicates whose prompt has been prefilled."""
        copies, duplicates = [], []
        for prefill in self._duplicates:
            shared_B = self._prefix_cache.shared_prefix(prefill.tokens, prefill.adapter)
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
        add_request(self.batch, prefill.slot, prefill.completion)

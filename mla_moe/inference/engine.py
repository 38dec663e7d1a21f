"""Continuous batching: requests of any length join a running batch as slots come free, and leave when they are done.

    engine = Engine(model, slots=8, capacity=1024)
    completion = engine.submit(Request(prompt, max_new_tokens=64))
    while not completion.finish:
        engine.step()

All of a prompt but its last token is prefilled into the slot's cache; the decode loop reads that last token as it reads
any other. So completions of one prompt share one prefill, and a prompt that begins like what a slot still holds goes on
from there.
"""

from collections import deque
from contextlib import nullcontext
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mla_moe.config import require
from mla_moe.inference.model_runner import DECODE_STEPS, NO_TOKEN, copy_prefix, decode, empty_slots, prefill
from mla_moe.inference.request import Completion, Decode, IncrementalDetokenizer, Request
from mla_moe.inference.speculative import speculative_decode
from mla_moe.inference.weights import mesh_of, prepare_for_inference
from mla_moe.nn.kv_cache import cache_shape, cache_sharding, empty_cache, round_up_capacity
from mla_moe.nn.transformer import Transformer

PREFILL_CHUNK_SIZES = (16, 64, 256)
"""Sizes of a piece of prompt: each is compiled once for one row and once for `ROWS`."""
PREFILL_BATCH = 8
MAX_PREFILL_TOKENS = 4096
"""Tokens of prompts read between two rounds of decoding, so that long prompts do not hold up running requests."""
MIN_SHARED_PREFIX = 32
"""A shorter common beginning is cheaper to read again than to copy."""


class BatchOccupancy(NamedTuple):
    """How full the batch was, counted in slots times decode steps while requests were waiting."""

    used: int = 0
    offered: int = 0


class DraftStats(NamedTuple):
    """How many tokens the prediction module guessed, and how many of them were right."""

    made: int = 0
    right: int = 0


class _Prefill(NamedTuple):
    """A prompt on its way into a slot."""

    completion: Completion
    tokens: np.ndarray
    slot: int


class Engine:
    """A model that serves up to `slots` requests at a time, of at most `capacity` tokens each with their prompts.

    A model that lies on a mesh stays there, and the cache is split over it. `decode` (a tokenizer's) is needed for stop
    strings and gives completions their text. `record_experts` keeps which experts read which token. `tempered` gives
    log-probabilities at the requests' temperatures in place of 1. `speculative` lets the prediction module guess ahead:
    the same tokens, up to rounding, in fewer steps. `int8_cache` keeps the cache in eight bits: half of bfloat16's
    bytes, and text that is as good but not the same.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        slots: int,
        capacity: int,
        decode: Decode | None = None,
        record_experts: bool = False,
        tempered: bool = False,
        speculative: bool = False,
        int8_kv_cache: bool = False,
    ):
        require(slots > 0, "slots", slots, "must be at least 1")
        require(capacity > 1, "capacity", capacity, "must hold a prompt and a new token")
        self.cfg, self.speculative, self._tempered = model.cfg, speculative, tempered
        limit = self.cfg.max_position_embeddings
        require(capacity <= limit, "capacity", capacity, f"at most the model's max_position_embeddings = {limit}")
        fix = "needs a model with a prediction module (num_nextn_predict_layers = 1)"
        require(not speculative or self.cfg.num_nextn_predict_layers > 0, "speculative", speculative, fix)
        self._places = round_up_capacity(capacity + speculative)
        self.capacity = min(self._places - speculative, limit)  # the last place is for a guess
        self._held = np.full((slots, self._places), -1, np.int32)  # the tokens whose entries are in the cache
        self._used = np.zeros(slots, np.int64)  # when a slot was last given away
        self.load_weights(model)
        self._mesh = mesh_of(model)
        self._place = None if self._mesh is None else cache_sharding(self._mesh, slots)
        layers, dtype = self.cfg.num_hidden_layers + speculative, jnp.int8 if int8_kv_cache else model.precision.compute
        shape = cache_shape(self.cfg, slots, self._places, dtype, layers=layers, place=self._place)
        self._cache = empty_cache(shape)
        self._decode_text = decode
        self.waiting: deque[Completion] = deque()
        self.load, self.guesses = BatchOccupancy(), DraftStats()
        self._reading: list[_Prefill] = []
        self._followers: list[_Prefill] = []
        self._running: list[Completion | None] = [None] * slots
        self._experts = None
        if record_experts and self.cfg.num_moe_layers:
            shape = slots, self._places, self.cfg.num_moe_layers, self.cfg.num_experts_per_tok
            self._experts = np.zeros(shape, np.int16)
        self._slots = empty_slots(slots)

    def load_weights(self, model: Transformer) -> None:
        """Go on with other weights of the same model. What slots hold was read with the old ones, and is forgotten."""
        self.drop_weights()
        self._structure, self._state = prepare_for_inference(model)
        self._held[:], self._used[:] = -1, 0

    def drop_weights(self) -> None:
        """Give up their memory, until others are loaded."""
        self._state = None

    @property
    def slots(self) -> int:
        return len(self._running)

    @property
    def running(self) -> int:
        """Slots that a request has."""
        return self.slots - self._running.count(None)

    @property
    def busy(self) -> bool:
        """Whether any request is not yet done."""
        return bool(self.waiting or self._reading or self._followers or self._slots.live_B.any())

    def submit(self, request: Request) -> Completion:
        """Queue a request. Raises `ConfigError` if it cannot fit, or names tokens that the model does not have."""
        completion = self.check(request)
        self.waiting.append(completion)
        return completion

    def check(self, request: Request) -> Completion:
        """What `submit` would queue. Changes nothing, so any thread may ask."""
        total = len(request.prompt) + request.max_new_tokens
        fix = f"must fit the engine's capacity of {self.capacity} tokens with max_new_tokens = {request.max_new_tokens}"
        require(total <= self.capacity, "len(prompt)", len(request.prompt), fix)
        wrong = [t for t in request.prompt if not 0 <= t < self.cfg.vocab_size]
        require(not wrong, "prompt", wrong[:4], f"token ids are below vocab_size = {self.cfg.vocab_size}")
        fix = "stop strings need an engine that was given a tokenizer's decode"
        require(not request.stop or self._decode_text is not None, "stop", request.stop, fix)
        text = None if self._decode_text is None else IncrementalDetokenizer(self._decode_text, request.stop)
        return Completion(request, text=text)

    def cancel(self, completion: Completion) -> None:
        """Give up a request, wherever it is; its slot is free for the next step."""
        if completion.finish is None:
            completion.finish = "cancelled"
        if completion in self.waiting:
            self.waiting.remove(completion)
        self._reading = [r for r in self._reading if r.completion is not completion]
        self._followers = [r for r in self._followers if r.completion is not completion]
        if completion in self._running:
            self._free(self._running.index(completion))

    def step(self) -> list[Completion]:
        """Let waiting requests in, read some of their prompts, and make up to `STEPS` tokens for every live slot.

        Returns the completions that got tokens.
        """
        with jax.set_mesh(self._mesh) if self._mesh else nullcontext():
            self._admit()
            budget = MAX_PREFILL_TOKENS
            while self._reading and budget > 0:
                budget -= self._read()
            self._follow()
            return self._make() if self._slots.live_B.any() else []

    def _admit(self) -> None:
        while self.waiting and None in self._running:
            completion = self.waiting.popleft()
            tokens = np.asarray(completion.request.prompt[:-1], np.int32)
            free = [slot for slot, running in enumerate(self._running) if running is None]
            common = self._common(tokens)
            slot = max(free, key=lambda slot: (common[slot], -self._used[slot]))
            if common[slot] < MIN_SHARED_PREFIX:
                slot = min(free, key=lambda slot: self._used[slot])
            self._running[slot] = completion
            self._used[slot] = self._used.max() + 1
            reading = _Prefill(completion, tokens, slot)
            if any(len(r.tokens) == len(tokens) and (r.tokens == tokens).all() for r in self._reading):
                self._followers.append(reading)
                continue
            if common.max() > common[slot]:
                self._copy(int(common.argmax()), slot, int(common.max()))
            if self._common(tokens)[slot] == len(tokens):
                self._start(reading)
            else:
                self._reading.append(reading)

    def _common(self, tokens: np.ndarray) -> np.ndarray:
        """How many of the first `tokens` each slot holds."""
        differ = self._held[:, : len(tokens)] != tokens
        return np.where(differ.any(axis=1), differ.argmax(axis=1), len(tokens)) if len(tokens) else self._used * 0

    def _copy(self, source: int, slot: int, length: int) -> None:
        """Start a slot with what another holds, if that is worth it; else from what it has itself."""
        if length >= MIN_SHARED_PREFIX:
            self._cache = copy_prefix(self._cache, source, slot, length, place=self._place)
            self._held[slot] = -1
            self._held[slot, :length] = self._held[source, :length]
            if self._experts is not None:
                self._experts[slot, :length] = self._experts[source, :length]

    def _read(self) -> int:
        """One call of prefill, for requests at the head of the line: the tokens that it read, padding included."""
        batch, starts = [], []
        for reading in self._reading[:PREFILL_BATCH]:
            start = int(self._common(reading.tokens)[reading.slot])
            batch, starts = [*batch, reading], [*starts, start]
        left = max(len(r.tokens) - s for r, s in zip(batch, starts, strict=True))
        size = min(next((p for p in PREFILL_CHUNK_SIZES if p >= left), PREFILL_CHUNK_SIZES[-1]), self._places)
        rows = 1 if len(batch) == 1 else PREFILL_BATCH
        tokens_bT, next_bT = np.zeros((2, rows, size), np.int32)
        start_b, slot_b = np.zeros((2, rows), np.int32)
        for row in range(rows):
            # Rows without a request repeat the first: writing the same entries twice changes nothing.
            reading, start = (batch[row], starts[row]) if row < len(batch) else (batch[0], starts[0])
            # At the end of the cache a piece begins early enough to fit, and reads some tokens again.
            start_b[row], slot_b[row] = min(start, self._places - size), reading.slot
            piece = reading.completion.request.prompt[start_b[row] :][: size + 1]
            tokens_bT[row, : len(piece) - 1], next_bT[row, : len(piece) - 1] = piece[:-1], piece[1:]
        self._cache, experts = prefill(
            self._structure, self._state, self._cache, tokens_bT, next_bT, start_b, slot_b,
            guess=self.speculative, record=self._experts is not None, place=self._place,
        )  # fmt: skip
        experts = None if experts is None else np.asarray(experts)
        for row, reading in enumerate(batch):
            slot, start = reading.slot, start_b[row]
            piece = reading.tokens[start:][:size]
            self._held[slot, start : start + len(piece)] = piece
            self._held[slot, start + len(piece) :] = -1
            if self._experts is not None and experts is not None:
                self._experts[slot, start : start + len(piece)] = np.moveaxis(experts[:, row, : len(piece)], 0, 1)
            if start + len(piece) == len(reading.tokens):
                self._reading.remove(reading)
                self._start(reading)
        return rows * size

    def _follow(self) -> None:
        """Requests whose prompt has been read for another."""
        waiting = []
        for reading in self._followers:
            common = self._common(reading.tokens)
            if common.max(initial=0) < len(reading.tokens):
                waiting.append(reading)
                continue
            source = int(common.argmax())
            if source != reading.slot:
                self._cache = copy_prefix(self._cache, source, reading.slot, len(reading.tokens), place=self._place)
                self._held[reading.slot] = -1
                self._held[reading.slot, : len(reading.tokens)] = reading.tokens
                if self._experts is not None:
                    self._experts[reading.slot] = self._experts[source]
            self._start(reading)
        if waiting and not self._reading:  # the one that read it has gone: read it again
            self._reading, waiting = [waiting[0]], waiting[1:]
        self._followers = waiting

    def _start(self, reading: _Prefill) -> None:
        """The prompt is in the cache up to its last token: decode."""
        request, slot, now = reading.completion.request, reading.slot, self._slots
        self._held[slot, len(reading.tokens) :] = -1
        now.token_B[slot], now.position_B[slot] = request.prompt[-1], len(reading.tokens)
        now.live_B[slot], now.left_B[slot], now.number_B[slot] = True, request.max_new_tokens, 0
        now.stop_BJ[slot] = now.guess_B[slot] = NO_TOKEN
        now.stop_BJ[slot, : len(request.stop_ids)] = request.stop_ids
        settings = now.settings
        settings.temperature_B[slot], settings.top_k_B[slot] = request.temperature, request.top_k
        settings.top_p_B[slot], settings.min_p_B[slot] = request.top_p, request.min_p
        key = jax.random.fold_in(jax.random.key(request.seed), request.number)
        settings.key_B2[slot] = np.asarray(jax.random.key_data(key))

    def _make(self) -> list[Completion]:
        before = self._slots
        queue = bool(self.waiting)
        self._cache, slots, made, taken = (speculative_decode if self.speculative else decode)(
            self._structure, self._state, self._cache, before, np.int32(DECODE_STEPS), queue,
            record=self._experts is not None, tempered=self._tempered, place=self._place,
        )  # fmt: skip
        slots, made, taken = jax.device_get((slots, made, taken))
        if queue:
            used, offered = self.load
            lives = made.live_iB[:: 1 + self.speculative]
            self.load = BatchOccupancy(used + int(lives.sum()), offered + int(taken) * len(self._running))
        if self.speculative:
            made_before, right = self.guesses
            both = made.live_iB.reshape(-1, 2, len(self._running)).sum(axis=(0, 2))
            self.guesses = DraftStats(made_before + int(both[0]), right + int(both[1]))
        self._slots = jax.tree.map(np.array, slots)
        changed = []
        for slot in np.flatnonzero(before.live_B).tolist():
            completion = self._running[slot]
            counts, start = made.live_iB[:, slot], int(before.position_B[slot])
            tokens = made.token_iB[counts, slot]
            place = slice(start, start + len(tokens))
            self._held[slot, place] = [before.token_B[slot], *tokens[:-1]]
            if self._experts is not None:
                self._experts[slot, place] = made.experts_ilBK[counts, :, slot]
            completion.take(tokens.tolist(), made.logprob_iB[counts, slot].tolist())
            if completion.finish:
                if self._experts is not None:
                    read = len(completion.request.prompt) + len(completion.tokens) - 1
                    completion.experts_TlK = self._experts[slot, :read].copy()
                self._free(slot)
            changed.append(completion)
        return changed

    def _free(self, slot: int) -> None:
        self._running[slot] = None
        self._slots.live_B[slot] = False

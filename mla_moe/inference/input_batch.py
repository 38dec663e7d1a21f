"""Inputs of the compiled programs: the batch of sequence slots that decodes, and a batch of prefill chunks."""

from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Int

from mla_moe.inference.request import MAX_STOPS, Request
from mla_moe.inference.sampling import AnyArray, SamplingParams

NO_TOKEN = -1


class PrefillBatch(NamedTuple):
    """Prefill chunks of `b` prompts, padded to `T` tokens."""

    tokens_bT: Int[AnyArray, "b T"]
    next_bT: Int[AnyArray, "b T"]
    """The token after each, which the MTP module reads too."""
    start_b: Int[AnyArray, "b"]
    """Position of a chunk's first token."""
    slots_b: Int[AnyArray, "b"]


class DecodeState(NamedTuple):
    """State of every sequence slot, which the decode loop reads and returns updated."""

    token_B: Int[AnyArray, "B"]
    """The next input token."""
    position_B: Int[AnyArray, "B"]
    """Its position."""
    active_B: Bool[AnyArray, "B"]
    remaining_B: Int[AnyArray, "B"]
    """Tokens left until `max_new_tokens`."""
    generated_B: Int[AnyArray, "B"]
    """Tokens generated so far."""
    stop_BJ: Int[AnyArray, "B J"]
    """Stop tokens, padded with `NO_TOKEN`."""
    draft_B: Int[AnyArray, "B"]
    """Draft of the MTP module for the token after `token_B`, or `NO_TOKEN`."""
    sampling: SamplingParams


class InputBatch:
    """The decode state on the host, changed between steps when requests join and leave the batch."""

    def __init__(self, max_num_seqs: int):
        B = max_num_seqs
        self.token_B, self.position_B = np.zeros(B, np.int32), np.zeros(B, np.int32)
        self.active_B = np.zeros(B, bool)
        self.remaining_B, self.generated_B = np.zeros(B, np.int32), np.zeros(B, np.int32)
        self.stop_BJ = np.full((B, MAX_STOPS), NO_TOKEN, np.int32)
        self.draft_B = np.full(B, NO_TOKEN, np.int32)
        self.temperature_B, self.top_k_B = np.zeros(B, np.float32), np.zeros(B, np.int32)
        self.top_p_B, self.min_p_B = np.ones(B, np.float32), np.zeros(B, np.float32)
        self.key_B2 = np.zeros((B, 2), np.uint32)

    def add(self, slot: int, request: Request) -> None:
        """Start decoding in a slot whose cache holds the prompt but its last token, the first input of decoding."""
        self.token_B[slot], self.position_B[slot] = request.prompt[-1], len(request.prompt) - 1
        self.active_B[slot], self.remaining_B[slot], self.generated_B[slot] = True, request.max_new_tokens, 0
        self.stop_BJ[slot] = self.draft_B[slot] = NO_TOKEN
        self.stop_BJ[slot, : len(request.stop_ids)] = request.stop_ids
        self.temperature_B[slot], self.top_k_B[slot] = request.temperature, request.top_k
        self.top_p_B[slot], self.min_p_B[slot] = request.top_p, request.min_p
        key = jax.random.fold_in(jax.random.key(request.seed), request.sample_index)
        self.key_B2[slot] = np.asarray(jax.random.key_data(key))

    def remove(self, slot: int) -> None:
        self.active_B[slot] = False

    def decode_state(self) -> DecodeState:
        """The arrays themselves: change them only while no program that reads them runs."""
        sampling = SamplingParams(self.temperature_B, self.top_k_B, self.top_p_B, self.min_p_B, self.key_B2)
        return DecodeState(
            self.token_B, self.position_B, self.active_B, self.remaining_B, self.generated_B, self.stop_BJ,
            self.draft_B, sampling,
        )  # fmt: skip

    def update(self, state: DecodeState) -> None:
        """Take over what a decode loop has changed, as new arrays: an earlier `decode_state` keeps its values."""
        self.token_B, self.position_B = np.array(state.token_B), np.array(state.position_B)
        self.active_B, self.remaining_B = np.array(state.active_B), np.array(state.remaining_B)
        self.generated_B, self.draft_B = np.array(state.generated_B), np.array(state.draft_B)

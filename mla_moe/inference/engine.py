"""Engine: continuous batching, in which requests join a running batch as sequence slots become free.

    engine = Engine(model, max_num_seqs=8, max_model_len=1024)
    completion = engine.submit(Request(prompt, max_new_tokens=64))
    while not completion.finish_reason:
        engine.step()

A step schedules (`scheduler`, `prefix_cache`), runs compiled programs (`model_runner`), and updates the completions.
"""

from contextlib import nullcontext
from typing import NamedTuple

import jax
import numpy as np

from mla_moe.config import require
from mla_moe.inference.decode import DecodeOutput
from mla_moe.inference.input_batch import DecodeState
from mla_moe.inference.model_runner import ModelRunner
from mla_moe.inference.prefix_cache import PrefixCache, PrefixCopy
from mla_moe.inference.request import Completion, IncrementalDetokenizer, Request
from mla_moe.inference.scheduler import Scheduler
from mla_moe.nn.kv_cache import round_up_capacity
from mla_moe.nn.transformer import Transformer
from mla_moe.text.tokenizer import Decode


class BatchOccupancy(NamedTuple):
    """Utilization of the batch while requests were waiting, in sequence slots times decode steps."""

    used: int = 0
    available: int = 0


class DraftStats(NamedTuple):
    """Draft tokens of speculative decoding, and how many of them were accepted."""

    proposed: int = 0
    accepted: int = 0

    @property
    def acceptance_rate(self) -> float:
        return self.accepted / max(self.proposed, 1)


class Engine:
    """Runs up to `max_num_seqs` requests at a time, of at most `max_model_len` tokens each, prompt included.

    A model on a mesh stays there, and the KV cache is sharded over the mesh. `decode` (a tokenizer's) is needed for
    stop strings and gives completions their text. `record_experts` records the routed experts of every token.
    `temperature_scaled_logprobs` gives log-probabilities at the requests' temperatures instead of 1. `speculative` is
    speculative decoding with draft tokens of the MTP module: the same tokens, up to rounding, in fewer steps.
    `int8_kv_cache` stores the KV cache in 8 bits: half of bfloat16's bytes, and text of equal quality but not the same.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        max_num_seqs: int,
        max_model_len: int,
        decode: Decode | None = None,
        record_experts: bool = False,
        temperature_scaled_logprobs: bool = False,
        speculative: bool = False,
        int8_kv_cache: bool = False,
    ):
        cfg = self.cfg = model.cfg
        limit = cfg.max_position_embeddings
        require(max_num_seqs > 0, "max_num_seqs", max_num_seqs, "must be at least 1")
        require(max_model_len > 1, "max_model_len", max_model_len, "must hold a prompt and a new token")
        fix = f"at most the model's max_position_embeddings = {limit}"
        require(max_model_len <= limit, "max_model_len", max_model_len, fix)
        fix = "needs a model with an MTP module (num_nextn_predict_layers = 1)"
        require(not speculative or cfg.num_nextn_predict_layers > 0, "speculative", speculative, fix)
        cache_capacity = round_up_capacity(max_model_len + speculative)
        self.max_model_len = min(cache_capacity - speculative, limit)  # the last position is for a draft token
        self.max_num_seqs, self._speculative, self._detokenize = max_num_seqs, speculative, decode
        record_experts = record_experts and cfg.num_moe_layers > 0
        self.runner = ModelRunner(
            model, max_num_seqs, cache_capacity, speculative=speculative, record_experts=record_experts,
            temperature_scaled_logprobs=temperature_scaled_logprobs, int8_kv_cache=int8_kv_cache,
        )  # fmt: skip
        experts_shape = (cfg.num_moe_layers, cfg.num_experts_per_tok) if record_experts else None
        self._prefix_cache = PrefixCache(max_num_seqs, cache_capacity, experts_shape)
        self._scheduler = Scheduler(max_num_seqs, cache_capacity, self._prefix_cache)
        self.occupancy, self.draft_stats = BatchOccupancy(), DraftStats()

    def load_weights(self, model: Transformer) -> None:
        """Replace the weights by others of the same model, and clear the prefix cache of the old ones."""
        self.runner.load_weights(model)
        self._prefix_cache.clear()

    def drop_weights(self) -> None:
        """Free the weights' memory, until others are loaded."""
        self.runner.drop_weights()

    @property
    def num_running(self) -> int:
        """Sequence slots that a request has."""
        return self.max_num_seqs - self._scheduler.running.count(None)

    @property
    def has_unfinished_requests(self) -> bool:
        return self._scheduler.has_unfinished_requests

    def submit(self, request: Request) -> Completion:
        """Queue a request. Raises `ConfigError` if it does not fit, or has token ids that the model does not have."""
        completion = self.check(request)
        self.enqueue(completion)
        return completion

    def check(self, request: Request) -> Completion:
        """The completion that `submit` would queue, or its error. Changes nothing: any thread may call it."""
        total = len(request.prompt) + request.max_new_tokens
        fix = f"must fit max_model_len = {self.max_model_len} with max_new_tokens = {request.max_new_tokens}"
        require(total <= self.max_model_len, "len(prompt)", len(request.prompt), fix)
        wrong = [t for t in request.prompt if not 0 <= t < self.cfg.vocab_size]
        require(not wrong, "prompt", wrong[:4], f"token ids must be below vocab_size = {self.cfg.vocab_size}")
        fix = "stop strings need an engine with a tokenizer's decode"
        require(not request.stop or self._detokenize is not None, "stop", request.stop, fix)
        detokenizer = None if self._detokenize is None else IncrementalDetokenizer(self._detokenize, request.stop)
        return Completion(request, detokenizer=detokenizer)

    def enqueue(self, completion: Completion) -> None:
        """Queue a checked request."""
        self._scheduler.waiting.append(completion)

    def abort(self, completion: Completion) -> None:
        """Stop a request, waiting or running; its slot is free for the next step."""
        if completion.finish_reason is None:
            completion.finish_reason = "abort"
        self._scheduler.abort(completion)

    def step(self) -> list[Completion]:
        """Admit waiting requests, prefill chunks of prompts, and decode up to `DECODE_STEPS` steps.

        Returns the completions that got tokens.
        """
        mesh = self.runner.mesh
        with jax.set_mesh(mesh) if mesh else nullcontext():
            scheduled = self._scheduler.schedule()
            self._copy_prefixes(scheduled.prefix_copies)
            for batch, lengths in scheduled.prefills:
                experts_lbTK = self.runner.prefill(batch)
                if experts_lbTK is None:
                    continue
                for row, length in enumerate(lengths):
                    experts_TlK = np.moveaxis(experts_lbTK[:, row, :length], 0, 1)
                    self._prefix_cache.write_experts(batch.slots_b[row], batch.start_b[row], experts_TlK)
            self._copy_prefixes(scheduled.prompt_copies)
            state, waiting = self._scheduler.batch.decode_state(), bool(self._scheduler.waiting)
            if not state.active_B.any():
                return []
            after, output, steps = self.runner.decode(state, stop_early=waiting)
        self._scheduler.batch.update(after)
        self._count(output, steps, waiting)
        return [self._append(slot, state, output) for slot in np.flatnonzero(state.active_B).tolist()]

    def _copy_prefixes(self, copies: list[PrefixCopy]) -> None:
        for copy in copies:
            self.runner.copy_prefix(copy)
            self._prefix_cache.copy_experts(copy)

    def _count(self, output: DecodeOutput, steps: int, waiting: bool) -> None:
        first_iB, second_iB = output.valid_iB[:: 1 + self._speculative], output.valid_iB[1 :: 1 + self._speculative]
        if waiting:
            used, available = self.occupancy
            self.occupancy = BatchOccupancy(used + int(first_iB.sum()), available + steps * self.max_num_seqs)
        if self._speculative:
            proposed, accepted = self.draft_stats
            self.draft_stats = DraftStats(proposed + int(first_iB.sum()), accepted + int(second_iB.sum()))

    def _append(self, slot: int, before: DecodeState, output: DecodeOutput) -> Completion:
        """Append a slot's new tokens to its completion, and free the slot if that has finished."""
        completion = self._scheduler.running[slot]
        assert completion is not None
        valid_i, start = output.valid_iB[:, slot], int(before.position_B[slot])
        tokens = output.token_iB[valid_i, slot].tolist()
        self._prefix_cache.write(slot, start, [before.token_B[slot], *tokens[:-1]])
        if output.experts_ilBK is not None:
            self._prefix_cache.write_experts(slot, start, output.experts_ilBK[valid_i, :, slot])
        completion.append_tokens(tokens, output.logprob_iB[valid_i, slot].tolist())
        if completion.finish_reason:
            num_inputs = len(completion.request.prompt) + len(completion.tokens) - 1
            completion.experts_TlK = self._prefix_cache.experts(slot, num_inputs)
            self._scheduler.free(slot)
        return completion

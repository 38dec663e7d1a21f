"""Engine: continuous batching, in which requests join a running batch as sequence slots become free.

    engine = Engine(model, max_num_seqs=8, max_model_len=1024)
    completion = engine.submit(Request(prompt, max_new_tokens=64))
    while not completion.finish_reason:
        engine.step()

A step schedules (`scheduler`, `prefix_cache`), runs compiled `programs`, and updates the completions.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mla_moe.config import require
from mla_moe.inference.decode import DecodeOutput, DecodeState, ProgramOptions
from mla_moe.inference.prefix_cache import PrefixCache, PrefixCopy
from mla_moe.inference.programs import DECODE_STEPS, PrefillBatch, copy_prefix, decode, prefill
from mla_moe.inference.request import CONTEXT_TOKENS, Completion, IncrementalDetokenizer, Request
from mla_moe.inference.scheduler import Scheduler
from mla_moe.inference.weights import mesh_of, prepare_for_inference
from mla_moe.nn.kv_cache import round_up_capacity
from mla_moe.nn.stacked_lora import AdapterWeights
from mla_moe.nn.transformer import Transformer
from mla_moe.text.tokenizer import Decode


class BatchOccupancy(NamedTuple):
    """Utilization of the batch while requests were waiting, in sequence slots times decode steps."""

    used: int = 0
    available: int = 0


class DraftStats(NamedTuple):
    """Draft tokens of speculative decoding, and how many were accepted: their ratio is the acceptance rate."""

    proposed: int = 0
    accepted: int = 0


class Engine:
    """Runs up to `max_num_seqs` requests at a time, of at most `max_model_len` tokens each, prompt included.

    A model on a mesh stays there, and the KV cache is sharded over the mesh. `decode` (a tokenizer's) is needed for
    stop strings and gives completions their text. `record_experts` records the routed experts of every token.
    `temperature_scaled_logprobs` gives log-probabilities at the requests' temperatures instead of 1. `speculative` is
    speculative decoding with draft tokens of the MTP module: the same tokens, up to rounding, in fewer steps.
    `int8_kv_cache` stores the KV cache in 8 bits: half of bfloat16's bytes, and text of equal quality but not the same.
    `adapters` are LoRA adapters of which each request names one, by its number from 1 on; all run in the same batch.
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
        adapters: Sequence[AdapterWeights] = (),
    ):
        cfg = self.cfg = model.cfg
        limit = cfg.max_position_embeddings
        require(max_num_seqs > 0, "max_num_seqs", max_num_seqs, "must be at least 1")
        require(max_model_len > 1, "max_model_len", max_model_len, "must hold a prompt and a new token")
        fix = f"must be at most the model's max_position_embeddings = {limit}"
        require(max_model_len <= limit, "max_model_len", max_model_len, fix)
        fix = "needs a model with an MTP module (num_nextn_predict_layers = 1)"
        require(not speculative or cfg.num_nextn_predict_layers > 0, "speculative", speculative, fix)
        cache_capacity = round_up_capacity(max_model_len + speculative)
        self.max_model_len = min(cache_capacity - speculative, limit)  # the last position is for a draft token
        self.max_num_seqs, self._speculative, self._detokenize = max_num_seqs, speculative, decode
        record_experts = record_experts and cfg.num_moe_layers > 0
        self._mesh, self._adapters = mesh_of(model), adapters
        self._options = ProgramOptions(speculative, record_experts, temperature_scaled_logprobs, self._mesh)
        self.graph, self.weights = prepare_for_inference(model, adapters)
        dtype = jnp.int8 if int8_kv_cache else None
        with self._set_mesh():
            self.cache_LBSW = model.init_cache(max_num_seqs, cache_capacity, dtype, mtp=speculative).entries_LBSW
        experts_shape = (cfg.num_moe_layers, cfg.num_experts_per_tok) if record_experts else (0, 0)
        self._experts_BSlK = np.zeros((max_num_seqs, cache_capacity, *experts_shape), np.int16)
        """The routed experts of the cached tokens, if they are recorded."""
        self._prefix_cache = PrefixCache(max_num_seqs, cache_capacity)
        self._scheduler = Scheduler(max_num_seqs, cache_capacity, self._prefix_cache)
        self.occupancy, self.draft_stats = BatchOccupancy(), DraftStats()

    def _set_mesh(self) -> AbstractContextManager:
        return jax.set_mesh(self._mesh) if self._mesh else nullcontext()

    def load_weights(self, model: Transformer) -> None:
        """Replace the weights by others of the same model, and clear the prefix cache of the old ones."""
        self.drop_weights()  # before there are others
        self.graph, self.weights = prepare_for_inference(model, self._adapters)
        self._prefix_cache.clear()

    def drop_weights(self) -> None:
        """Free the weights' memory, until others are loaded."""
        self.weights = None

    @property
    def num_running(self) -> int:
        """Sequence slots that a request has."""
        return self.max_num_seqs - self._scheduler.running.count(None)

    @property
    def num_preemptions(self) -> int:
        """How often a running request has given its slot to another client's, to resume later."""
        return self._scheduler.num_preemptions

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
        fix = f"the engine has {len(self._adapters)} adapters, numbered from 1 on; 0 is none"
        require(0 <= request.adapter <= len(self._adapters), "adapter", request.adapter, fix)
        fix = "stop strings need an engine with a tokenizer's decode"
        require(not request.stop or self._detokenize is not None, "stop", request.stop, fix)
        completion = Completion(request)
        if request.prompt_logprobs:
            completion.prompt_logprobs = np.full(len(request.prompt), np.nan, np.float32)
            if request.prompt_top_k:
                fix = f"the model has {self.cfg.vocab_size} tokens"
                require(request.prompt_top_k <= self.cfg.vocab_size, "prompt_logprobs", request.prompt_top_k, fix)
                shape = len(request.prompt), request.prompt_top_k
                completion.prompt_top_ids = np.zeros(shape, np.int32)
                completion.prompt_top_logprobs = np.full(shape, np.nan, np.float32)
        if self._detokenize is not None:
            context = request.prompt[-CONTEXT_TOKENS:]
            completion.detokenizer = IncrementalDetokenizer(self._detokenize, request.stop, context)
        return completion

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
        with self._set_mesh():
            for work in self._scheduler.schedule():
                if isinstance(work, PrefixCopy):
                    self.cache_LBSW = copy_prefix(self.cache_LBSW, work)
                    self._experts_BSlK[work.target, : work.length] = self._experts_BSlK[work.source, : work.length]
                    continue
                scored = self._scored(work)
                most = max((completion.request.prompt_top_k for _, completion in scored), default=0)
                most = min(1 << (most - 1).bit_length(), self.cfg.vocab_size) if most else 0  # few programs
                inputs = self.graph, self.weights, self.cache_LBSW, work, self._options, most if scored else None
                self.cache_LBSW, recorded, logprobs = prefill(*inputs)
                found = jax.device_get(logprobs) if scored else ()
                for row, completion in scored:
                    completion.set_prompt_logprobs(int(work.start_b[row]) + 1, *(x[row] for x in found))
                if recorded is not None:
                    for slot, start, experts_TlK in zip(work.slots_b, work.start_b, np.asarray(recorded), strict=True):
                        self._experts_BSlK[slot, start : start + len(experts_TlK)] = experts_TlK
            state, waiting = self._scheduler.batch, bool(self._scheduler.waiting)
            if not state.active_B.any():
                return []
            self.cache_LBSW, *results = decode(
                self.graph, self.weights, self.cache_LBSW, state, np.int32(DECODE_STEPS), waiting, self._options
            )
            after, output, steps = jax.device_get(results)
        self._scheduler.batch = jax.tree.map(np.array, after)  # new arrays, on the host: `state` keeps its values
        self._count(output, int(steps), waiting)
        return [self._append(slot, state, output) for slot in np.flatnonzero(state.active_B).tolist()]

    def _scored(self, batch: PrefillBatch) -> list[tuple[int, Completion]]:
        """Rows of a prefill whose request wants the log-probabilities of its prompt."""
        rows = [(row, self._scheduler.running[slot]) for row, slot in enumerate(np.asarray(batch.slots_b).tolist())]
        return [(row, completion) for row, completion in rows if completion and completion.needs_prompt_logprobs]

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
        completion.append_tokens(tokens, output.logprob_iB[valid_i, slot].tolist())
        if completion.finish_reason:
            self._scheduler.free(slot)
        if output.experts_ilBK is not None:
            self._experts_BSlK[slot, start : start + len(tokens)] = output.experts_ilBK[valid_i, :, slot]
            if completion.finish_reason:
                num_inputs = len(completion.request.prompt) + len(completion.tokens) - 1
                completion.experts_TlK = self._experts_BSlK[slot, :num_inputs].copy()
        return completion

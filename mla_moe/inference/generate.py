"""Generation from a list of prompts, without handling an engine."""

from collections.abc import Sequence

from mla_moe.config import require
from mla_moe.inference.engine import Engine
from mla_moe.inference.request import Completion, Request, are_integers
from mla_moe.nn.transformer import Transformer

MAX_NUM_SEQS = 32


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_id: int | None = None,
) -> list[list[int]]:
    """New tokens of each prompt, up to and without `eos_id`. Temperature 0 is greedy decoding.

    A prompt's result does not depend on the other prompts, up to rounding. Raises `ConfigError`, a `ValueError`, for a
    prompt that is empty or not a list of integers, and for a setting out of range. `Engine` has more settings,
    log-probabilities, and requests that join and leave a running batch.
    """
    require(len(prompts) > 0, "prompts", [], "give at least one")
    require(eos_id is None or are_integers([eos_id]), "eos_id", eos_id, "must be one token id, or None")
    stop_ids = () if eos_id is None else (eos_id,)
    requests = [
        Request(prompt, max_new_tokens, temperature, top_p=top_p, seed=seed, sample_index=index, stop_ids=stop_ids)
        for index, prompt in enumerate(prompts)
    ]
    return [c.tokens[:-1] if c.tokens[-1] == eos_id else c.tokens for c in complete(model, requests)]


def complete(model: Transformer, requests: Sequence[Request]) -> list[Completion]:
    """Completions of at least one request, all of which run to their end. Raises `ConfigError` if the model has fewer
    positions than they need."""
    max_num_seqs = min(1 << (len(requests) - 1).bit_length(), MAX_NUM_SEQS)
    engine = Engine(model, max_num_seqs=max_num_seqs, max_model_len=required_length(model, requests))
    completions = [engine.submit(request) for request in requests]
    while engine.has_unfinished_requests:
        engine.step()
    return completions


def required_length(model: Transformer, requests: Sequence[Request]) -> int:
    """The `max_model_len` that these requests need. Raises `ConfigError` if the model has fewer positions."""
    longest = max(requests, key=lambda request: len(request.prompt) + request.max_new_tokens)
    length, limit = len(longest.prompt) + longest.max_new_tokens, model.cfg.max_position_embeddings
    fix = f"with {len(longest.prompt)} prompt tokens more than the model's {limit} positions; generate fewer"
    require(length <= limit, "max_new_tokens", longest.max_new_tokens, fix)
    return length

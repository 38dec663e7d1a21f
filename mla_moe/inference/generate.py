"""Continue prompts: the short way to the engine."""

from collections.abc import Iterator, Sequence

from mla_moe.config import require
from mla_moe.inference.engine import Engine
from mla_moe.inference.request import Completion, Request, are_integers
from mla_moe.nn.transformer import Transformer

MAX_SLOTS = 32


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
    """New tokens of each prompt, up to and without `eos_id`. Temperature 0 takes the likeliest token.

    A prompt's result does not depend on its neighbours, up to rounding. Raises `ConfigError`, a `ValueError`, for a
    prompt that is empty or no list of whole numbers, and for a setting out of range. `Engine` has more settings,
    probabilities, and requests that come and go.
    """
    out: list[list[int]] = [[] for _ in prompts]
    pieces = stream(
        model, prompts, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed, eos_id=eos_id
    )
    for number, tokens in pieces:
        out[number] += tokens
    return out


def stream(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_id: int | None = None,
) -> Iterator[tuple[int, list[int]]]:
    """The same as it comes: pairs of a prompt's number and its next few tokens."""
    require(len(prompts) > 0, "prompts", [], "give at least one")
    require(eos_id is None or are_integers([eos_id]), "eos_id", eos_id, "must be one token id, or None")
    stop_ids = () if eos_id is None else (eos_id,)
    requests = [
        Request(prompt, max_new_tokens, temperature, top_p=top_p, seed=seed, number=number, stop_ids=stop_ids)
        for number, prompt in enumerate(prompts)
    ]
    slots = min(1 << (len(prompts) - 1).bit_length(), MAX_SLOTS)
    engine = Engine(model, slots=slots, capacity=required_length(model, requests))
    number_of: dict[Completion, int] = {engine.submit(request): number for number, request in enumerate(requests)}
    sent = [0] * len(prompts)
    while engine.busy:
        for completion in engine.step():
            number = number_of[completion]
            new = completion.tokens[sent[number] :]
            sent[number] += len(new)
            yield number, new[:-1] if new and new[-1] == eos_id else new


def required_length(model: Transformer, requests: Sequence[Request]) -> int:
    """What the longest of them needs. Raises `ConfigError` where the model has fewer positions."""
    request = max(requests, key=lambda request: len(request.prompt) + request.max_new_tokens)
    capacity, limit = len(request.prompt) + request.max_new_tokens, model.cfg.max_position_embeddings
    fix = f"with {len(request.prompt)} tokens of prompt more than the model's {limit} positions"
    require(capacity <= limit, "max_new_tokens", request.max_new_tokens, fix)
    return capacity

"""Continue prompts: the short way to the engine."""

from collections.abc import Iterator, Sequence

from mla_moe.config import require
from mla_moe.inference.engine import Engine
from mla_moe.inference.request import Completion, Request
from mla_moe.nn.transformer import Transformer

MOST_SLOTS = 32


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

    A prompt's result does not depend on its neighbours. Raises `ConfigError`, a `ValueError`, for an empty prompt or a
    setting out of range. `Engine` has more settings, probabilities, and requests that come and go.
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
    stop_ids = () if eos_id is None else (eos_id,)
    requests = [
        Request(prompt, max_new_tokens, temperature, top_p=top_p, seed=seed, number=number, stop_ids=stop_ids)
        for number, prompt in enumerate(prompts)
    ]
    slots = min(1 << (len(prompts) - 1).bit_length(), MOST_SLOTS)
    engine = Engine(model, slots=slots, capacity=max(len(prompt) for prompt in prompts) + max_new_tokens)
    number_of: dict[Completion, int] = {engine.submit(request): number for number, request in enumerate(requests)}
    sent = [0] * len(prompts)
    while engine.busy:
        for completion in engine.step():
            number = number_of[completion]
            new = completion.tokens[sent[number] :]
            sent[number] += len(new)
            yield number, new[:-1] if new and new[-1] == eos_id else new

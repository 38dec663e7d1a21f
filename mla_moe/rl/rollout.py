"""Groups of answers to questions, sampled by the engine and judged."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from mla_moe.inference.engine import Engine
from mla_moe.inference.request import Completion, Request
from mla_moe.nn.transformer import Transformer
from mla_moe.recipe import RL
from mla_moe.rl.packing import Sampled
from mla_moe.rl.rewards import Scores
from mla_moe.rl.tasks import Example


@dataclasses.dataclass(frozen=True)
class Question:
    """What is asked, and its tokens."""

    example: Example
    prompt: Sequence[int]


@dataclasses.dataclass(frozen=True)
class Answer:
    """One answer to a question, as text and tokens, and what it was worth."""

    question: Question
    completion: Completion
    text: str
    scores: Scores
    overlong: float
    """Penalty for its length, 0 or below."""

    @property
    def reward(self) -> float:
        return self.scores.total + self.overlong

    @property
    def given(self):
        from mla_moe.rl.rewards import parse
        return parse(self.text)[1]

    @property
    def sampled(self) -> Sampled:
        done = self.completion
        return Sampled(done.request.prompt, done.tokens, done.logprobs, done.experts_TlK)


class Sampler:
    """An engine that follows the trainer's weights."""

    def __init__(self, rl: RL, capacity: int, stop_ids: tuple[int, ...]):
        self._rl, self._capacity, self._stop_ids = rl, capacity, stop_ids
        self._engine: Engine | None = None

    def load_weights(self, model: Transformer) -> None:
        if self._engine is None:
            record = self._rl.routing_replay
            self._engine = Engine(model, slots=self._rl.slots, capacity=self._capacity, record_experts=record)
        else:
            self._engine.load_weights(model)

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        seed: int,
        first: int = 0,
        temperature: float | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[Completion]:
        """A completion for each prompt, in order. `first` numbers the first one: an answer's randomness comes from its
        number and the seed. A temperature of None is the recipe's."""
        assert self._engine is not None
        temperature = self._rl.temperature if temperature is None else temperature
        done = [
            self._engine.submit(
                Request(prompt, self._rl.max_new_tokens, temperature, seed=seed, number=n, stop_ids=self._stop_ids)
            )
            for n, prompt in enumerate(prompts, first)
        ]
        while self._engine.busy:
            self._engine.step()
            if progress is not None:
                progress(sum(completion.finish is not None for completion in done))
        return done

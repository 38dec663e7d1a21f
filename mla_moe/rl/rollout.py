"""Asking: questions become prompts, the engine answers them, and rewards judge the answers."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from mla_moe.config import ConfigError, RLConfig
from mla_moe.data.arithmetic import Split
from mla_moe.inference.engine import Engine
from mla_moe.inference.request import Completion, Request
from mla_moe.nn.transformer import Transformer
from mla_moe.rl import rewards
from mla_moe.rl.packing import SampledCompletion
from mla_moe.rl.rewards import THINK_TAG, Reward, Score, ends_with_think
from mla_moe.rl.tasks.task import Task
from mla_moe.rl.verifiers.worker import Example
from mla_moe.text.chat_tokenizer import ChatTokenizer
from mla_moe.text.prompts import render_prompt

MAX_SKIPPED_RATIO = 100
"""Times as many questions may be passed over for their length as are asked."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What is asked, and its tokens."""

    example: Example
    prompt: Sequence[int]
    ends_with_think: bool = False
    """Whether the prompt ends with `<think>` already."""


@dataclasses.dataclass(frozen=True, eq=False)
class ScoredCompletion:
    """One answer to a question, and what it was worth."""

    question: Prompt
    completion: Completion
    text: str
    score: Score

    @property
    def length(self) -> int:
        """Tokens, with the one that ends it."""
        return len(self.completion.tokens)

    @property
    def truncated(self) -> bool:
        """Whether it ran out of tokens."""
        return self.completion.finish == "length"

    @property
    def sampled(self) -> SampledCompletion:
        done = self.completion
        return SampledCompletion(done.request.prompt, done.tokens, done.logprobs, done.experts_TlK)


class Rollout:
    """A task, the engine that answers it with the trainer's weights, and the reward."""

    def __init__(self, rl: RLConfig, template: str, task: Task, reward: Reward, language: ChatTokenizer):
        self._rl, self._template = rl, template
        self._task, self._reward, self._language = task, reward, language
        self._engine: Engine | None = None
        self.too_long = 0
        """Questions passed over, whose prompt was longer than `max_prompt_tokens`."""

    def load_weights(self, model: Transformer) -> None:
        if self._engine is None:
            rl = self._rl
            capacity = rl.max_prompt_tokens + rl.max_new_tokens
            how: Any = {"record_experts": rl.routing_replay, "tempered": True}
            self._engine = Engine(model, slots=rl.max_num_seqs, capacity=capacity, **how)
        else:
            self._engine.load_weights(model)

    def drop_weights(self) -> None:
        """Between sampling and the next `load_weights`: an update needs their memory."""
        assert self._engine is not None
        self._engine.drop_weights()

    def measure(self, answer: ScoredCompletion) -> float:
        """What DAPO compares a group's answers by."""
        return self._reward.measure(answer.score)

    def questions(self, split: Split, start: int, count: int) -> tuple[list[Prompt], int]:
        """The next `count` questions of a split from number `start` on, and the number after the last one. Raises
        `ConfigError` where the prompts are too long time and again."""
        found: list[Prompt] = []
        limit = self.too_long + MAX_SKIPPED_RATIO * count
        while len(found) < count:
            if self.too_long >= limit:
                raise ConfigError("rl.max_prompt_tokens", self._rl.max_prompt_tokens, "most prompts are longer")
            example = self._task.example(split, start)
            prompt = render_prompt(self._template, example.question, self._language)
            start += 1
            if len(prompt) + len(self._opening) <= self._rl.max_prompt_tokens:
                found.append(Prompt(example, prompt, ends_with_think(self._language.decode(prompt))))
            else:
                self.too_long += 1
        return found, start

    def answers(
        self,
        questions: Sequence[Prompt],
        each: int = 1,
        *,
        seed: int,
        first: int = 0,
        temperature: float | None = None,
        opened: bool = False,
        progress: Callable[[str], None] | None = None,
    ) -> list[list[ScoredCompletion]]:
        """`each` answers to every question. Their randomness comes from the seed and their numbers, `first` and on; a
        temperature of None is the recipe's. `opened` answers continue `<think>`, which the prompt may end with."""
        engine = self._engine
        assert engine is not None, "load weights first"
        rl, temperature = self._rl, self._rl.temperature if temperature is None else temperature
        asked = [question for question in questions for _ in range(each)]
        done: list[Completion] = []
        for number, question in enumerate(asked, first):
            prompt = [*question.prompt, *self._opening] if opened and not question.ends_with_think else question.prompt
            stop_ids = self._language.stop_ids
            request = Request(prompt, rl.max_new_tokens, temperature, seed=seed, number=number, stop_ids=stop_ids)
            done.append(engine.submit(request))
        while engine.busy:
            engine.step()
            if progress is not None:
                progress(f"{sum(c.finish is not None for c in done)} of {len(done)} answers")
        texts = [
            THINK_TAG * (opened and not question.ends_with_think) + self._language.decode(completion.tokens)
            for question, completion in zip(asked, done, strict=True)
        ]
        scores = self._judged(asked, texts)
        answers = [ScoredCompletion(*parts) for parts in zip(asked, done, texts, scores, strict=True)]
        return [answers[i : i + each] for i in range(0, len(answers), each)]

    @property
    def _opening(self) -> list[int]:
        return self._language.encode(THINK_TAG)[1:]  # without bos

    def _judged(self, questions: Sequence[Prompt], texts: Sequence[str]) -> list[Score]:
        """The first process judges for all: a time limit need not fall alike in two."""
        if jax.process_index() > 0:
            width = 1 + len(self._reward.names)
            table = multihost_utils.broadcast_one_to_all(np.zeros((len(texts), width), np.float32))
            return [Score(row[0], dict(zip(self._reward.names, row[1:], strict=True)), ()) for row in table.tolist()]
        prompts = [self._language.decode(question.prompt) for question in questions]
        asked = zip(prompts, texts, (question.example for question in questions), strict=True)
        scores = self._reward([rewards.RewardInput(*one) for one in asked])
        if jax.process_count() > 1:
            table = [[score.total, *score.parts.values()] for score in scores]
            multihost_utils.broadcast_one_to_all(np.array(table, np.float32))
        return scores

"""Rollout: render prompts, sample completions with the inference engine, and score them with the reward."""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Generator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from mla_moe.config import RLConfig, require
from mla_moe.data.arithmetic import Split
from mla_moe.inference.engine import Engine
from mla_moe.inference.request import Completion, Request
from mla_moe.nn.transformer import Transformer
from mla_moe.rl.answers import THINK_TAG, ParsedAnswer
from mla_moe.rl.rewards import Reward, RewardInput, Score, ends_with_think
from mla_moe.rl.tasks import Task, open_task
from mla_moe.rl.verifiers.pool import VerifierFailure
from mla_moe.rl.verifiers.worker import Example
from mla_moe.text.chat_tokenizer import ChatTokenizer
from mla_moe.text.prompts import render_prompt
from mla_moe.training.run_context import RunContext

MAX_SKIPPED_RATIO = 100
"""Most prompts that may be skipped because of their length, per prompt requested."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A rendered prompt and the example it was rendered from."""

    example: Example
    token_ids: Sequence[int]
    ends_with_think: bool = False
    """Whether the template already prefills `<think>`."""


@dataclasses.dataclass(frozen=True, eq=False)
class ScoredCompletion:
    """A completion of a prompt, and its score."""

    prompt: Prompt
    completion: Completion
    text: str
    score: Score

    @property
    def length(self) -> int:
        """Length in tokens, including the stop token."""
        return len(self.completion.tokens)

    @property
    def truncated(self) -> bool:
        """Whether it was cut off at `max_new_tokens`."""
        return self.completion.finish_reason == "length"


class Rollout:
    """A task, the engine that samples completions with the trainer's weights, and the reward."""

    def __init__(self, rl: RLConfig, template: str, task: Task, reward: Reward, tokenizer: ChatTokenizer):
        self._rl, self._template, self._tokenizer = rl, template, tokenizer
        self.task, self.reward = task, reward
        self._think_ids = tokenizer.encode(THINK_TAG)[1:]  # without bos
        self._engine: Engine | None = None
        self.prompts_too_long = 0
        """Prompts skipped because they were longer than `max_prompt_tokens`."""
        self.longest_prompt = 0
        """Tokens of the longest prompt that was skipped."""

    def load_weights(self, model: Transformer) -> None:
        """Give the engine the current policy; the first call creates the engine."""
        if self._engine is None:
            self._engine = Engine(
                model,
                max_num_seqs=self._rl.max_num_seqs,
                max_model_len=self._rl.max_prompt_tokens + self._rl.max_new_tokens,
                record_experts=self._rl.routing_replay,
                temperature_scaled_logprobs=True,
            )
        else:
            self._engine.load_weights(model)

    def drop_weights(self) -> None:
        """Free the engine's weights until the next `load_weights`: the update needs the memory."""
        assert self._engine is not None
        self._engine.drop_weights()

    def prompts(self, split: Split, start: int, count: int) -> tuple[list[Prompt], int]:
        """`count` prompts of a split from example number `start` on, fewer if the split has no more, and the number
        after the last one. Prompts longer than `rl.max_prompt_tokens` are skipped and counted. Raises `ConfigError` if
        most prompts are too long, or if there is none."""
        found: list[Prompt] = []
        end = None if split == "train" else self.task.count(split)
        limit = self.prompts_too_long + MAX_SKIPPED_RATIO * count
        while len(found) < count and (end is None or start < end):
            fix = f"most prompts are longer, up to {self.longest_prompt} tokens; increase it"
            require(self.prompts_too_long < limit, "rl.max_prompt_tokens", self._rl.max_prompt_tokens, fix)
            example = self.task.example(split, start)
            token_ids = render_prompt(self._template, example.question, self._tokenizer)
            start += 1
            length = len(token_ids) + len(self._think_ids)
            if length <= self._rl.max_prompt_tokens:
                found.append(Prompt(example, token_ids, ends_with_think(self._tokenizer.decode(token_ids))))
            else:
                self.prompts_too_long += 1
                self.longest_prompt = max(self.longest_prompt, length)
        skipped = f"; {self.prompts_too_long} are longer than rl.max_prompt_tokens" if self.prompts_too_long else ""
        fix = f"has no {split} question{skipped}: add lines, or name a file with task.heldout"
        require(len(found) > 0, "task.name", split, fix)
        return found, start

    def generate(
        self,
        prompts: Sequence[Prompt],
        num_completions: int = 1,
        *,
        seed: int,
        first_index: int = 0,
        temperature: float | None = None,
        prefill_think: bool = False,
        progress: Callable[[str], None] | None = None,
    ) -> list[list[ScoredCompletion]]:
        """Sample and score `num_completions` completions of each prompt.

        Random numbers depend on the seed and the index of a sample, counted from `first_index`. `temperature` defaults
        to the recipe's. With `prefill_think`, `<think>` is added to prompts that do not end with it, and the text of
        their completions starts with it.
        """
        engine = self._engine
        assert engine is not None, "load weights first"
        temperature = self._rl.temperature if temperature is None else temperature
        repeated = [prompt for prompt in prompts for _ in range(num_completions)]
        prefills = [prefill_think and not prompt.ends_with_think for prompt in repeated]
        max_tokens, stop_ids = self._rl.max_new_tokens, self._tokenizer.stop_ids
        done: list[Completion] = []
        for index, (prompt, prefill) in enumerate(zip(repeated, prefills, strict=True), first_index):
            token_ids = [*prompt.token_ids, *self._think_ids] if prefill else prompt.token_ids
            request = Request(token_ids, max_tokens, temperature, seed=seed, sample_index=index, stop_ids=stop_ids)
            done.append(engine.submit(request))
        while engine.has_unfinished_requests:
            engine.step()
            if progress is not None:
                progress(f"{sum(c.finish_reason is not None for c in done)} of {len(done)} completions")
        texts = [THINK_TAG * p + self._tokenizer.decode(c.tokens) for p, c in zip(prefills, done, strict=True)]
        scores = self._score(repeated, texts, done)
        scored = [ScoredCompletion(*fields) for fields in zip(repeated, done, texts, scores, strict=True)]
        return [scored[i : i + num_completions] for i in range(0, len(scored), num_completions)]

    def _score(self, prompts: Sequence[Prompt], texts: Sequence[str], done: Sequence[Completion]) -> list[Score]:
        """Process 0 scores and broadcasts: a verifier may reach its timeout in one process and not in another."""

        def score() -> list[Any]:
            rendered = [self._tokenizer.decode(prompt.token_ids) for prompt in prompts]
            fields = zip(rendered, texts, (p.example for p in prompts), (c.tokens for c in done), strict=True)
            return [tuple(one) for one in self.reward([RewardInput(*one) for one in fields])]

        return [
            Score(total, components, tuple(VerifierFailure(*one) for one in failures), ParsedAnswer(*answer))
            for total, components, failures, answer in from_process_0(score)
        ]

    def votes(self, groups: Sequence[Sequence[ScoredCompletion]]) -> list[list[int | None]]:
        """`Reward.votes` for the completions of each prompt."""
        scores = [[completion.score for completion in group] for group in groups]
        examples = [group[0].prompt.example for group in groups]
        return from_process_0(lambda: self.reward.votes(scores, examples))


def from_process_0(compute: Callable[[], Any]) -> Any:
    """A value in JSON's types that process 0 computes and all processes get."""
    if jax.process_count() == 1:
        return compute()
    text = json.dumps(compute()).encode() if jax.process_index() == 0 else b""
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    padded = np.zeros(1 << length.bit_length(), np.uint8)  # few sizes, as each is compiled
    padded[: len(text)] = np.frombuffer(text, np.uint8)
    return json.loads(multihost_utils.broadcast_one_to_all(padded)[:length].tobytes())


@contextlib.contextmanager
def open_rollout(context: RunContext, rl: RLConfig) -> Generator[Rollout]:
    """A rollout of the recipe's task. The worker processes of its reward end with the context."""
    settings = context.recipe.task
    task = open_task(settings)
    with Reward(settings, task, log=context.console.print) as reward:
        yield Rollout(rl, settings.template, task, reward, context.chat_tokenizer)

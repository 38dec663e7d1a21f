"""The stage of reinforcement learning: ask, sample, judge, compare, learn, and ask again (DeepSeek-R1, section 2.2)."""

import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mla_moe.config import ConfigError
from mla_moe.interop.pretrained import read_arrays
from mla_moe.interop.source import open_source
from mla_moe.nn.skeleton import Arrays
from mla_moe.recipe import Recipe
from mla_moe.rl import evaluate, objective
from mla_moe.rl.packing import pack, parts
from mla_moe.rl.prompts import prompt_of
from mla_moe.rl.rewards import judge, parse
from mla_moe.rl.rollout import Answer, Question, Sampler
from mla_moe.rl.tasks import Example, open_task
from mla_moe.rl.update import Updater
from mla_moe.training.checkpoint import Checkpoints
from mla_moe.training.console import Console, duration
from mla_moe.training.metrics import MetricsWriter
from mla_moe.training.optimizer import learning_rate, make_optimizer
from mla_moe.training.run import Signals, write_atomically
from mla_moe.training.setup import Interrupted, Setup
from mla_moe.training.step import TrainState, abstract_state, init_state

STAGE = "rl"
MAX_PROMPT = 512


class State(NamedTuple):
    step: jax.Array
    params: Arrays
    biases: Arrays
    optimizer: optax.OptState
    reference: Arrays
    """Parameters that the divergence is measured from; empty where it weighs nothing."""


class Asked:
    """How many questions have been asked."""

    def __init__(self):
        self.count = 0

    def states(self) -> Mapping[int, str]:
        return {0: json.dumps(self.count)}

    def restore(self, read: Callable[[int], str]) -> None:
        self.count = json.loads(read(0))


def reinforce(recipe: Recipe, run_dir: Path, console: Console) -> None:
    setup = Setup.of(recipe, run_dir, console)
    stage = Stage(setup)
    asked = Asked()
    with Checkpoints(run_dir, STAGE, recipe.checkpoint) as checkpoints:
        start = checkpoints.latest
        if start == recipe.rl.steps:
            console.say(f"{STAGE}: all {start} steps are done already")
            return
        abstract = stage.abstract_state()
        if start is None:
            state = stage.first_state()
        else:
            state = checkpoints.restore(abstract, asked)
            console.say(f"resumed from the checkpoint of step {start}")
        stage.train(state, asked, checkpoints, start)


@dataclass(frozen=True)
class Stage:
    setup: Setup

    @cached_property
    def task(self):
        return open_task(self.setup.recipe.task)

    @cached_property
    def optimizer(self):
        rl = self.setup.recipe.rl
        return make_optimizer(rl.optimizer, rl.steps * rl.minibatches, self.setup.skeleton)

    @cached_property
    def updater(self):
        return Updater(self.setup, self.optimizer, self.setup.recipe.rl)

    @cached_property
    def sampler(self):
        rl = self.setup.recipe.rl
        return Sampler(rl, self.row_tokens, (self.setup.tokenizer.eos_id,))

    @property
    def row_tokens(self) -> int:
        rl = self.setup.recipe.rl
        return rl.row_tokens or MAX_PROMPT + rl.max_new_tokens

    def abstract_state(self) -> State:
        state = abstract_state(self.setup.skeleton, self.optimizer, self.setup.mesh)
        return State(*state, reference=state.params if self.setup.recipe.rl.kl else {})

    def first_state(self) -> State:
        setup, recipe = self.setup, self.setup.recipe
        source = open_source(setup.run_dir if recipe.training.steps else recipe.init_from)
        arrays = read_arrays(source, setup.skeleton, setup.mesh)
        state = init_state(setup.skeleton, self.optimizer, recipe.seed, setup.mesh, arrays)
        return State(*state, reference=_copy(state.params) if recipe.rl.kl else {})

    def model(self, state):
        return self.setup.skeleton.merge(state.params | state.biases)

    def question(self, split, number: int) -> Question:
        example = self.task.example(split, number)
        return Question(example, prompt_of(self.setup.recipe.task.template, example.question, self.setup.tokenizer))

    def answers(self, questions: Sequence[Question], completions, opening: str = "") -> list[Answer]:
        decode, recipe = self.setup.tokenizer.decode, self.setup.recipe
        texts = [opening + decode(c.tokens) for c in completions]
        scores = judge(self.task, [("", t, q.example) for t, q in zip(texts, questions, strict=True)])
        return [
            Answer(q, c, t, s, 0.0) for q, c, t, s in zip(questions, completions, texts, scores, strict=True)
        ]

    def collect(self, asked: Asked) -> list[list[Answer]]:
        rl, seed = self.setup.recipe.rl, self.setup.recipe.seed
        questions = [self.question("train", asked.count + i) for i in range(rl.prompts)]
        each = [q for q in questions for _ in range(rl.group_size)]
        done = self.sampler.sample([q.prompt for q in each], seed=seed, first=asked.count * rl.group_size)
        asked.count += rl.prompts
        answers = self.answers(each, done)
        return [list(group) for group in itertools.batched(answers, rl.group_size)] if hasattr(itertools, "batched") else [answers[i:i+rl.group_size] for i in range(0, len(answers), rl.group_size)]

    def minibatch(self, groups):
        rl = self.setup.recipe.rl
        reward_GS = np.array([[a.reward for a in g] for g in groups])
        adv = objective.advantages(reward_GS, rl.objective).ravel()
        answers = [a for g in groups for a in g]
        rows = pack([a.sampled for a in answers], self.row_tokens, rl.rows)
        lens = np.array([len(a.completion.tokens) for a in answers])
        idx = rows["answer"]
        rows["advantage"] = np.where(idx >= 0, adv[idx], 0).astype(np.float32)
        w = 1 / (len(answers) * lens) if rl.objective in ("grpo", "gspo") else np.full(len(answers), 1 / lens.sum())
        rows["weight"] = np.where(idx >= 0, w[idx], 0).astype(np.float32)
        return [self.setup.put(p, rl.rows) for p in parts(rows, rl.rows)]

    def learn(self, state: State, groups):
        rl = self.setup.recipe.rl
        size = rl.prompts // rl.minibatches
        batches = [self.minibatch(groups[i : i + size]) for i in range(0, rl.prompts, size)]
        if rl.minibatches > 1:
            for b in batches:
                for p in b:
                    p["old_logprob"] = self.updater.logprobs(state.params, state.biases, p)
        if rl.kl:
            for b in batches:
                for p in b:
                    p["reference_logprob"] = self.updater.logprobs(state.reference, state.biases, p)
        inner, out = TrainState(*state[:4]), []
        for b in batches:
            inner, m = self.updater.update(inner, b)
            out.append(m)
        return State(*inner, reference=state.reference), jax.device_get(out)

    def evaluate(self, state):
        rl, seed = self.setup.recipe.rl, self.setup.recipe.seed
        qs = [self.question(rl.eval_split, i) for i in range(rl.eval_prompts)]
        greedy = self.answers(qs, self.sampler.sample([q.prompt for q in qs], seed=seed, temperature=0.0))
        open_ = self.setup.tokenizer.encode("<think>").tolist()
        forced = self.answers(qs, self.sampler.sample([[*q.prompt, *open_] for q in qs], seed=seed, temperature=0.0), "<think>")
        each = [q for q in qs for _ in range(rl.eval_samples)]
        sampled = self.answers(each, self.sampler.sample([q.prompt for q in each], seed=seed + 1))
        k = rl.eval_samples
        return evaluate.Evaluation(greedy, forced, [sampled[i : i + k] for i in range(0, len(sampled), k)])

    def train(self, state: State, asked: Asked, checkpoints, start):
        rl = self.setup.recipe.rl
        first, last = start or 0, rl.steps
        rate = learning_rate(rl.optimizer.schedule, rl.steps)
        with Signals() as signals, MetricsWriter(self.setup.run_dir, start, STAGE) as writer, self.setup.console.progress(STAGE, last, first) as progress:
            def ev(number, state):
                t = time.monotonic()
                e = self.evaluate(state)
                m = e.metrics()
                writer.write(number, m)
                writer.append_samples(evaluate.rows(number, e))
                self.setup.console.say(f"step {number}: " + "  ".join(f"{k[5:]} {v:.3f}" for k, v in m.items()) + f" ({time.monotonic()-t:.1f}s)")
            self.sampler.load_weights(self.model(state))
            if start is None:
                ev(0, state)
            for number in range(first + 1, last + 1):
                t0 = time.monotonic()
                groups = self.collect(asked)
                t1 = time.monotonic()
                state, ms = self.learn(state, groups)
                self.sampler.load_weights(self.model(state))
                t2 = time.monotonic()
                answers = [a for g in groups for a in g]
                tokens = sum(m["tokens"] for m in ms)
                row = {
                    "loss": sum(m["loss"] for m in ms), "lr": float(rate(number - 1)),
                    "reward": np.mean([a.reward for a in answers]),
                    "accuracy": np.mean([a.scores.values["accuracy"] for a in answers]),
                    "format_rate": np.mean([a.scores.values["format"] for a in answers]),
                    "response_length": np.mean([len(a.completion.tokens) for a in answers]),
                    **{k: sum(m[k] for m in ms) / tokens for k in ("kl", "entropy", "clipped", "mismatch")},
                    "grad_norm": np.mean([m["grad_norm"] for m in ms]), "skipped": sum(m["skipped"] for m in ms),
                    "sample_seconds": t1 - t0, "update_seconds": t2 - t1, "step_seconds": t2 - t0,
                    "tokens_per_s": tokens / (t2 - t0),
                }
                load = sum(m["load_LE"] for m in ms)
                writer.write(number, row)
                writer.write_load(number, load)
                progress.update(number, row)
                if number % 5 == 0: self.setup.console.say(" ".join(f"{k} {float(v):.3g}" for k, v in row.items()))
                is_last = number == last
                if is_last or (rl.eval_every and number % rl.eval_every == 0):
                    ev(number, state)
                if is_last or number % self.setup.recipe.checkpoint.every == 0 or signals.stop(number):
                    checkpoints.save(number, state, asked, self.setup.skeleton)
                if signals.stop(number) and not is_last:
                    raise Interrupted(f"stopped at step {number} by {signals.name}; state saved")


@jax.jit
def _copy(tree):
    return jax.tree.map(jnp.copy, tree)

"""The stage of reinforcement learning: ask, sample, judge, compare, learn, and ask again (DeepSeek-R1, section 2.2)."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mla_moe.config import require
from mla_moe.nn.skeleton import Arrays
from mla_moe.nn.transformer import Transformer
from mla_moe.recipe import Recipe, Task
from mla_moe.rl.evaluate import evaluate
from mla_moe.rl.groups import collect
from mla_moe.rl.objective import beta
from mla_moe.rl.rewards import Reward
from mla_moe.rl.rollout import Rollout
from mla_moe.rl.tasks import open_task
from mla_moe.rl.update import Updater
from mla_moe.training.begin import loaded_state, model_before
from mla_moe.training.checkpoint import Checkpoints
from mla_moe.training.console import Console, duration
from mla_moe.training.guard import Guard
from mla_moe.training.metrics import MetricsWriter, Silence, read_rows, seconds_in_steps
from mla_moe.training.optimizer import learning_rate, make_optimizer
from mla_moe.training.run import Signals, add_summary
from mla_moe.training.setup import Interrupted, Setup
from mla_moe.training.step import TrainState, abstract_state

STAGE = "rl"


class State(NamedTuple):
    """A `TrainState`, and what the divergence is measured from."""

    step: jax.Array
    """Updates done."""
    params: Arrays
    biases: Arrays
    optimizer: optax.OptState
    reference: Arrays
    """Parameters of an earlier time; empty where the divergence weighs nothing."""

    @property
    def training(self) -> TrainState:
        return TrainState(self.step, self.params, self.biases, self.optimizer)


class Asked:
    """How far the training questions have been asked."""

    def __init__(self, task: Task, fingerprint: int):
        """`fingerprint` tells the questions from others."""
        self._task, self._fingerprint, self.next = task, fingerprint, 0

    def states(self) -> Mapping[int, str]:
        return {0: json.dumps({"next": self.next, "questions": self._fingerprint})}

    def restore(self, read: Callable[[int], str]) -> None:
        """Raises `ConfigError` where the questions are others than the checkpoint's."""
        state = json.loads(read(0))
        fix = "holds other questions than the run began with; put them back, or begin another run"
        require(state["questions"] == self._fingerprint, "task.name", self._task.name, fix)
        self.next = state["next"]


def reinforce(recipe: Recipe, run_dir: Path, console: Console) -> None:
    """Learn to `recipe.rl.steps`, from the newest checkpoint if there is one, else from this run's pretraining or from
    `init_from`.

    Raises `ConfigError` before anything compiles, and `Interrupted` after a signal, when the state is saved.
    """
    setup = Setup.of(recipe, run_dir, console)
    task = open_task(recipe.task)
    reward = Reward(recipe.task, task, tell=console.say)
    with reward, Checkpoints(run_dir, STAGE, recipe.checkpoint) as checkpoints:
        rollout = Rollout(recipe.rl, recipe.task.template, task, reward, setup.language)
        asked = Asked(recipe.task, task.fingerprint)
        stage, start = Stage(setup, rollout), checkpoints.latest
        if start == recipe.rl.steps:
            console.say(f"{STAGE}: all {start} steps are done already")
            return
        rollout.questions("train", 0, 1)  # here, so that what is wrong with them is said before anything compiles
        rollout.questions(recipe.rl.eval_split, 0, recipe.rl.eval_prompts)
        console.startup_table(f"{recipe.run_dir}: {STAGE}", stage.describe())
        if start is None:
            state = stage.first_state()
        else:
            state, start = checkpoints.restore(stage.abstract_state(), asked, console.say), checkpoints.latest
            console.say(f"resumed from the checkpoint of step {start}")
        stage.train(state, asked, checkpoints, start)


@dataclass(frozen=True)
class Stage:
    """What the parts of the stage share."""

    setup: Setup
    rollout: Rollout

    @cached_property
    def updater(self) -> Updater:
        rl = self.setup.recipe.rl
        tx = make_optimizer(rl.optimizer, rl.steps * rl.minibatches, self.setup.skeleton)
        return Updater(self.setup, tx)

    def describe(self) -> list[tuple[str, str]]:
        """The start-up table."""
        task, rl = self.setup.recipe.task, self.setup.recipe.rl
        divergence = f"{beta(rl):g} x divergence" if beta(rl) else "no divergence"
        return [
            *self.setup.describe(abstract_state(self.setup.skeleton, self.updater.tx, self.setup.mesh)),
            ("task", " ".join((task.name, *task.options))),
            ("objective", f"{rl.objective}, {divergence}, {rl.minibatches} updates a step"),
            ("answers a step", f"{rl.prompts * rl.group_size}: {rl.group_size} to each of {rl.prompts} questions"),
        ]

    def abstract_state(self) -> State:
        state = abstract_state(self.setup.skeleton, self.updater.tx, self.setup.mesh)
        return State(*state, reference=state.params if beta(self.setup.recipe.rl) else {})

    def first_state(self) -> State:
        setup, recipe = self.setup, self.setup.recipe
        path = model_before(STAGE, recipe, setup.run_dir)
        state = loaded_state(path, recipe, setup.skeleton, self.updater.tx, setup.mesh)
        setup.console.say(f"started from {path}")
        return State(*state, reference=_copy(state.params) if beta(recipe.rl) else {})

    def model(self, state: State) -> Transformer:
        return self.setup.skeleton.merge(state.params | state.biases)

    def train(self, state: State, asked: Asked, checkpoints: Checkpoints, start: int | None) -> None:
        """Step to the end."""
        setup, rl = self.setup, self.setup.recipe.rl
        first, last = start or 0, rl.steps
        rate = learning_rate(rl.optimizer.schedule, rl.steps * rl.minibatches)
        with (
            Signals() as signals,
            MetricsWriter(setup.run_dir, start, STAGE) if jax.process_index() == 0 else Silence() as writer,
            setup.console.progress(STAGE, last, first) as progress,
        ):
            if start is None:
                self._evaluate(0, state, writer)
            training = replace(setup.recipe.training, spike=None)  # a loss of advantages has no level to leap from
            guard = Guard(training, setup.run_dir, STAGE, None)
            for number in range(first + 1, last + 1):
                began = time.monotonic()
                self.rollout.load_weights(self.model(state))
                groups = collect(self.rollout, rl, setup.recipe.seed, asked.next, progress.note)
                asked.next = groups.next_question
                self.rollout.drop_weights()
                sampled = time.monotonic()
                updated, learned = self.updater.learn(state.training, state.reference, groups)
                state = State(*updated, reference=state.reference)
                if beta(rl) and rl.reference_every and number % rl.reference_every == 0:
                    state = state._replace(reference=_copy(state.params))
                step_seconds = time.monotonic() - began
                row = groups.metrics() | learned.metrics | {
                    "lr": float(np.asarray(rate(number * rl.minibatches - 1))),
                    "tokens_per_s": groups.tokens / step_seconds,
                    "sample_seconds": sampled - began,
                    "step_seconds": step_seconds,
                }  # fmt: skip
                writer.write(number, row)
                if learned.load_LE.size:
                    writer.write_load(number, learned.load_LE)
                progress.update(number, row)
                guard.see(number, row, partial(self.updater.rows, groups))
                is_last = number == last
                if is_last or (rl.eval_every and number % rl.eval_every == 0):
                    self._evaluate(number, state, writer)
                if is_last or number % setup.recipe.checkpoint.every == 0 or signals.stop(number):
                    checkpoints.save(number, state, asked, setup.skeleton)
                if is_last:
                    self._finish()
                if signals.stop(number):
                    raise Interrupted(f"stopped at step {number} by {signals.name}; state saved")

    def _evaluate(self, number: int, state: State, writer) -> None:
        rl = self.setup.recipe.rl
        self.rollout.load_weights(self.model(state))
        found = evaluate(self.rollout, rl.eval_split, rl.eval_prompts, rl.eval_samples, self.setup.recipe.seed + 1)
        metrics = found.metrics()
        writer.write(number, metrics)
        writer.append_samples(found.rows(number))
        texts = (f"{name.strip()} {metrics[key]:{form}}" for name, key, form in _SHOWN if key in metrics)
        self.setup.console.say(f"step {number}: {', '.join(texts)}")

    def _finish(self) -> None:
        """A summary for the report and the terminal: held-out questions before and after."""
        if jax.process_index() > 0:
            return
        rows = read_rows(self.setup.run_dir / "metrics.jsonl", STAGE)
        found = [row for row in rows if _SHOWN[0][1] in row]
        first, last = found[0], found[-1]
        table = {name: f"{first[key]:{form}} -> {last[key]:{form}}" for name, key, form in _SHOWN if key in first}
        table |= {"time in RL steps": duration(seconds_in_steps(rows, 1))}
        add_summary(self.setup.run_dir, table)
        self.setup.console.result_table("held-out questions, before and after", list(table.items()))


_SHOWN = (
    ("right answers", "eval/accuracy", ".1%"),
    ("  opened with <think>", "eval/forced_accuracy", ".1%"),
    ("right form", "eval/format_rate", ".1%"),
    ("tokens of a sampled answer", "eval/response_length", ".1f"),
)


@jax.jit
def _copy(params: Arrays) -> Arrays:
    return jax.tree.map(jnp.copy, params)
